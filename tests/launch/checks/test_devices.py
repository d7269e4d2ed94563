"""GPUs, driver, ECC counters and ops, from what nvidia-smi and torch say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.checks.devices import (
    DeviceFacts,
    GpuFacts,
    judge,
    parse_driver_cuda,
    parse_gpus,
    runs_on,
)
from launch.checks.finding import Finding
from launch.checks.probe import OpFacts, TorchFacts

SMI = "NVIDIA H200, 570.86.15, 143771 MiB, 0\nTesla V100-SXM2-32GB, 418.87, 32510 MiB, [N/A]\n"
HEAD = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |"
H200 = GpuFacts("NVIDIA H200", "570.86.15", "143771 MiB", "0")
TOOLS = {"c++": "/usr/bin/c++", "ninja": "/bin/ninja", "Python.h": "/x/Python.h", "libaio.h": None}
TORCH = TorchFacts("2.13.0", "12.8", ["NVIDIA H200"], ["9.0"], ["sm_80", "sm_90"])
GPU_NODE = DeviceFacts(torch=TORCH, gpus=[H200], driver_cuda="12.8", tools=dict(TOOLS))
LOGIN = DeviceFacts(torch=TorchFacts("2.13.0+cpu"), tools=dict(TOOLS))


def worst(facts: DeviceFacts) -> Finding:
    return max(judge(facts), key=lambda f: ("ok", "warning", "error").index(f.level))


def with_op(name: str, built: bool, dead_lock: bool = False) -> DeviceFacts:
    op = OpFacts(f"/cache/{name}", built, dead_lock)
    return replace(LOGIN, torch=replace(LOGIN.torch, ops={name: op}))


def test_nvidia_smi_is_read() -> None:
    assert parse_gpus(SMI) == [
        H200,
        GpuFacts("Tesla V100-SXM2-32GB", "418.87", "32510 MiB", "[N/A]"),
    ]
    assert parse_driver_cuda(HEAD) == "12.8" and parse_driver_cuda("no head") is None


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        ("sm_80", "8.6", True),
        ("sm_86", "8.0", False),
        ("sm_80", "9.0", False),
        ("compute_80", "12.0", True),
        ("compute_90", "8.0", False),
        ("sm_90a", "9.0", True),
        ("sm_120", "12.0", True),
        ("nothing", "9.0", False),
    ],
)
def test_which_code_runs_where(code: str, capability: str, runs: bool) -> None:
    assert runs_on(code, capability) is runs


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        (GPU_NODE, "ok", ""),
        (LOGIN, "ok", ""),
        (replace(LOGIN, torch=TorchFacts(problem="libcudart.so.12")), "error", "libcudart"),
        (replace(LOGIN, expects_gpu=True), "error", "built for CUDA"),
        (replace(LOGIN, gpus=[H200]), "error", "nvidia-smi lists 1"),
        (
            replace(GPU_NODE, torch=replace(TORCH, devices=[], capabilities=[]), visible="-1"),
            "error",
            "CUDA_VISIBLE_DEVICES='-1' hides them",
        ),
        (
            replace(GPU_NODE, torch=replace(TORCH, capabilities=["7.0"])),
            "error",
            "has no code for NVIDIA H200 (7.0)",
        ),
        (replace(GPU_NODE, driver_cuda="11.4"), "error", "too old"),
        (replace(GPU_NODE, driver_cuda="12.2"), "ok", ""),  # minor versions are compatible
        (replace(GPU_NODE, gpus=[replace(H200, ecc_errors="3")]), "error", "3 on GPU 0"),
        (replace(GPU_NODE, gpus=[replace(H200, ecc_errors="[N/A]")]), "ok", ""),
        (with_op("cpu_adam", built=True), "ok", ""),
        (with_op("cpu_adam", built=False), "warning", "not built yet"),
        (with_op("cpu_adam", built=False, dead_lock=True), "warning", "rm -r /cache/cpu_adam"),
        (with_op("async_io", built=False), "error", "libaio-dev"),
    ],
)
def test_judge(facts: DeviceFacts, level: str, words: str) -> None:
    found = worst(facts)
    assert found.level == level
    assert words in f"{found.what} {found.why} {found.remedy}"
