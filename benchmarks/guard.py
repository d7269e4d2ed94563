"""What the guards cost: sums over the weights, and the look before each step.

    python benchmarks/guard.py                       # CPU or GPU, one rank's share of the work
    python benchmarks/guard.py --megabytes 4000 --turns 20

digest  the sum of the bits of all weights, as ``guard.compare_every`` takes it, in GB/s and as the
        time that a model of 7e9 parameters in bf16 would need
judge   measuring and judging one step with 8 micro-batches and a history of 128 steps, which is
        what a step waits for with ``guard.non_finite=skip`` and ``guard.spikes=skip``

The sums of all ranks are 8 bytes a tensor, sent once. Medians; one line of JSON at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from trainer.config import GuardConfig
from trainer.engine.replicas import digest
from trainer.numerics import NumericsGuard

NUM_TENSORS = 32
SEVEN_BILLION_GB = 14.0  # in bf16
MICRO_BATCHES = 8


def median_seconds(work: Callable[[], object], device: torch.device, turns: int) -> float:
    """Return the median time of ``work``, the device's included."""
    taken = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first one starts kernels and threads


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--megabytes", type=int, default=1000, help="of weights (%(default)s)")
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, float | str] = {"device": str(device), "megabytes": options.megabytes}
    for dtype in (torch.bfloat16, torch.float32):
        numel = options.megabytes * 10**6 // NUM_TENSORS // dtype.itemsize
        weights = [torch.randn(numel, device=device, dtype=dtype) for _ in range(NUM_TENSORS)]
        seconds = median_seconds(
            lambda: torch.stack([digest(one) for one in weights]).tolist(),  # noqa: B023
            device,
            options.turns,
        )
        name, speed = str(dtype).removeprefix("torch."), options.megabytes / 1e3 / seconds
        found |= {f"{name}_gb_per_s": round(speed, 2)}
        print(f"digest {name}: {speed:.1f} GB/s")
        if dtype == torch.bfloat16:
            found["seconds_7b_bf16"] = round(SEVEN_BILLION_GB / speed, 4)
            print(f"        7e9 parameters: {SEVEN_BILLION_GB / speed:.3f} s")
    found["judge_ms"] = round(1e3 * time_judge(device, options.turns), 3)
    print(f"judge: {found['judge_ms']} ms a step")
    print(json.dumps(found))


def time_judge(device: torch.device, turns: int) -> float:
    """Return the seconds that a step waits for its judgement."""
    guard = NumericsGuard(GuardConfig(non_finite="skip", spikes="skip"))
    ids, loss, norm = torch.arange(4), torch.ones((), device=device), torch.ones((), device=device)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            guard.watch(0, ids, loss)
        assert guard.judge is not None and guard.judge(norm)
        guard.end_step(norm, False)

    for _ in range(GuardConfig().spike_window):
        step()
    return median_seconds(step, device, 20 * turns)


if __name__ == "__main__":
    main()
