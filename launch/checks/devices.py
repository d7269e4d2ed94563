"""GPUs, driver, CUDA, compilers and DeepSpeed's ops."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launch.checks.command import ask
from launch.checks.finding import Finding, error, ok, warning
from launch.checks.probe import OpFacts, TorchFacts, ask_torch
from trainer.config import EngineConfig

TOPIC = "environment"
QUERY = "name,driver_version,memory.total,ecc.errors.uncorrected.volatile.total"
NEEDS = {  # op -> what torch compiles it with
    "cpu_adam": ("c++", "ninja", "Python.h"),
    "async_io": ("c++", "ninja", "Python.h", "libaio.h"),
}
PACKAGE = {
    "c++": "g++ (apt-get install g++, or module load gcc)",
    "ninja": "ninja (pip install ninja)",
    "Python.h": "Python's headers (apt-get install python3-dev)",
    "libaio.h": "libaio (apt-get install libaio-dev)",
}


@dataclass(frozen=True)
class GpuFacts:
    """One GPU, as nvidia-smi describes it."""

    name: str
    driver: str
    memory: str
    ecc_errors: str  # uncorrected since the driver was loaded; "[N/A]" where it does not count


@dataclass(frozen=True)
class DeviceFacts:
    """What computes here, and what compiles for it.

    Attributes:
        gpus: of nvidia-smi; empty without it.
        driver_cuda: newest CUDA that the driver runs; None without nvidia-smi.
        visible: CUDA_VISIBLE_DEVICES; None when it is not set.
        torch: what torch sees.
        tools: path of every tool and header an op may need; None where it is missing.
        expects_gpu: whether this machine should have one: inside a job of a profile with GPUs.
    """

    torch: TorchFacts
    gpus: list[GpuFacts] = field(default_factory=list)
    driver_cuda: str | None = None
    visible: str | None = None
    tools: dict[str, str | None] = field(default_factory=dict)
    expects_gpu: bool = False


def gather(engine: EngineConfig, expects_gpu: bool) -> DeviceFacts:
    """Ask nvidia-smi, torch (in a process of its own) and the file system."""
    listed = ask(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"])
    return DeviceFacts(
        torch=ask_torch(engine),
        gpus=parse_gpus(listed.text) if listed.is_good else [],
        driver_cuda=parse_driver_cuda(ask(["nvidia-smi"]).text) if listed.is_good else None,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        tools=find_tools(os.environ),
        expects_gpu=expects_gpu,
    )


def parse_gpus(text: str) -> list[GpuFacts]:
    """Read the lines of ``nvidia-smi --query-gpu``."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [GpuFacts(row[0], row[1], row[2], row[3]) for row in rows if len(row) == 4]


def parse_driver_cuda(text: str) -> str | None:
    """Read the newest CUDA that the driver runs from nvidia-smi's head line."""
    found = re.search(r"CUDA Version:\s*([0-9.]+)", text)
    return found[1] if found else None


