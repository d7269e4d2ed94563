"""What is saved beside training is the state of its step; where it is put, and what is kept."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from tiny_engine import TinyEngine, loaded_weights, save, save_steps
from training_support import run_chains

from trainer.config import LoopConfig
from trainer.engine import host_copy, shard_file
from trainer.engine.committed import find_newest
from trainer.engine.host_copy import HostCopy, free_host_bytes
from trainer.engine.manifest import list_leftovers, list_steps
from trainer.engine.rotation import folder_bytes, rotate
from trainer.engine.saver import Saved, Saver
from trainer.errors import ConfigError, StorageError
from trainer.lease import Lease


def wait_in_write(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no byte be written until the returned event is set."""
    go, write = threading.Event(), shard_file._write_all

    def write_late(file: BinaryIO, piece: memoryview) -> None:
        if threading.current_thread().name == "save":
            go.wait(30)
        write(file, piece)

    monkeypatch.setattr(shard_file, "_write_all", write_late)
    return go


@pytest.mark.parametrize("way", ["host memory", "staged"])
def test_training_goes_on_and_the_state_of_the_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    loop = LoopConfig(staging_dir=str(tmp_path / "disk") if way == "staged" else None)
    reported: list[Saved] = []
    engine, state, go = TinyEngine(), {"rows": [1]}, wait_in_write(monkeypatch)
    with Saver(engine, tmp_path / "c", loop, report=reported.append) as saver:  # type: ignore[arg-type]
        for step in (1, 2):  # the second save uses the first one's memory again
            engine.step()
            weights, moments = engine.masters(), list(engine.optimizer.state.values())
            first = {key: value.clone() for key, value in moments[0].items()}
            saver.begin(step, state)
            state["rows"].append(step + 1)
            engine.step()
            saver.poll()
            assert [saved.step for saved in reported] == list(range(1, step))
            assert not (tmp_path / f"c/step_{step:08d}").exists()
            go.set()
            saver.wait()
            go.clear()
            assert [saved.step for saved in reported] == list(range(1, step + 1))
            assert reported[-1].stall_s < reported[-1].seconds
            newest = find_newest(tmp_path / "c")
            assert newest is not None and newest.step == step
            assert newest.state["rows"] == list(range(1, step + 1))
            assert newest.state["adam_step"] == 2 * step - 1
            with safe_open(newest.path / "rank_00000.safetensors", "pt") as file:
                read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            for name, value in weights.items():
                assert torch.equal(read[f"{name}|master@0"], value.flatten())
            assert torch.equal(read["layer.weight|exp_avg@0"], first["exp_avg"].flatten())
    assert not (tmp_path / "disk").exists() or not list((tmp_path / "disk").iterdir())


def test_every_way_writes_the_same_file(tmp_path: Path) -> None:
    ways: dict[str, dict[str, Any]] = {"asynchronous": {}, "blocking": {"save_async": False}}
    ways["staged"] = {"staging_dir": str(tmp_path / "disk")}
    for name, loop in ways.items():
        save_steps(tmp_path / name, [3], **loop)
    files = [tmp_path / name / "step_00000003/rank_00000.safetensors" for name in ways]
    assert len({path.read_bytes() for path in files}) == 1


def test_a_copy_of_several_blocks_holds_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copy, "BLOCK_NUMEL", 8)
    copy = HostCopy(pinned=False)
    for sizes in ([3, 11, 2], [20, 1], [8]):
        tensors = [torch.randn(size) for size in sizes]
        copy.take((str(number), tensor) for number, tensor in enumerate(tensors))
        assert copy.layout == [(str(number), size) for number, size in enumerate(sizes)]
        assert torch.equal(torch.cat(list(copy.tensors())), torch.cat(tensors))


def test_without_memory_for_a_copy_training_waits_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.engine.host_copy.free_host_bytes", lambda: 40_000.0)
    engine = TinyEngine()
    engine.step()
    with caplog.at_level(logging.WARNING), Saver(engine, tmp_path, LoopConfig()) as saver:  # type: ignore[arg-type]
        for step in (1, 2):
            saver.begin(step, {})
            assert list_steps(tmp_path)[0].name == f"step_{step:08d}"
            assert saver._copy is None
    [record] = caplog.records
    assert "loop.save_async=true, but a copy" in record.message
    assert "loop.staging_dir" in record.message


