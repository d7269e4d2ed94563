"""Questions that need torch or a tokenizer: ``python -m launch.checks.probe torch|store``.

A process of its own, so that `kuroshio doctor` never loads them, and survives when they crash.
The answer is JSON on the last line of standard output.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.checks.command import ask
from launch.prepare import tokenizer_path
from trainer.config import EngineConfig, load_config
from trainer.errors import KuroshioError

TIMEOUT_S = 300.0  # importing torch from a cold parallel file system takes minutes


@dataclass(frozen=True)
class OpFacts:
    """One of DeepSpeed's ops: where torch builds it, and how far that is."""

    folder: str
    is_built: bool
    has_dead_lock: bool


@dataclass(frozen=True)
class TorchFacts:
    """What torch says of itself and of the devices."""

    version: str = ""
    cuda: str | None = None  # the CUDA it was built for
    devices: list[str] = field(default_factory=list)
    capabilities: list[str] = field(default_factory=list)  # of each device, such as "7.0"
    architectures: list[str] = field(default_factory=list)  # it has code for: sm_80, compute_90
    backends: list[str] = field(default_factory=list)
    ops: dict[str, OpFacts] = field(default_factory=dict)  # those that the engine group needs
    problem: str = ""  # why it cannot be imported


@dataclass(frozen=True)
class StoreFacts:
    """Which of a config's sources are prepared."""

    present: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problem: str = ""


def ask_torch(engine: EngineConfig) -> TorchFacts:
    """Ask torch, in a process of its own, also for the ops that ``engine`` needs."""
    values, problem = _ask("torch", json.dumps(dataclasses.asdict(engine)))
    if problem:
        return TorchFacts(problem=problem)
    ops = {name: OpFacts(**facts) for name, facts in values.pop("ops").items()}
    return TorchFacts(**values, ops=ops)


def ask_store(values: dict[str, Any]) -> StoreFacts:
    """Ask which sources of the run that ``values`` describe are prepared."""
    found, problem = _ask("store", json.dumps(values))
    return StoreFacts(problem=problem) if problem else StoreFacts(**found)


def _ask(what: str, stdin: str) -> tuple[dict[str, Any], str]:
    answer = ask([sys.executable, "-m", "launch.checks.probe", what], stdin, TIMEOUT_S)
    lines = answer.text.strip().splitlines()
    if answer.is_good and lines:
        return json.loads(lines[-1]), ""
    complaint = answer.complaint.splitlines()
    return {}, complaint[-1] if complaint else f"the process ended with {answer.code}"


def describe_torch(engine: EngineConfig) -> dict[str, Any]:
    """Return the fields of ``TorchFacts``; imports torch."""
    import torch
    from torch import distributed

    from trainer.engine import ops

    needed = ops.needed_ops(engine)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(count)],
        "capabilities": [_capability(torch.cuda.get_device_capability(i)) for i in range(count)],
        "architectures": torch.cuda.get_arch_list(),
        "backends": [name for name, is_there in available.items() if is_there],
        "ops": {op: _describe_op(ops.build_folder(op), ops.is_stale) for op in needed},
    }


def _capability(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def _describe_op(folder: Path, is_stale: Any) -> dict[str, Any]:
    built = any(folder.glob("*.so"))
    return {"folder": str(folder), "is_built": built, "has_dead_lock": is_stale(folder)}


def describe_store(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ``StoreFacts``; loads the tokenizer and hashes new files."""
    from trainer.data.prepared.prepare import plan_sources
    from trainer.data.prepared.store import MANIFEST

    config = load_config(values)
    try:
        plans = plan_sources(config.data, tokenizer_path(config))
    except KuroshioError as error:
        return {"problem": str(error)}
    found = {plan.name: (plan.folder / MANIFEST).exists() for plan in plans}
    return {
        "present": [name for name, is_there in found.items() if is_there],
        "missing": [name for name, is_there in found.items() if not is_there],
    }


def main(arguments: Sequence[str]) -> None:
    """Answer the question that ``arguments`` name."""
    (what,) = arguments
    given = json.load(sys.stdin)
    facts = describe_torch(EngineConfig(**given)) if what == "torch" else describe_store(given)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