def find_tools(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Return where the compiler, ninja and the headers are; ninja may sit beside this Python."""
    scripts = str(Path(sys.executable).parent)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    folders = [*environ.get("CPATH", "").split(os.pathsep), "/usr/include", "/usr/local/include"]
    aio = [Path(folder) / "libaio.h" for folder in folders if folder]
    return {
        "c++": shutil.which(environ.get("CXX") or "c++") or shutil.which("g++"),
        "ninja": shutil.which("ninja") or shutil.which("ninja", path=scripts),
        "nvcc": shutil.which("nvcc"),
        "Python.h": str(header) if header.is_file() else None,
        "libaio.h": next((str(path) for path in aio if path.is_file()), None),
    }


def judge(facts: DeviceFacts) -> list[Finding]:
    """Judge torch, GPUs, driver, ECC counters and ops."""
    if facts.torch.problem:
        why = f"every rank would end with it: {facts.torch.problem}"
        remedy = "make install anew, or load the modules that the environment was made with"
        return [error(TOPIC, "torch cannot be imported", why, remedy)]
    return [
        *_judge_gpus(facts),
        *_judge_code(facts.torch),
        *_judge_driver(facts),
        *_judge_ecc(facts),
        *_judge_ops(facts),
    ]


def _judge_gpus(facts: DeviceFacts) -> list[Finding]:
    seen = facts.torch.devices
    built = f"for CUDA {facts.torch.cuda}" if facts.torch.cuda else "for CPU"
    what = f"torch {facts.torch.version} {built}, {len(seen)} GPUs visible"
    if seen:
        counts = {name: seen.count(name) for name in dict.fromkeys(seen)}
        return [ok(TOPIC, f"{what}: {', '.join(f'{n} x {name}' for name, n in counts.items())}")]
    if not facts.gpus and not facts.expects_gpu:
        return [ok(TOPIC, f"{what} (a login node has none)")]
    there = f"nvidia-smi lists {len(facts.gpus)}" if facts.gpus else "nvidia-smi lists none either"
    if facts.torch.cuda is None:
        remedy = "install a torch built for CUDA: pip install torch without the CPU index"
    elif facts.visible is not None and not facts.visible.strip("-1 "):
        remedy = f"CUDA_VISIBLE_DEVICES={facts.visible!r} hides them: unset it"
    else:
        remedy = "ask Slurm for GPUs (cluster.site.gres), then look at nvidia-smi on the node"
    return [error(TOPIC, what, f"{there}; the run would compute on the CPU", remedy)]


def _judge_code(torch: TorchFacts) -> list[Finding]:
    """Find GPUs too old for this build of torch, such as V100 for those of newer CUDA."""
    pairs = zip(torch.devices, torch.capabilities, strict=True)
    lacking = dict.fromkeys(
        f"{name} ({capability})"
        for name, capability in pairs
        if not any(runs_on(code, capability) for code in torch.architectures)
    )
    if not lacking:
        return []
    what = f"torch {torch.version} has no code for {', '.join(lacking)}"
    why = f"its first operation there fails; it has {', '.join(torch.architectures) or 'none'}"
    remedy = "install a build of torch for an older CUDA, whose list has that architecture"
    return [error(TOPIC, what, why, remedy)]


def runs_on(code: str, capability: str) -> bool:
    """Return whether ``code`` runs on a GPU of ``capability``.

    Machine code (sm_80) runs within its major version from its minor one on, PTX (compute_80) on
    everything newer (NVIDIA, CUDA C++ Programming Guide, "Binary Compatibility").
    """
    kind, _, number = code.partition("_")
    digits = re.match(r"\d+", number)
    if digits is None:
        return False
    major, minor = divmod(int(digits[0]), 10)
    there = tuple(int(part) for part in capability.split("."))
    if kind == "compute":
        return (major, minor) <= there
    return there[0] == major and there[1] >= minor


def _judge_driver(facts: DeviceFacts) -> list[Finding]:
    if not facts.gpus:
        return []
    drivers = sorted({gpu.driver for gpu in facts.gpus})
    what = f"driver {', '.join(drivers)} runs CUDA up to {facts.driver_cuda or 'an unknown one'}"
    needs, runs = facts.torch.cuda, facts.driver_cuda
    # Within a major version an older driver runs newer CUDA ("minor version compatibility").
    if needs and runs and int(needs.split(".")[0]) > int(runs.split(".")[0]):
        why = f"torch is built for CUDA {needs}, which this driver is too old for"
        remedy = f"install a torch built for CUDA {runs.split('.')[0]}, or ask for a newer driver"
        return [error(TOPIC, what, why, remedy)]
    return [ok(TOPIC, what)]


def _judge_ecc(facts: DeviceFacts) -> list[Finding]:
    bad = {i: g.ecc_errors for i, g in enumerate(facts.gpus) if g.ecc_errors.strip("0[]NA/ ")}
    if not bad:
        return []
    counts = ", ".join(f"{count} on GPU {index}" for index, count in bad.items())
    why = "a GPU with such errors ends its process, or computes with wrong numbers"
    remedy = "report the node to the site, and exclude it until it is mended"
    return [error(TOPIC, f"uncorrected memory errors: {counts}", why, remedy)]


def _judge_ops(facts: DeviceFacts) -> list[Finding]:
    if not facts.torch.ops:
        return [ok(TOPIC, "no offload in this config: none of DeepSpeed's C++ ops is needed")]
    return [_judge_op(op, built, facts.tools) for op, built in facts.torch.ops.items()]


def _judge_op(op: str, built: OpFacts, tools: Mapping[str, str | None]) -> Finding:
    if built.has_dead_lock:
        why = "a build was killed; the next run removes its lock and builds again, for minutes"
        remedy = f"rm -r {built.folder}"
        return warning(TOPIC, f"DeepSpeed's {op} was left half built", why, remedy)
    if built.is_built:
        return ok(TOPIC, f"DeepSpeed's {op} is built in {built.folder}")
    missing = [PACKAGE[tool] for tool in NEEDS[op] if not tools.get(tool)]
    if missing:
        why = f"offload needs it, and it cannot be compiled here without {', '.join(missing)}"
        remedy = "install that, or use an engine without offload (engine=zero3)"
        return error(TOPIC, f"DeepSpeed's {op} is not built", why, remedy)
    why = "the first run compiles it for minutes while its GPUs wait"
    remedy = f"TORCH_EXTENSIONS_DIR=FOLDER_OF_ALL_NODES python tests/build_ops.py {op}"
    return warning(TOPIC, f"DeepSpeed's {op} is not built yet", why, remedy)
