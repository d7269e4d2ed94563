"""What the benchmarks of fine-tuning start from: conversations, a chat template, a 58 M LLaMA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.inputs.run_inputs import ARCHITECTURE, ROOT

ALPACA = ROOT.parent / "shared" / "data" / "sft" / "llama_factory" / "alpaca_en_demo.json"
SAMPLES = ROOT / "samples" / "chat_zh_tw.jsonl"
TEMPLATE = "llama2"  # needs no tokens of its own, and the peers have the same
CUTOFF = 512


def find_conversations(given: Path | None) -> Path:
    """Return the given file, else alpaca_en_demo.json beside the checkout, else the samples."""
    if given is not None:
        return given
    return ALPACA if ALPACA.is_file() else SAMPLES


def chat_overrides(conversations: Path, tokenizer: Path, folder: Path) -> list[str]:
    """Return ``kuroshio run``'s overrides that tune the model on all of a file."""
    return [
        "stage=sft",
        f"+data.sources.chat.paths=['{conversations}']",
        "data.holdout_share=0",
        f"data.template={TEMPLATE}",
        f"data.max_length={CUTOFF}",
        f"data.store_dir='{folder / 'store'}'",
        "tokenizer=file",
        f"tokenizer.path='{tokenizer}'",
        *(f"model.architecture.{key}={value}" for key, value in ARCHITECTURE.items()),
        "loop.eval_chars=0",
        "schedule.warmup_share=0",  # as the others' default
        "loop.epochs=null",
        "loop.max_steps=1000000",
        "stage.sample_tokens=0",
    ]


def read_examples(config: Any) -> list[dict[str, list[int]]]:
    """Return the prepared conversations as ``input_ids`` and ``labels``, for other trainers."""
    from trainer.data.prepared.prepare import open_store
    from trainer.losses.cross_entropy import IGNORE_INDEX

    source = open_store(config.data, str(config.tokenizer.path)).sources["chat"]
    examples = []
    for document in source.document_ids(held_out=False).tolist():
        ids, weights = source.document(document).tolist(), source.document_weights(document)
        assert weights is not None
        labels = [i if w else IGNORE_INDEX for i, w in zip(ids, weights.tolist(), strict=True)]
        examples.append({"input_ids": ids, "labels": labels})
    return examples
