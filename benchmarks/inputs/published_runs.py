"""Published training throughputs beside what ``trainer.plan`` says of the same runs. No torch.

The CSV names a source for every row. A row has a stated efficiency where its note prints MFU, or
model TFLOP/s and tokens/s for the same run. Its FLOPs are counted here as its authors count them
(llm-foundry: 6 N and all of T x T attention), so the comparison asks: given the share of the peak
that a system says it reached, do our sizes, FLOPs and peaks give its tokens per second?
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.plan.flops import ModelShape, peak_flops_per_s
from trainer.plan.memory import Model
from trainer.plan.parameters import Tuning
from trainer.plan.speed import ADAPTER_FACTOR, Pass, compute_seconds, find_efficiency, pass_flops

Row = dict[str, str]
_MFU = re.compile(r"MFU ([\d.]+)%")
_MODEL_TFLOPS = re.compile(r"([\d.]+) model TFLOP/s")
_BATCH = re.compile(r"s per (\d+) x (\d+) tokens")
TOKENS = ("tokens_per_s_per_gpu", "lora_tokens_per_s_per_gpu")

# Sizes that the CSV does not give, from the models' own configurations: hidden size, MLP width,
# layers, heads, key-value heads, matrices of the MLP, vocabulary, whether embeddings are tied.
_MPT = {
    "MPT-350m": (1024, 4096, 24, 16),
    "MPT-1b": (2048, 8192, 24, 16),
    "MPT-3b": (2560, 10240, 32, 20),
    "MPT-7b": (4096, 16384, 32, 32),
    "MPT-13b": (5120, 20480, 40, 40),
    "MPT-30b": (7168, 28672, 48, 56),
    "MPT-70b": (8192, 32768, 80, 64),
}
_LLAMA: dict[str, tuple[int, int, int, int, int]] = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32),
    "Llama-2-70B": (8192, 28672, 80, 64, 8),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8),
    "Llama-like 7B": (4096, 11008, 32, 32, 32),
    "OLMo2-1B": (2048, 8192, 16, 16, 16),
    "OLMo2-7B": (4096, 11008, 32, 32, 32),
    "OLMo2-13B": (5120, 13824, 40, 40, 40),
    "TAIDE-LX-7B": (4096, 11008, 32, 32, 32),
    "GPT-1.3B": (2048, 8192, 24, 16, 16),
    "Qwen-1.8B full": (2048, 5504, 24, 16, 16),
    "Qwen-7B LoRA": (4096, 11008, 32, 32, 32),
    "Qwen-14B LoRA": (5120, 13696, 40, 40, 40),
}


@dataclass(frozen=True)
class Comparison:
    """A published run and what is planned of it.

    Attributes:
        efficiency: share of the peak that was used.
        published, planned: tokens a second and GPU.
    """

    system: str
    model: str
    gpu: str
    num_gpus: str
    length: int
    efficiency: float
    published: float
    planned: float

    @property
    def error(self) -> float:
        """Return planned over published, less one."""
        return self.planned / self.published - 1


def read_rows(path: Path) -> list[Row]:
    """Return the rows of the CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def architecture(row: Row) -> dict[str, Any] | None:
    """Return a row's model as transformers would describe it; None where sizes are not known."""
    name = row["model"].split(" (")[0]
    common: dict[str, Any] = {}
    if name in _MPT:
        hidden, width, layers, heads = _MPT[name]
        sizes = (hidden, width, layers, heads, heads)
        common = {"model_type": "mpt", "tie_word_embeddings": True}
    elif name in _LLAMA:
        sizes = _LLAMA[name]
        is_gpt = name.startswith("GPT")  # two matrices in the MLP, tied embeddings
        kind = "starcoder2" if is_gpt else "llama"
        common = {"model_type": kind, "tie_word_embeddings": is_gpt}
    else:
        return None
    common["vocab_size"] = int(row["vocab"])
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return common | dict(zip((*names, "num_key_value_heads"), sizes, strict=True))


def stated(rows: list[Row]) -> Iterator[Comparison]:
    """Yield the runs whose systems print the share of the peak beside their tokens per second."""
    for row in rows:
        config, share = architecture(row), _stated_share(row)
        if config is None or share is None or not _rate(row) or "fp8" in row["precision"]:
            continue
        shape, length = ModelShape.from_config(config), int(row["seq"])
        attention = 12 * shape.num_hidden_layers * shape.attention_width * length
        rate = (_peak(row) or 0.0) * share / (6 * shape.num_params + attention)
        yield _compare(row, share, rate)


def _stated_share(row: Row) -> float | None:
    if found := _MFU.search(row["note"]):
        return float(found[1]) / 100
    found = _MODEL_TFLOPS.search(row["note"])
    peak = _peak(row)
    return float(found[1]) * 1e12 / peak if found and peak else None


def assumed(rows: list[Row]) -> Iterator[Comparison]:
    """Yield runs in bf16 or fp16 with the efficiency that plan itself assumes of their GPU."""
    for row in rows:
        config, efficiency = architecture(row), find_efficiency(row["gpu"])
        if config is None or efficiency is None or "fp8" in row["precision"] or not _rate(row):
            continue
        if re.search(r"TP[2-9]", row["parallelism"]):  # splits single layers, as ours never are
            continue
        lora = "LoRA" in row["model"]
        model = Model("policy", config, Tuning("lora", rank=64) if lora else Tuning())
        again = bool(
            re.search(r"act\. checkpoint True|full AC|activation checkpoint", row["parallelism"])
        )
        flops = pass_flops(Pass(model, 1.0, int(row["seq"]), trains=True), recomputes=again)
        seconds = compute_seconds(flops, row["gpu"], _precision(row), efficiency.share, 1)
        if seconds:
            seconds *= ADAPTER_FACTOR if lora else 1.0
            yield _compare(row, efficiency.share, 1 / seconds)


def _compare(row: Row, share: float, planned: float) -> Comparison:
    return Comparison(
        row["system"],
        row["model"],
        row["gpu"],
        row["num_gpus"],
        int(row["seq"]),
        share,
        _rate(row),
        planned,
    )


def _rate(row: Row) -> float:
    """Return a row's tokens a second and GPU, 0 where it says none."""
    if row["metric"] in TOKENS:
        return float(row["value"])
    if row["metric"] != "step_seconds":
        return 0.0
    batch = _BATCH.search(row["unit"])
    if batch:
        return int(batch[1]) * int(batch[2]) / float(row["value"]) / int(row["num_gpus"])
    printed = re.search(r"(\d+) tokens/s/GPU", row["note"])
    return float(printed[1]) if printed else 0.0


def _precision(row: Row) -> str:
    return "fp16" if "fp16" in row["precision"] else "bf16"


def _peak(row: Row) -> float | None:
    return peak_flops_per_s(row["gpu"], _precision(row))


def summarise(found: list[Comparison]) -> dict[str, float]:
    """Return how many there are, the median error's size, the largest, the share within 20 %."""
    errors = [abs(one.error) for one in found]
    return {
        "runs": len(found),
        "median": statistics.median(errors),
        "largest": max(errors),
        "within_20_percent": sum(error <= 0.2 for error in errors) / len(errors),
    }