def test_free_memory_is_that_of_the_machine_and_of_every_group_around_the_job(
    tmp_path: Path,
) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    (proc / "self/cgroup").write_text("0::/slurm/job_7/step_0\n")
    assert free_host_bytes(proc, groups) == 8_000_000 * 1024
    for name, limit, used in (("slurm/job_7/step_0", "max", 5), ("slurm/job_7", "3000000", 500)):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(f"{limit}\n")
        (groups / name / "memory.current").write_text(f"{used}\n")
        (groups / name / "memory.stat").write_text("anon 400\ninactive_file 100\n")
    assert free_host_bytes(proc, groups) == 3_000_000 - 500 + 100
    (proc / "self/cgroup").write_text("4:memory:/slurm/job_8\n3:cpu:/slurm\n")
    (groups / "memory/slurm/job_8").mkdir(parents=True)
    (groups / "memory/slurm/job_8/memory.limit_in_bytes").write_text("2000000")
    (groups / "memory/slurm/job_8/memory.usage_in_bytes").write_text("1000")
    (groups / "memory/slurm/job_8/memory.stat").write_text("total_inactive_file 10\n")
    assert free_host_bytes(proc, groups) == 2_000_000 - 1000 + 10


@pytest.mark.parametrize(
    ("keep_gb", "kept"),
    [
        (None, [16, 14, 12, 10, 8, 6, 4, 2]),
        (9, [16, 14, 12, 10, 8, 6, 4, 2]),
        (8, [16, 14, 12, 10, 8, 6, 4]),  # a milestone stays longer than an older plain one
        (5, [16, 12, 8, 4]),  # plain ones go first
        (4, [16, 12, 8]),  # then the oldest milestone
        (2, [16]),
        (0.1, [16]),  # never the newest
    ],
)
def test_a_budget_deletes_what_is_beyond_it(
    tmp_path: Path, keep_gb: float | None, kept: list[int]
) -> None:
    for step in range(2, 17, 2):
        path = tmp_path / f"step_{step:08d}"
        path.mkdir()
        with (path / "rank_00000.safetensors").open("wb") as file:
            file.truncate(10**9)  # a hole
    rotate(tmp_path, 16, LoopConfig(keep_last=9, keep_every=4, keep_gb=keep_gb))
    wanted = {f"step_{step:08d}" for step in kept}
    assert {path.name for path in tmp_path.iterdir()} == wanted, kept


def test_checkpoints_stay_within_their_budget_while_the_next_is_written(tmp_path: Path) -> None:
    save_steps(tmp_path / "one", [1])
    budget = 3.5 * folder_bytes(tmp_path / "one/step_00000001")
    engine = TinyEngine()
    engine.step()
    for step in range(1, 7):
        before = sum(map(folder_bytes, list_steps(tmp_path / "c")))
        assert before + budget / 3.5 <= budget
        save(engine, tmp_path / "c", step, keep_last=9, keep_gb=budget / 1e9)
    assert [path.name[-1] for path in list_steps(tmp_path / "c")] == ["6", "5"]


def test_a_budget_without_place_for_two_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Saver(TinyEngine(30_000_000), tmp_path, LoopConfig(keep_gb=0.5))  # type: ignore[arg-type]
    assert str(error.value) == (
        "loop.keep_gb=0.5 cannot hold two checkpoints of 0.36 GB each (12 bytes per trained "
        "parameter), but the last one is deleted only when the next is there; use "
        "loop.keep_gb=0.74 or more, train fewer parameters (peft=lora), or leave it null"
    )


