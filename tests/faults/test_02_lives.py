"""Runs whose saves are killed, cut off by the end of a job, or damaged, and their next lives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from training_support import largest_difference, read_losses, read_masters, run_chains

from trainer.engine.committed import find_newest
from trainer.engine.manifest import list_leftovers

pytestmark = pytest.mark.slow
Vary = Callable[..., dict[str, Any]]
CHANGES: dict[str, Any] = {
    "loop__save_every": 2,
    "loop__max_steps": 6,
    "engine__zero_stage": 2,
}
NUM_KILLS = 6


def life(config: dict[str, Any], code: int = 0, **twist: Any) -> dict[str, Any]:
    return {"num_ranks": 2, "scenarios": [{"config": config, **twist}], "code": code}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(base_config: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Return the folders of an unbroken run, of runs killed in a save, and of one cut off."""
    from training_fixtures import varying

    vary, random, chains = varying(base_config), Random(5), []
    names = ["unbroken", *(f"killed_{n}" for n in range(NUM_KILLS)), "cut"]
    for name in names:
        ways: list[dict[str, Any]] = [{}, {"loop__save_async": False}]
        ways.append({"loop__staging_dir": str(folder / "disk")})
        way = ways[int(name[7:]) % 3] if "_" in name else {}
        config = vary(folder / name, **CHANGES, **way)
        twists: dict[str, Any] = {}
        if name != "unbroken":
            twists["kill_at_byte"] = {
                "step": 4, "rank": random.randrange(2), "at": random.randrange(300_000),
            }  # fmt: skip
        if name == "cut":
            twists["signal_at"], twists["kill_at_byte"]["step"] = 2, 3
        chains.append([*([life(config, -9, **twists)] if twists else []), life(config)])
    assert run_chains(chains, folder) == []
    return {name: folder / name for name in names}


@pytest.mark.faults(row=2)
@pytest.mark.parametrize("number", range(NUM_KILLS))
def test_a_run_killed_in_a_save_ends_like_an_unbroken_one(
    runs: dict[str, Path], folder: Path, number: int
) -> None:
    killed, unbroken = runs[f"killed_{number}"], runs["unbroken"]
    log = (folder / f"chains_0/chain_{number + 1}_life_1.0.log").read_text()
    assert "the save of step 4 was cut off (begun " in log
    assert largest_difference(read_masters(killed), read_masters(unbroken)) == 0.0
    assert read_losses(killed) == read_losses(unbroken)
    assert list_leftovers(killed / "checkpoints") == []
    assert sorted(path.name[-1] for path in (killed / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert not (folder / "disk").exists() or not list((folder / "disk").iterdir())


@pytest.mark.faults(row=7)
def test_a_save_longer_than_the_grace_time_is_ignored_and_said(
    runs: dict[str, Path], folder: Path
) -> None:
    log = (folder / f"chains_0/chain_{NUM_KILLS + 1}_life_1.0.log").read_text()
    assert "the save of step 3 was cut off: begun " in log
    assert "because of SIGUSR1" in log and "the grace time was too short" in log
    assert read_losses(runs["cut"]) == read_losses(runs["unbroken"])
    assert list_leftovers(runs["cut"] / "checkpoints") == []


@pytest.mark.faults(row=3)
def test_a_run_walks_back_over_a_damaged_checkpoint_or_refuses_to(
    base_config: dict[str, Any], runs: dict[str, Path], folder: Path
) -> None:
    from training_fixtures import varying

    chains = []
    for name, code in (("walk_back", 0), ("refuse", 66)):
        shutil.copytree(runs["unbroken"], folder / name)
        shard = folder / name / "checkpoints/step_00000006/rank_00001.safetensors"
        data = bytearray(shard.read_bytes())
        data[Random(name).randrange(len(data))] ^= 1 << Random(name).randrange(8)
        shard.write_bytes(data)
        changes = CHANGES | {"loop__damaged": name}
        chains.append([life(varying(base_config)(folder / name, **changes), code)])
    assert run_chains(chains, folder) == []
    log = (folder / "chains_1/chain_0_life_0.1.log").read_text()
    assert "step_00000006 is damaged (rank_00001.safetensors does not match" in log
    assert read_losses(folder / "walk_back") == read_losses(runs["unbroken"])
    masters = read_masters(folder / "walk_back")
    assert largest_difference(masters, read_masters(runs["unbroken"])) == 0.0
    assert find_newest(folder / "refuse/checkpoints").step == 4  # type: ignore[union-attr]
