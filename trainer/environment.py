"""What a run ran on, for its report."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from pathlib import Path
from typing import Any

import torch


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return host, device and versions."""
    packages = ("torch", "deepspeed", "transformers")
    return {
        "host": socket.gethostname(),
        "device": str(device),
        "device_name": name_device(device),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def name_device(device: torch.device) -> str:
    """Return the GPU's or the CPU's model name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
