"""Every reader of models, tokenizers, configs and run folders, with valid files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from broken_bytes import Rows, Target
from chat_tokenizers import sentencepiece_bytes, sentencepiece_tokenizer
from run_folders import BOOT, iso
from safetensors.numpy import save as save_tensors

from launch import run_folder
from launch.exports import read_exports
from launch.graph.lineage import read_json
from launch.job_folder import read_submission
from launch.verification import records
from tokenizer.load import (
    embedding_rows,
    fingerprint,
    load_tokenizer,
    safetensors_header,
    save_tokenizer,
)
from trainer import heartbeat
from trainer.config import SourceConfig, load_config
from trainer.data.chats.templates import read_builtin, resolve_template
from trainer.data.prepared.store import CONTENT_ARRAYS, DOCUMENT_ARRAYS, STORE_FORMAT, SourceStore
from trainer.data.prepared.store import verify as verify_store
from trainer.data.reading.llama_factory import read_entries
from trainer.engine.committed import find_checkpoint
from trainer.engine.manifest import FORMAT, read_manifest
from trainer.lease import read_holder
from trainer.lives import LIVES_NAME, read_lives
from trainer.metrics.history import load_run
from trainer.metrics.journal import JOURNAL_NAME, rewind
from trainer.metrics.life import build_life
from trainer.metrics.run_facts import read_run
from trainer.models.adapter_files import AdapterFiles
from trainer.models.export import open_folder
from trainer.models.identity import model_identity

Values = dict[str, Any]
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
CONFIG: Values = {
    "name": "one",
    "run_dir": "runs/one",
    "stage": {"name": "pretrain"},
    "model": {"name": "micro", "architecture": {"model_type": "llama", "hidden_size": 32}},
    "tokenizer": {"path": "tok"},
    "data": {"sources": {"en": {"paths": ["a.jsonl"]}}, "store_dir": "store"},
    "engine": {"zero_stage": 1},
    "optim": {"lr": 0.001},
    "schedule": {"name": "cosine", "warmup_steps": 2},
    "peft": {},
    "loop": {"max_steps": 12, "global_batch_tokens": 8192},
    "log": {},
    "cluster": {},
}


def encode(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def tensors() -> bytes:
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    return bytes(save_tensors({name: np.ones(shape, np.float32) for name, shape in shapes.items()}))


def read_model(path: Path) -> None:
    """Look at a model folder's weights as starting a run and exporting one do."""
    safetensors_header(path)
    embedding_rows(path.parent)
    model_identity(path.parent)
    for name, file in open_folder(path.parent).items():
        file.get_tensor(name)


def read_adapter(path: Path) -> None:
    """Open an adapter of which one file is broken."""
    for name, content in adapter_files().items():
        if not (path.parent / name).exists():
            (path.parent / name).write_bytes(content)
    files = AdapterFiles.open(path.parent)
    for name in files.shapes:
        files.read(name)


def adapter_files() -> dict[str, bytes]:
    """Return a small adapter's files."""
    names = ("lora_A", "lora_B")
    weights = {f"base_model.model.q_proj.{n}.weight": np.ones((2, 2), np.float32) for n in names}
    return {
        "adapter_config.json": encode(ADAPTER),
        "adapter_model.safetensors": save_tensors(weights),
    }


def checkpoint_files() -> dict[str, bytes]:
    """Return the files of a checkpoint of step 4."""
    kinds = ("master", "exp_avg", "exp_avg_sq")
    weights = bytes(save_tensors({f"a|{kind}@0": np.ones(4, np.float32) for kind in kinds}))
    facts = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    manifest = {"format": FORMAT, "step": 4, "world_size": 1, "zero_stage": 0, "precision": "fp32",
                "files": {"rank_00000.safetensors": facts}, "parameters": {"a": [2, 2]},
                "state": {"inputs": {}}}  # fmt: skip
    return {"manifest.json": encode(manifest), "rank_00000.safetensors": weights}


def in_checkpoint(path: Path) -> None:
    """Find and verify a checkpoint of which one file is broken."""
    folder = path.parent / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    for name, content in checkpoint_files().items():
        (folder / name).write_bytes(path.read_bytes() if name == path.name else content)
    read_manifest(folder)
    find_checkpoint(folder.parent, None)


