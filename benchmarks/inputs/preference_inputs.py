"""What the benchmarks of preference learning start from: the same pairs and model for all.

Every variant gets the same pairs in every turn, in the same chat template and cut nowhere: only
pairs whose answers both fit are taken. So their rows a second can be compared as they are.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.inputs.chat_inputs import CUTOFF, TEMPLATE
from benchmarks.inputs.run_inputs import ARCHITECTURE, ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HH = ROOT.parent / "shared" / "data" / "preference" / "hh_rlhf"
HH_FILE = HH / "harmless-base_test_rows0000-1799.jsonl.gz"
SAMPLES = ROOT / "samples" / "preference_zh_tw.jsonl"
TURN = re.compile(r"\n\n(Human|Assistant): ")
MAX_PROMPT = 64  # tokens of a prompt of PPO


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        turns: contents of the prompt's messages, user first.
        chosen: the better answer.
        rejected: the worse one.
    """

    turns: list[str]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Example:
    """A pair as text and token ids, for trainers that are given those.

    Attributes:
        prompt: rendered by the chat template.
        chosen: what the template adds for the better answer, without the end token.
        rejected: the same for the worse one.
        prompt_ids: token ids of the prompt.
        chosen_ids: of prompt and better answer with its end token.
        rejected_ids: of prompt and worse answer with its end token.
    """

    prompt: str
    chosen: str
    rejected: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def find_pairs(given: Path | None) -> Path:
    """Return the given file, else HH-RLHF's beside the checkout, else the samples."""
    if given is not None:
        return given
    return HH_FILE if HH_FILE.is_file() else SAMPLES


def read_pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a file in HH-RLHF's form or with ``prompt``, ``chosen``, ``rejected``.

    Transcripts whose speakers do not take turns, or whose prompts differ, are passed over.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open() as file:
        for line in file:
            row = json.loads(line)
            if "prompt" in row:
                yield Pair([row["prompt"]], row["chosen"], row["rejected"])
                continue
            chosen, rejected = (read_transcript(row[side]) for side in ("chosen", "rejected"))
            if chosen and rejected and chosen[:-1] == rejected[:-1] and chosen != rejected:
                yield Pair(chosen[:-1], chosen[-1], rejected[-1])


def read_transcript(text: str) -> list[str] | None:
    """Return what is said in turns, the assistant last; None if it is not so.

    >>> read_transcript("\\n\\nHuman: Hi\\n\\nAssistant: Hello")
    ['Hi', 'Hello']
    """
    first, *rest = TURN.split(text)
    speakers, turns = rest[::2], [turn.strip() for turn in rest[1::2]]
    regular = speakers == ["Human", "Assistant"] * (len(turns) // 2)
    return turns if regular and turns and all(turns) and not first.strip() else None


def encode(pair: Pair, tokenizer: PreTrainedTokenizerFast, template: str) -> Example:
    """Render and tokenise a pair."""

    def render(answer: str | None) -> str:
        turns = pair.turns if answer is None else [*pair.turns, answer]
        roles = itertools.cycle(["user", "assistant"])
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=answer is None, tokenize=False
        )
        return str(text)

    prompt, chosen, rejected = render(None), render(pair.chosen), render(pair.rejected)
    ids = [tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, chosen, rejected)]
    eos = str(tokenizer.eos_token)
    better, worse = (t.removeprefix(prompt).removesuffix(eos) for t in (chosen, rejected))
    return Example(prompt, better, worse, *ids)


def choose_pairs(
    path: Path, number: int, tokenizer: PreTrainedTokenizerFast, max_prompt: int = CUTOFF
) -> tuple[list[Pair], list[Example]]:
    """Return ``number`` pairs spread evenly over those whose sequences all fit.

    Raises:
        SystemExit: there are fewer.
    """
    from trainer.data.chats.templates import resolve_template

    template = resolve_template(tokenizer, TEMPLATE)
    fitting = []
    for pair in itertools.islice(read_pairs(path), 50 * number):
        example = encode(pair, tokenizer, template)
        longest = max(len(example.chosen_ids), len(example.rejected_ids))
        if longest <= CUTOFF and len(example.prompt_ids) <= max_prompt:
            fitting.append((pair, example))
    if len(fitting) < number:
        raise SystemExit(f"{path}: {len(fitting)} pairs fit, {number} are needed")
    chosen = [fitting[i * len(fitting) // number] for i in range(number)]
    return [pair for pair, _ in chosen], [example for _, example in chosen]


def write_inputs(
    path: Path, number: int, tokenizer_path: Path, folder: Path, max_prompt: int = CUTOFF
) -> dict[str, Any]:
    """Write what all variants read: ``model``, ``pairs`` (a LLaMA-Factory folder), ``examples``.

    Returns:
        The paths, and ``num_tokens`` of all sequences.
    """
    import torch

    from launch.compose import compose_values
    from tokenizer.load import load_tokenizer, num_ids
    from trainer.config import load_config
    from trainer.data.chats.templates import read_builtin
    from trainer.models.load import load_model, make_config

    tokenizer = load_tokenizer(str(tokenizer_path))
    pairs, examples = choose_pairs(path, number, tokenizer, max_prompt)
    overrides = [f"model.architecture.{key}={value}" for key, value in ARCHITECTURE.items()]
    config = load_config(compose_values([*overrides, f"run_dir='{folder / 'model'}'"]))
    hf_config = make_config(config.model, num_ids(tokenizer), {})
    load_model(config.model, hf_config, torch.float32, 0).save_pretrained(folder / "model")
    tokenizer.chat_template = read_builtin(TEMPLATE)
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "examples.json").write_text(json.dumps([asdict(e) for e in examples]))
    (folder / "data" / "pairs.json").write_text(json.dumps([as_sharegpt(p) for p in pairs]))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    asked = {"messages": "conversations"}
    file = {"file_name": "pairs.json", "formatting": "sharegpt"}
    info = {"pairs": file | {"ranking": True, "columns": columns}}
    info["prompts"] = file | {"file_name": "prompts.json", "columns": asked}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    prompts = [as_sharegpt(pair) for pair in pairs]
    for row in prompts:  # LLaMA-Factory's ppo leaves the last answer out
        row["conversations"].append(row.pop("chosen"))
        row.pop("rejected")
    (folder / "data" / "prompts.json").write_text(json.dumps(prompts))
    return {
        "model": str(folder / "model"),
        "pairs": str(folder / "data" / "pairs.json"),
        "examples": str(folder / "examples.json"),
        "num_tokens": sum(len(e.chosen_ids) + len(e.rejected_ids) for e in examples),
    }


def write_reward_model(folder: Path) -> str:
    """Write a one-label classifier with the model's backbone beside it; return its folder."""
    from transformers import AutoModelForSequenceClassification

    model, out = folder / "model", folder / "reward_model"
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    classifier.save_pretrained(out)
    for path in model.glob("*token*"):
        (out / path.name).write_bytes(path.read_bytes())
    for path in model.glob("chat_template*"):
        (out / path.name).write_bytes(path.read_bytes())
    return str(out)


def as_sharegpt(pair: Pair) -> dict[str, Any]:
    """Return a pair as a ShareGPT record with two answers."""
    speakers = itertools.cycle(["human", "gpt"])
    asked = [{"from": s, "value": t} for s, t in zip(speakers, pair.turns, strict=False)]
    return {
        "conversations": asked,
        "chosen": {"from": "gpt", "value": pair.chosen},
        "rejected": {"from": "gpt", "value": pair.rejected},
    }
