"""What a run reads, present before a compute node without internet looks for it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from launch.checks.finding import Finding, error, ok, warning
from launch.checks.probe import StoreFacts, ask_store
from launch.secrets import open_secret_files
from trainer.config import RunConfig

TOPIC = "artefacts"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
DOWNLOAD = "on a machine with internet: `hf download NAME --local-dir FOLDER`, then copy it there"
NO_STORE = StoreFacts()


@dataclass(frozen=True)
class ArtefactFacts:
    """Files of a run's model, tokenizer and data.

    Attributes:
        model: the model folder; None for a model from scratch.
        model_lacks: what is missing in it.
        tokenizer: folder or file; None when the run has none.
        tokenizer_lacks: what is missing there.
        store_dir: where prepared sources lie.
        has_sources: whether the config names any.
        store: which of them are prepared.
        internet: of the compute nodes, by the profile; None if unknown.
        wandb: log.wandb.
        open_files: with keys of the user, readable by others.
    """

    model: str | None = None
    model_lacks: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    tokenizer_lacks: list[str] = field(default_factory=list)
    store_dir: str = ""
    has_sources: bool = False
    store: StoreFacts = NO_STORE
    internet: bool | None = None
    wandb: str = "off"
    open_files: list[str] = field(default_factory=list)


def gather(config: RunConfig) -> ArtefactFacts:
    """Look at the files; the store is asked for in a process of its own."""
    model, tokenizer = config.model.path, config.tokenizer.path or config.model.path
    lacks = find_gaps(Path(model).expanduser()) if model else []
    tokenizer_lacks = find_tokenizer_gaps(Path(tokenizer).expanduser()) if tokenizer else []
    has_sources = bool(config.data.sources)
    readable = has_sources and tokenizer is not None and not tokenizer_lacks
    return ArtefactFacts(
        model=model,
        model_lacks=lacks,
        tokenizer=tokenizer,
        tokenizer_lacks=tokenizer_lacks,
        store_dir=config.data.store_dir,
        has_sources=has_sources,
        store=ask_store(dataclasses.asdict(config)) if readable else NO_STORE,
        internet=config.cluster.site.internet,
        wandb=config.log.wandb,
        open_files=[str(path) for path in open_secret_files(os.environ)],
    )


def find_gaps(folder: Path) -> list[str]:
    """Return the files that a model folder lacks."""
    if not folder.is_dir():
        return [f"the folder {folder}"]
    lacks = [] if (folder / "config.json").is_file() else ["config.json"]
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    if index is not None:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):  # as a broken download is
            return [*lacks, f"a readable {index.name}"]
        return lacks + sorted(name for name in shards if not (folder / name).is_file())
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        lacks.append("weights (*.safetensors)")
    return lacks


def find_tokenizer_gaps(path: Path) -> list[str]:
    """Return what a tokenizer folder, or a SentencePiece file, lacks."""
    if path.is_file():
        return []
    if not path.is_dir():
        return [f"{path}"]
    if any((path / name).is_file() for name in TOKENIZER_FILES):
        return []
    return [f"one of {', '.join(TOKENIZER_FILES)}"]


def judge(facts: ArtefactFacts) -> list[Finding]:
    """Judge model, tokenizer, prepared store and the ways to the internet."""
    findings = []
    if facts.model is None:
        findings.append(ok(TOPIC, "the model starts from scratch: no model folder is read"))
    else:
        findings.append(_judge_files("model.path", facts.model, facts.model_lacks))
    if facts.tokenizer is not None and facts.tokenizer != facts.model:
        lacks = facts.tokenizer_lacks
        findings.append(_judge_files("tokenizer.path", facts.tokenizer, lacks))
    findings += [_judge_store(facts)] if facts.has_sources else []
    if facts.wandb == "online" and facts.internet is False:
        why = "compute nodes have no internet: wandb would wait, then fail"
        remedy = "log.wandb=offline; `wandb sync` sends it from the login node"
        findings.append(error(TOPIC, "log.wandb=online", why, remedy))
    if facts.open_files:
        why = "others on this machine may read your keys in it"
        remedy = f"chmod 600 {' '.join(facts.open_files)}, and renew the keys"
        findings.append(error(TOPIC, f"{', '.join(facts.open_files)} is open", why, remedy))
    return findings


def _judge_files(key: str, path: str, lacks: list[str]) -> Finding:
    if not lacks:
        return ok(TOPIC, f"{key}={path} is complete")
    why = "a run takes files only, and downloads nothing"
    return error(TOPIC, f"{key}={path} lacks {', '.join(lacks)}", why, DOWNLOAD)


def _judge_store(facts: ArtefactFacts) -> Finding:
    where = f"data.store_dir={facts.store_dir}"
    remedy = "kuroshio prepare, with the overrides of this run"
    if facts.tokenizer_lacks or facts.tokenizer is None:
        why = "stores are named by their tokenizer, which is not there"
        return warning(TOPIC, f"{where} was not looked at", why, "cure tokenizer.path first")
    if facts.store.problem:
        return error(TOPIC, "sources cannot be found", facts.store.problem, "mend data.sources")
    if facts.store.missing:
        what = f"{where} lacks {', '.join(facts.store.missing)}"
        why = "a run prepares them at its start, while its GPUs wait"
        return warning(TOPIC, what, why, f"{remedy}, where no GPU waits")
    return ok(TOPIC, f"{where} has {', '.join(facts.store.present)}")