def store_files() -> dict[str, bytes]:
    """Return the files of a small token store."""
    arrays = {"tokens": np.arange(6, dtype="<u2")}
    arrays |= {name: np.full(2, 3, dtype) for name, dtype in DOCUMENT_ARRAYS.items()}
    assert not CONTENT_ARRAYS["documents"]
    files: dict[str, bytes] = {}
    for name, array in arrays.items():
        out = io.BytesIO()
        np.save(out, array)
        files[f"{name}.npy"] = out.getvalue()
    facts = {
        name.removesuffix(".npy"): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    return {"manifest.json": encode({"format": STORE_FORMAT, "arrays": facts}), **files}


def in_store(path: Path) -> None:
    """Verify and open a token store of which one file is broken."""
    folder = path.parent / "store"
    folder.mkdir()
    for name, content in store_files().items():
        (folder / name).write_bytes(path.read_bytes() if name == path.name else content)
    verify_store(folder)
    store = SourceStore.open(folder, "en", 0.1)
    store.document_ids(held_out=False)


def in_tokenizer(files: dict[str, bytes]) -> Callable[[Path], None]:
    """Return what loads a tokenizer folder of which one file is broken."""

    def read(path: Path) -> None:
        for name, content in files.items():
            if name != path.name:
                (path.parent / name).write_bytes(content)
        fingerprint(path.parent)
        load_tokenizer(path.parent).encode("海流 north")

    return read


def read_sentencepiece(path: Path) -> None:
    """Load a bare SentencePiece model."""
    fingerprint(path)
    load_tokenizer(path).encode("海流 north")


def count_journal(path: Path) -> Rows:
    """Read the records of a run in every way there is; lines are counted apart from the readers."""
    run_dir = path.parent
    (run_dir / run_folder.CONFIG_FILE).write_text(yaml.safe_dump(CONFIG))
    load_run(run_dir)
    read_run(run_dir)
    kept = records.read_spans(records.read_lines(path))
    records.check_metrics(run_dir, CONFIG, 3)
    whole = list(records.read_lines(path))
    torn, _ = records.num_torn(path)
    num_lines = sum(not line.isspace() for line in path.open("rb"))
    rewind(path, 2)
    assert all(span.end >= 0 for span in records.read_spans(records.read_lines(path))) or kept
    return Rows(num_lines, len(whole), torn)


def read_run_folder(path: Path) -> None:
    """Read a run's folder of which one file is broken."""
    run_dir = path.parent
    for name, content in run_files().items():
        if not (run_dir / name).exists():
            (run_dir / name).write_bytes(content)
    holder = run_dir / "leases" / "00001.json"
    holder.parent.mkdir()
    holder.write_bytes((run_dir / "00001.json").read_bytes())
    read_holder(run_dir)
    read_run(run_dir)
    read_submission(run_dir)
    read_exports(run_dir)
    _, checked = records.check_config(run_dir)
    assert checked.state in ("ok", "problem")
    records.check_lives(run_dir, is_alive=False)
    for life in read_lives(run_dir):
        build_life(life)
    read_json(run_dir / "submit.json")
    heartbeat.read_beat(run_dir / "beat")


def run_files() -> dict[str, bytes]:
    """Return the files of a run that has lived once."""
    start = {"started": iso(0), "token": 1, "host": "n1", "job": None, "restart": 0,
             "world_size": 2, "first_step": 0, "changes": {"loop.log_every": [1, 2]}}  # fmt: skip
    lease = {"token": 1, "host": "n1", "job": None, "restart": 0, "claimed": iso(0)}
    beat = heartbeat.Beat(
        rank=0, host="n1", pid=7, token=1, number=3, step=2, phase="step", idle_s=0.5, where="",
        waits=False, time=1.0,
    )  # fmt: skip
    return {
        run_folder.CONFIG_FILE: yaml.safe_dump(CONFIG).encode(),
        LIVES_NAME: lines(start, {"ended": iso(9), "token": 1, "exit_code": 0}),
        "00001.json": encode(lease | {"process": vars(BOOT)}),
        "submit.json": encode({"job_ids": ["7"], "cluster": "taiwania2", "plan": None}),
        "exports.jsonl": lines({"folder": "/nowhere", "files": {"a": {"bytes": 1, "sha256": ""}}}),
        "beat": encode(vars(beat)),
    }


def read_frozen(path: Path) -> None:
    """Build a run from a frozen config."""
    load_config(run_folder.read(path))


def read_info(path: Path) -> None:
    """Read LLaMA-Factory's description of a folder's files."""
    (path.parent / "a.json").write_text("[]")
    read_entries(SourceConfig([str(path.parent)], datasets=["a"]))


def record_targets(folder: Path) -> list[Target]:
    """Return the readers of everything but training data; ``folder`` is for a tokenizer."""
    tokenizer = sentencepiece_tokenizer()
    place = folder / "tokenizer"
    save_tokenizer(tokenizer, place)
    files = {path.name: path.read_bytes() for path in place.glob("*.json")}
    template = {
        "a.jinja": read_builtin("chatml").encode(),
        "b.jinja": read_builtin("alpaca").encode(),
    }
    records_of = [{"split": "train", "step": n, "time": 1.0, "loss": 2.0} for n in (1, 2, 3)]
    journal = lines({"split": "event", "step": 0, "event": "environment"}, *records_of)
    info = {"a": {"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}}}
    return [
        Target("chat templates", template, lambda p: void(resolve_template(tokenizer, str(p)))),
        Target("tokenizer folders", files, in_tokenizer(files)),
        Target("SentencePiece models", {"a.model": sentencepiece_bytes()}, read_sentencepiece),
        Target("model weights", {"model.safetensors": tensors()}, read_model),
        Target("adapters", adapter_files(), read_adapter),
        Target("checkpoints", checkpoint_files(), in_checkpoint),
        Target("token stores", store_files(), in_store),
        Target("configs", {"config.yaml": yaml.safe_dump(CONFIG).encode()}, read_frozen),
        Target("metrics.jsonl", {JOURNAL_NAME: journal}, count_journal),
        Target("run folders", run_files(), read_run_folder),
        Target("dataset_info.json", {"dataset_info.json": encode(info)}, read_info),
    ]


def void(_: object) -> None:
    """Return nothing: what was read has no rows."""
