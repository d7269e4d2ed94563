"""``--multirun``: combinations, names, order, results, and the limit of an array."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from run_folders import fake_commands

from launch import run, sweep
from trainer.config import ClusterConfig, PartitionConfig, SiteConfig
from trainer.errors import EXIT_RESUME, ConfigError, DataError

WORDS = ["stage=pretrain", "data=samples", "tokenizer.path=samples/en.jsonl"]
SWEPT = ["--multirun", *WORDS, "optim.lr=1e-4,3e-4", "loop.seed=range(0,2)"]


def test_every_combination_is_a_run_of_its_own(tmp_path: Path) -> None:
    tasks = sweep.build_tasks([*SWEPT[1:], f"run_dir={tmp_path}"])
    assert [(task.values["optim"]["lr"], task.values["loop"]["seed"]) for task in tasks] == [
        (1e-4, 0),
        (1e-4, 1),
        (3e-4, 0),
        (3e-4, 1),
    ]
    assert tasks[1].folder == tmp_path / "lr=0.0001+seed=1"
    assert tasks[1].values["run_dir"] == str(tasks[1].folder)
    assert tasks[1].values["name"] == "pretrain-tiny+lr=0.0001+seed=1"


def test_names_have_a_place_in_job_scripts_and_stay_apart() -> None:
    assert sweep.task_name({"engine": "zero2", "a.lr": "1", "b.lr": "2"}) == (
        "engine=zero2+a.lr=1+b.lr=2"
    )
    names = [sweep.task_name({"stage.prompts": f"[{text}]"}) for text in ("春", "夏")]
    assert len(set(names)) == 2 and all(name.startswith("prompts=_-") for name in names)
    assert len(sweep.task_name({"x": "y" * 300})) < 100


def test_problems_of_all_runs_are_found_before_the_first() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep.build_tasks([*WORDS, "loop.micro_batch_size=0,1", "optim.lr=-1,2"])
    text = str(caught.value)
    assert "loop.micro_batch_size=0 optim.lr=-1: loop.micro_batch_size=0: expected 1" in text
    assert "loop.micro_batch_size=1 optim.lr=-1: optim.lr=-1" in text
    assert len(text.splitlines()) == 4
    with pytest.raises(ConfigError, match="no key has several values; write KEY=A,B"):
        sweep.build_tasks(WORDS)
    with pytest.raises(ConfigError, match="--multirun starts one run for each"):
        sweep.compose_values([*WORDS, "optim.lr=1,2"])


def test_runs_follow_one_another_and_end_with_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(values: dict[str, Any]) -> int:
        lr, place = values["optim"]["lr"], Path(values["run_dir"])
        place.mkdir(parents=True)
        if values["loop"]["seed"] == 1 and lr == 1e-4:
            raise DataError("no text")
        sources = {"en": {"loss": lr * 10}}
        records = [
            {"split": "train", "step": 7, "time": 1.0, "loss": lr},
            {"split": "eval", "step": 7, "time": 2.0, "sources": sources},
        ]
        lines = [json.dumps(record) + "\n" for record in records]
        (place / "metrics.jsonl").write_text("".join(lines))
        return 0

    monkeypatch.setattr(run, "start_ranks", start)
    assert sweep.main("run", [*SWEPT, f"run_dir={tmp_path}"]) == DataError.exit_code
    found = capsys.readouterr()
    assert f"4 of 4: {tmp_path}/lr=0.0003+seed=1" in found.out
    assert f"{tmp_path}/lr=0.0001+seed=1: no text" in found.err
    rows = [
        line.split() for line in found.out.splitlines() if line.strip()[:6] in ("0.0001", "0.0003")
    ]
    assert rows == [
        ["0.0001", "0", "7/?", "0.0001", "0.0010"],
        ["0.0003", "0", "7/?", "0.0003", "0.0030"],
        ["0.0003", "1", "7/?", "0.0003", "0.0030"],
    ]
    assert "training loss" in found.out and "en loss" in found.out


def test_a_signal_ends_the_whole_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[dict[str, Any]] = []

    def stop(values: dict[str, Any]) -> int:
        begun.append(values)
        return EXIT_RESUME

    monkeypatch.setattr(run, "start_ranks", stop)
    assert sweep.main("run", [*SWEPT, f"run_dir={tmp_path}"]) == EXIT_RESUME
    assert len(begun) == 1 and "1 of 4: " in capsys.readouterr().out


def test_runs_that_have_a_job_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []

    def submit_array(drafts: list[Any], folder: Path, limit: int) -> str:
        given.extend(Path(draft.config.run_dir).name for draft in drafts)
        return "7"

    monkeypatch.setattr("launch.submission.submit_array", submit_array)
    commands = fake_commands(tmp_path / "bin", squeue="5 RUNNING", sbatch="")
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    busy = tmp_path / "sweep/lr=0.0001+seed=1"
    busy.mkdir(parents=True)
    (busy / "submit.json").write_text('{"job_ids": ["5"]}', encoding="utf-8")
    words = [*SWEPT, f"run_dir={tmp_path}/sweep", "cluster=local_slurm"]
    assert sweep.main("submit", [*words, "+model.architecture.vocab_size=512"]) == 0
    assert given == ["lr=0.0001+seed=0", "lr=0.0003+seed=0", "lr=0.0003+seed=1"]
    said = capsys.readouterr().out
    assert f"left alone: run_dir={busy} is in use: its job 5 is RUNNING" in said
    assert "job 7_2" in said


def test_an_array_is_as_wide_as_the_partition_lets_a_user() -> None:
    def limit(num_tasks: int, max_gpus: int | None = None, max_jobs: int | None = None) -> int:
        partition = PartitionConfig(max_gpus=max_gpus, max_jobs=max_jobs)
        site = SiteConfig(partitions={"p": partition}, default_partition="p")
        return sweep.default_limit(ClusterConfig(nodes=2, gpus_per_node=4, site=site), num_tasks)

    assert limit(9) == 9
    assert limit(9, max_gpus=40) == 5
    assert limit(9, max_gpus=40, max_jobs=3) == 3
    assert limit(2, max_gpus=40) == 2
    assert limit(9, max_gpus=4) == 1
