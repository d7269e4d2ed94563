"""What ranks say of themselves, and who of them is missing."""

from __future__ import annotations

import dataclasses
import json
import threading
import timeit
from pathlib import Path
from typing import Any

import pytest

from trainer import heartbeat
from trainer.heartbeat import Beat, Finding, culprits, is_hopeless, judge, name_culprits

NOW = 1000.0


@pytest.fixture(autouse=True)
def own_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a process that has just begun."""
    monkeypatch.setattr(heartbeat, "_pulse", heartbeat.Pulse("load", 0, 0.0))
    monkeypatch.setattr(heartbeat, "_finished", {heartbeat.BETWEEN})


def make_beat(rank: int = 0, **facts: Any) -> Beat:
    values = {"host": f"n{rank}", "pid": 7, "token": 3, "number": 9, "step": 4, "phase": "step"}
    values |= {"idle_s": 30.0, "where": "", "waits": False, "time": NOW}
    return Beat(rank=rank, **{**values, **facts})


def later(beat: Beat) -> Beat:
    return dataclasses.replace(beat, number=beat.number + 3)


def test_phases_nest_and_a_first_one_may_take_long() -> None:
    assert heartbeat.is_uncut("load") and not heartbeat.is_uncut(heartbeat.BETWEEN)
    heartbeat.beat(heartbeat.BETWEEN, 4)
    with heartbeat.phase("step", 5):
        assert heartbeat.is_uncut("step")
        with heartbeat.phase("data"):
            assert heartbeat.pulse()[:2] == ("data", 5)
        assert heartbeat.pulse().phase == "step" and not heartbeat.is_uncut("data")
    assert heartbeat.pulse()[:2] == (heartbeat.BETWEEN, 5) and heartbeat.pulse().at > 0
    with pytest.raises(KeyError), heartbeat.phase("step"):
        raise KeyError
    assert heartbeat.pulse().phase == heartbeat.BETWEEN and not heartbeat.is_uncut("step")


def test_a_beat_costs_next_to_nothing() -> None:
    assert min(timeit.repeat(heartbeat.beat, number=1000, repeat=5)) / 1000 < 2e-5


def test_a_file_is_written_in_place_and_read_whole(tmp_path: Path) -> None:
    path = heartbeat.start_files(tmp_path, 3, 1)
    assert path.name == "00003.rank_00001" and heartbeat.read_beat(path) is None
    long = make_beat(1, where="x" * 120, host="黑潮")
    for beat in (long, make_beat(1)):  # the second is shorter: nothing of the first may be left
        heartbeat.write_beat(path, beat)
        assert heartbeat.read_beat(path) == beat
        assert path.stat().st_size == heartbeat.RECORD_BYTES
    assert [found for found, _ in heartbeat.read_life(tmp_path, 3)] == [make_beat(1)]
    assert heartbeat.read_beats(tmp_path, 3, 2) == [None, make_beat(1)]
    assert heartbeat.describe_rank(tmp_path, 1) == "on n1, step 4, phase step"
    assert heartbeat.describe_rank(tmp_path, 0) == ""
    heartbeat.write_beat(heartbeat.start_files(tmp_path, 3, 2), make_beat(2, step=5, time=NOW + 1))
    assert heartbeat.describe_last(tmp_path, 3) == ", last seen after step 5 in phase step"
    assert heartbeat.describe_last(tmp_path, 4) == heartbeat.describe_last(tmp_path, None) == ""


def test_long_names_in_another_script_leave_a_file_that_can_be_read(tmp_path: Path) -> None:
    path = heartbeat.start_files(tmp_path, 3, 1)
    beat = make_beat(1, host="h" * 64, where="訓" * 120 + "\udcff")
    heartbeat.write_beat(path, beat)
    assert heartbeat.read_beat(path) == dataclasses.replace(beat, where="")
    heartbeat.write_beat(path, make_beat(1))
    assert heartbeat.read_beat(path) == make_beat(1)


def test_a_new_life_removes_the_old_ones_files_and_they_stay_away(tmp_path: Path) -> None:
    old = heartbeat.start_files(tmp_path, 2, 1)
    verdict = old.with_name("00002.verdict")
    verdict.touch()
    heartbeat.start_files(tmp_path, 3, 1)
    heartbeat.start_files(tmp_path, 3, 0)
    names = sorted(path.name for path in old.parent.iterdir())
    assert names == ["00003.rank_00000", "00003.rank_00001"]
    with pytest.raises(FileNotFoundError):  # a rank of the old life lives on somewhere
        heartbeat.write_beat(old, make_beat(1, token=2))
    assert heartbeat.read_life(tmp_path, 3) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rank": 1}',
        pytest.param("\0" * 512, id="zeros"),
        pytest.param("[" * 9999, id="deep"),
    ],
)
def test_a_torn_file_is_no_beat(text: str, tmp_path: Path) -> None:
    (tmp_path / "torn").write_text(text)
    assert heartbeat.read_beat(tmp_path / "torn") is None


def test_a_file_of_other_values_is_no_beat(tmp_path: Path) -> None:
    values = dataclasses.asdict(make_beat())
    for broken in ({"step": "x"}, {"idle_s": None}, {"number": float("inf")}):
        (tmp_path / "odd").write_text(json.dumps(values | broken))
        assert heartbeat.read_beat(tmp_path / "odd") is None
    (tmp_path / "odd").write_text(json.dumps(values | {"of a newer version": 1}))
    assert heartbeat.read_beat(tmp_path / "odd") == make_beat()


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        (make_beat(), None, "missing"),
        (None, make_beat(), "stuck"),
        (make_beat(), make_beat(), "silent"),
        (make_beat(), later(make_beat()), "stuck"),
        (make_beat(), later(make_beat(waits=True)), "waits"),
        (make_beat(), later(make_beat(idle_s=2.0)), "works"),
        (make_beat(), make_beat(phase="left"), "left"),
    ],
)
def test_two_looks_tell_what_became_of_a_rank(
    before: Beat | None, after: Beat | None, state: str
) -> None:
    [finding] = judge([before], [after], busy_s=10)
    assert finding.state == state


def find(*states: str) -> list[Finding]:
    return [Finding(rank, state, make_beat(rank)) for rank, state in enumerate(states)]  # type: ignore


@pytest.mark.parametrize(
    ("states", "hopeless", "ranks"),
    [
        (["waits", "silent", "stuck"], True, [1]),
        (["waits", "stuck", "waits"], True, [1]),
        (["waits", "works", "waits"], False, [1]),
        (["works", "silent", "works"], True, [1]),
        (["waits", "missing"], False, [1]),  # it may work
        (["waits", "missing", "silent"], True, [2]),
        (["waits", "missing", "stuck"], False, [2]),
        (["waits", "waits"], True, [0, 1]),
        (["stuck", "left"], True, [0]),
    ],
)
def test_who_is_waited_for(states: list[str], hopeless: bool, ranks: list[int]) -> None:
    findings = find(*states)
    assert is_hopeless(findings) == hopeless
    assert [finding.rank for finding in culprits(findings)] == ranks


def test_the_message_names_rank_host_step_and_place() -> None:
    silent = Finding(1, "silent", make_beat(1, time=NOW - 12))
    assert name_culprits(
        [*find("waits"), silent, Finding(2, "waits", make_beat(2, step=6))], NOW
    ) == (
        "rank 1 on n1 is silent for 12 s (step 4, phase step); 2 ranks wait for others after step 6"
    )
    stuck = Finding(1, "stuck", make_beat(1, where="loss (trainer/loop.py:9)", phase="data"))
    assert name_culprits([*find("waits"), stuck], NOW) == (
        "rank 1 on n1 hangs in loss (trainer/loop.py:9) for 30 s (step 4, phase data); "
        "1 rank waits for others after step 4"
    )
    assert "rank 0 has left no heartbeat" in name_culprits([Finding(0, "missing", None)], NOW)
    assert name_culprits(find(*["silent"] * 20), NOW).endswith("12 more ranks likewise")


def test_the_main_thread_is_found_from_another_one() -> None:
    found: list[tuple[str, bool]] = []
    thread = threading.Thread(target=lambda: found.append(heartbeat.find_main_thread()))
    thread.start()
    thread.join()
    [(place, waits)] = found
    assert place and not waits  # in threading.py, outside of the project's packages or in this test
