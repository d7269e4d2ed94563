"""Results do not depend on ranks, accumulation, micro-batch, ZeRO stage or packing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plain_loop import train_plainly
from training_support import largest_difference, read_losses, read_masters, run_scenarios

Vary = Callable[..., dict[str, Any]]


def test_same_parameters_for_every_split_and_zero_stage(vary: Vary, tmp_path: Path) -> None:
    one = [
        {"config": vary(tmp_path / f"1x4_zero{stage}", engine__zero_stage=stage)}
        for stage in range(4)
    ]
    one.append({"config": vary(tmp_path / "1x8", loop__micro_batch_size=1)})
    one.append({"config": vary(tmp_path / "padded"), "explode": True})
    two = [
        {"config": vary(tmp_path / f"2x2_zero{stage}", engine__zero_stage=stage)}
        for stage in range(4)
    ]
    for num_ranks, scenarios in ((1, one), (2, two)):
        done = run_scenarios(scenarios, num_ranks, tmp_path)
        assert done.returncode == 0, done.stdout
    reference = read_masters(tmp_path / "1x4_zero0")
    for scenario in one + two:
        run_dir = Path(scenario["config"]["run_dir"])
        assert largest_difference(reference, read_masters(run_dir)) < 1e-6, run_dir.name
    losses = read_losses(tmp_path / "1x4_zero0")
    assert losses[5] < losses[1] - 0.02  # it did learn, so the comparison compares something


def test_equals_a_plain_pytorch_loop(vary: Vary, tmp_path: Path) -> None:
    """The whole engine against torch.optim.AdamW and transformers' own logits."""
    values = vary(tmp_path / "ours")
    done = run_scenarios([{"config": values}], 1, tmp_path)
    assert done.returncode == 0, done.stdout
    expected = train_plainly(values)  # float64
    assert largest_difference(expected, read_masters(tmp_path / "ours")) < 2e-6
