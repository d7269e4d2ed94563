"""Tables of what a run took."""

from __future__ import annotations

from pathlib import Path

from run_folders import RunFolder

from trainer.lives import read_lives
from trainer.metrics.account import LIFE_COLUMNS, summarise_jobs, tabulate_lives, wandb_lines
from trainer.metrics.history import load_run
from trainer.metrics.report import render_report
from trainer.metrics.run_facts import read_run

NOW = 1.8e9
PRICE = {
    "who": "academic",
    "currency": "TWD",
    "per_gpu_hour": 10.0,
    "source": "page",
    "date": "2026",
}


def run_of_two_lives(tmp_path: Path, **cluster: object) -> RunFolder:
    run = RunFolder(tmp_path / "run", NOW, cluster={"site": {"prices": [PRICE], **cluster}})
    run.submitted("7", "9", plan={"gpu_hours": 9.5}).train(120, 10).save(100, 60)
    run.life(9000, job="7", first_step=0, restart=1)
    run.end(5400, 75, step=100, reason="stopped by USR1", decision="requeue")
    return run.life(3600, token=2, job="9", attempt=1, first_step=100,
                    changes={"engine.zero_stage": [2, 3]})  # fmt: skip


def test_jobs_hours_and_cost(tmp_path: Path) -> None:
    facts = read_run(run_of_two_lives(tmp_path).path, NOW)
    rows = dict(summarise_jobs(facts, time_limit=NOW + 100))
    assert rows["Slurm jobs"] == "7, 9" and rows["Cluster"] == "taiwania2"
    assert rows["Training left"] == "0:09:20" and rows["Time left to its job"] == "0:01:40"
    assert rows["Last checkpoint"].startswith("step 100, ")
    assert rows["Spent"] == "7.99 of 9.50 planned rank-h"  # 4 ranks, twice 1 h
    assert rows["Cost, academic"] == "TWD 79.89 (page, 2026)"
    assert "Time left to its job" not in dict(summarise_jobs(facts, time_limit=NOW - 1))


def test_a_price_without_a_date_has_none(tmp_path: Path) -> None:
    run = run_of_two_lives(tmp_path, prices=[{**PRICE, "date": None}])
    rows = dict(summarise_jobs(read_run(run.path, NOW), time_limit=None))
    assert rows["Cost, academic"] == "TWD 79.89 (page)"


def test_unknown_stays_unknown(tmp_path: Path) -> None:
    assert summarise_jobs(read_run(RunFolder(tmp_path / "new", NOW).path, NOW)) == []
    run = RunFolder(tmp_path / "lost", NOW, cluster={"site": {"gpus_per_node": 0}})
    run.life(7200).life(3600, token=2).end(0, 0, token=2)
    assert summarise_jobs(read_run(run.path, NOW)) == [("Spent", "at least 4.00 CPU rank-h")]


def test_lives(tmp_path: Path) -> None:
    run = run_of_two_lives(tmp_path)
    first, second = tabulate_lives(read_lives(run.path), read_run(run.path, NOW).lives)
    cells = dict(zip(LIFE_COLUMNS, first, strict=True))
    assert (cells["job"], cells["ranks"], cells["steps"]) == ("7 (restart 1)", 4, "0 → 100")
    assert (cells["lasted"], cells["ended"]) == ("1:00:00", "stopped by USR1")
    cells = dict(zip(LIFE_COLUMNS, second, strict=True))
    assert (cells["job"], cells["lasted"], cells["ended"], cells["changes"]) == (
        "9 (attempt 1)", None, None, "engine.zero_stage: 2 → 3",
    )  # fmt: skip


def test_what_a_resume_took_stands_with_its_life(tmp_path: Path) -> None:
    run = run_of_two_lives(tmp_path)
    took = {
        "time": NOW,
        "of": "2 ranks, ZeRO-3",
        "on": "4 ranks, ZeRO-2",
        "gb_read": 1.2,
        "seconds": 3.1,
    }
    run.write("metrics.jsonl", {"split": "event", "step": 9, "event": "resume", "life": 2, **took})
    loaded = load_run(run.path)
    rows = tabulate_lives(loaded.lives, read_run(run.path, NOW).lives, loaded.events)
    cells = [dict(zip(LIFE_COLUMNS, row, strict=True))["resumed"] for row in rows]
    assert cells == [None, "2 ranks, ZeRO-3 on 4 ranks, ZeRO-2: 1.2 GB in 3.1 s"]
    assert "1.2 GB in 3.1 s" in render_report(loaded)


def test_offline_runs_of_wandb_that_were_not_sent(tmp_path: Path) -> None:
    run = run_of_two_lives(tmp_path)
    for name, files in (("1", ["run-1.wandb"]), ("2", ["run-2.wandb", "run-2.wandb.synced"])):
        folder = run.path / "wandb" / f"offline-run-{name}"
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
    assert wandb_lines(run.path) == [f"wandb sync {run.path}/wandb/offline-run-1"]
    page = render_report(load_run(run.path))
    for part in (
        "7.99 of 9.50 planned",
        "stopped by USR1",
        "wandb sync",
        "engine.zero_stage: 2 → 3",
    ):
        assert part in page
    assert "offline-run-2" not in page
