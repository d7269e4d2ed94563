"""``lives.jsonl``: starts, ends and decisions put together."""

from __future__ import annotations

from pathlib import Path

from trainer.lives import append_line, newest_step, read_lives


def test_an_end_and_a_decision_find_their_life(tmp_path: Path) -> None:
    lines = [
        {"started": "a", "token": 1, "job": "7", "restart": 0},
        {"ended": "b", "token": 1, "job": "7", "restart": 0, "exit_code": 69},
        {"decided": "c", "job": "7", "restart": 0, "decision": "requeue"},
        {"started": "d", "token": 2, "job": "7", "restart": 1},
        {"decided": "e", "job": "7", "restart": 1, "attempt": 0, "decision": "restart"},
        {"started": "f", "token": 3, "job": "7", "restart": 1, "attempt": 1},
        {"decided": "g", "job": "7", "restart": 1, "attempt": 1, "decision": "done"},
        {"started": "h", "token": 4, "job": None, "restart": 0},
        {"ended": "i", "token": 4, "job": None, "restart": 0, "exit_code": 0},
    ]
    for line in lines:
        append_line(tmp_path, line)
    first, second, third, last = read_lives(tmp_path)
    assert (first["exit_code"], first["decision"]) == (69, "requeue")
    assert (second["decision"], third["decision"]) == ("restart", "done")
    assert "ended" not in second and last["exit_code"] == 0


def test_a_life_that_never_began_and_a_torn_line(tmp_path: Path) -> None:
    append_line(tmp_path, {"started": "a", "token": 1, "job": "7", "restart": 0})
    append_line(tmp_path, {"ended": "b", "token": None, "job": "8", "restart": 0, "exit_code": 73})
    append_line(tmp_path, {"decided": "c", "job": "8", "restart": 0, "decision": "give up"})
    with (tmp_path / "lives.jsonl").open("a") as file:
        file.write('{"ended": "d", "token": 1, "jo')
    living, refused = read_lives(tmp_path)
    assert "ended" not in living
    assert (refused["exit_code"], refused["decision"]) == (73, "give up")
    append_line(tmp_path, {"started": "e", "token": 2, "job": "9", "restart": 0})
    assert [life["token"] for life in read_lives(tmp_path)] == [1, None, 2]


def test_ends_outside_slurm_are_not_mixed_up(tmp_path: Path) -> None:
    append_line(tmp_path, {"started": "a", "token": None, "job": None, "restart": 0})
    append_line(tmp_path, {"ended": "b", "token": None, "job": None, "restart": 0})
    assert len(read_lives(tmp_path)) == 2


def test_newest_step_counts_committed_folders_only(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for name in ("step_00000010", ".step_00000030.tmp", "step_00000020", "step_old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 20