def test_what_a_killed_life_staged_is_deleted_by_the_next(tmp_path: Path) -> None:
    folder, disk = tmp_path / "run/checkpoints", tmp_path / "disk"
    folder.mkdir(parents=True)
    leases = [Lease.take(tmp_path / "run", n, {"job": None, "restart": 0}, "now") for n in (1, 2)]
    loop = LoopConfig(staging_dir=str(disk))
    Saver(TinyEngine(), folder, loop, leases[0])._staging.shard.write_text("half")  # type: ignore
    [stale] = disk.glob("kuroshio_*/life_1/rank_00000.safetensors")
    save(TinyEngine(), tmp_path / "other/checkpoints", 1, staging_dir=str(disk))
    assert stale.exists()  # another run's
    with Saver(TinyEngine(), folder, loop, leases[1]) as saver:  # type: ignore[arg-type]
        assert not stale.parent.exists()
        saver.begin(1, {})
    assert list(disk.iterdir()) == []
    assert [path.name for path in list_steps(folder)] == ["step_00000001"]


def test_a_staged_file_that_changed_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_damaged(source: Path, target: Path) -> dict[str, Any]:
        data = bytearray(source.read_bytes())
        data[-5] ^= 1
        source.write_bytes(data)
        return shard_file.copy_durably(source, target)

    monkeypatch.setattr("trainer.engine.saver.copy_durably", copy_damaged)
    engine = TinyEngine()
    engine.step()
    loop = LoopConfig(staging_dir=str(tmp_path / "disk"))
    with (
        pytest.raises(StorageError, match="staged file is not what was written there"),
        Saver(engine, tmp_path / "c", loop) as saver,  # type: ignore[arg-type]
    ):
        saver.begin(1, {})
        saver.wait()
    assert list_steps(tmp_path / "c") == [] and list_leftovers(tmp_path / "c") == []


def test_a_staging_folder_that_cannot_be_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_DISK", raising=False)
    with pytest.raises(ConfigError, match=r"loop.staging_dir=\$NO_SUCH_DISK/x names a variable"):
        Saver(TinyEngine(), tmp_path, LoopConfig(staging_dir="$NO_SUCH_DISK/x"))  # type: ignore
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"loop.staging_dir=.*file cannot be written"):
        Saver(TinyEngine(), tmp_path, LoopConfig(staging_dir=str(tmp_path / "file")))  # type: ignore


def test_an_error_of_training_commits_what_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, go = TinyEngine(), wait_in_write(monkeypatch)
    engine.step()
    threading.Timer(0.3, go.set).start()
    with (
        pytest.raises(RuntimeError, match="of training"),
        Saver(engine, tmp_path, LoopConfig()) as saver,  # type: ignore[arg-type]
    ):
        saver.begin(1, {})
        raise RuntimeError("an error of training")
    step, loaded = loaded_weights(tmp_path)
    assert step == 1 and torch.equal(loaded["layer.bias"], engine.masters()["layer.bias"])


def test_a_life_that_fails_does_not_wait_for_ranks_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.engine.pending_save.LEAVE_S", 0.2)
    engine = TinyEngine(world_size=2)
    engine.step()
    with (
        pytest.raises(RuntimeError, match="rank 1 is gone"),
        Saver(engine, tmp_path, LoopConfig()) as saver,  # type: ignore[arg-type]
    ):
        saver.begin(1, {})
        raise RuntimeError("rank 1 is gone")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_lora_saves_its_adapter_alone(
    vary_dpo: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    chains = []
    for mode in ("full", "lora"):
        config = vary_dpo(tmp_path / mode, loop__max_steps=1)
        config["peft"] = {"mode": mode} | ({"rank": 4} if mode == "lora" else {})
        chains.append([{"num_ranks": 1, "scenarios": [{"config": config}], "code": 0}])
    assert run_chains(chains, tmp_path) == []
    folders = [tmp_path / mode / "checkpoints/step_00000001" for mode in ("full", "lora")]
    full, lora = (json.loads((path / "manifest.json").read_text()) for path in folders)
    numels = [
        sum(torch.Size(shape).numel() for shape in manifest["parameters"].values())
        for manifest in (full, lora)
    ]
    assert all("lora_" in name for name in lora["parameters"])
    for manifest, numel in zip((full, lora), numels, strict=True):
        num_bytes = manifest["files"]["rank_00000.safetensors"]["bytes"]
        assert 12 * numel < num_bytes < 12 * numel + 600 * len(manifest["parameters"])
    assert folder_bytes(folders[1]) < 0.2 * folder_bytes(folders[0])
