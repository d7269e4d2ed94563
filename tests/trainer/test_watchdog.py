"""The watchdog's limits, what it decides, and that it leaves nothing behind."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer import heartbeat, watchdog
from trainer.errors import LostRankError
from trainer.heartbeat import LEFT, Beat, Finding, read_beats
from trainer.watchdog import Post, Watchdog, explain_loss, watching


def stand(folder: Path, rank: int = 0, timeout_s: float = 1800, world_size: int = 2) -> Post:
    return Post(folder, 3, rank, world_size, timeout_s)


@pytest.fixture(autouse=True)
def own_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a process between its steps."""
    monkeypatch.setattr(heartbeat, "_pulse", heartbeat.Pulse("agree", 4, time.monotonic()))
    monkeypatch.setattr(heartbeat, "_finished", {heartbeat.BETWEEN})


@pytest.mark.parametrize("timeout_s", [10, 15, 60, 1800, 86400])
def test_who_is_missing_is_known_before_a_collective_gives_up(timeout_s: float) -> None:
    post = stand(Path(), timeout_s=timeout_s)
    assert timeout_s / 2 <= post.limit_s
    assert post.limit_s + post.look_s + 2 * post.interval_s <= timeout_s
    assert post.look_s >= 3 * post.interval_s  # silence is more than one missed beat


def test_many_ranks_beat_more_rarely() -> None:
    assert stand(Path(), world_size=64).interval_s == 1
    assert stand(Path(), world_size=1024).interval_s == 16


def test_a_watched_block_beats_and_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), watching(stand(tmp_path), pytest.fail):
        assert threading.active_count() == before + 1
        [own, _] = read_beats(tmp_path, 3, 2)
        assert own and (own.rank, own.phase, own.step, own.number) == (0, "load", 0, 1)
        raise KeyError
    assert threading.active_count() == before
    [own, _] = read_beats(tmp_path, 3, 2)
    assert own and own.phase == LEFT


def test_a_rank_that_cannot_write_says_so_once_and_beats_when_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Post, "interval_s", 0.01)
    folder, beats = tmp_path / heartbeat.FOLDER, threading.Semaphore(0)
    folder.write_text("a file")
    find = heartbeat.start_files

    def start_files(*place: Any) -> Path:
        try:
            return find(*place)
        finally:
            beats.release()

    monkeypatch.setattr(heartbeat, "start_files", start_files)
    with watching(stand(tmp_path), pytest.fail):
        assert all(beats.acquire(timeout=20) for _ in range(3))
        folder.unlink()
        assert beats.acquire(timeout=20)
    assert caplog.text.count("rank 0 can leave no heartbeat in") == 1
    assert "Not a directory" in caplog.text or "File exists" in caplog.text
    [own, _] = read_beats(tmp_path, 3, 2)
    assert own and own.phase == LEFT


class Left(Exception):
    """Instead of the end of the process."""


def beat_of(rank: int, idle_s: float) -> Beat:
    return Beat(rank, f"n{rank}", 7, 3, 1, 4, "step", idle_s, "", False, time.time())


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Catch the ends of processes; the reasons that were recorded."""

    def leave(code: int) -> None:
        assert code == LostRankError.exit_code
        raise Left

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(watchdog, "LEAVE_BEATS", 0)
    return []


def test_the_first_rank_to_find_out_says_why_and_the_others_follow(
    tmp_path: Path, ends: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    heartbeat.start_files(tmp_path, 3, 0)
    first, second = (Watchdog(stand(tmp_path, rank), ends.append) for rank in (0, 1))
    gone = [Finding(0, "waits", beat_of(0, 2000)), Finding(1, "silent", beat_of(1, 0))]
    with pytest.raises(Left):
        first._decide(2000, gone)
    assert len(ends) == 1 and "rank 1 on n1 is silent" in ends[0]
    assert "cluster.timeout_s=1800 allows 1410 s in phase agree" in ends[0]
    assert (tmp_path / "heartbeats/00003.verdict").read_text() == ends[0] + "\n"
    with pytest.raises(Left):
        second._decide(2000, gone)  # at the same time
    heartbeat._pulse = heartbeat.Pulse("agree", 4, time.monotonic() - 30)
    second._awake_since = 0.0
    with pytest.raises(Left):
        second._judge(time.monotonic())  # long before its own limit
    assert len(ends) == 1
    said = capfd.readouterr().err
    assert said.count("most recent call first") >= 3 and said.count("another rank has said") == 2


@pytest.mark.parametrize(
    ("phase", "state", "idle_s", "is_left"),
    [
        ("agree", "stuck", 1500, True),
        ("agree", "works", 1500, False),  # the others wait for a rank that gets on
        ("load", "stuck", 1500, False),  # nothing beats inside
        ("load", "stuck", 4 * 1500, True),
        ("load", "silent", 1500, True),
        ("agree", "missing", 1500, False),  # who knows what it does
        ("rollout", "stuck", 1500, False),  # the first of this process: what may compile
    ],
)
def test_what_may_take_long_is_waited_for(
    phase: str,
    state: str,
    idle_s: float,
    is_left: bool,
    tmp_path: Path,
    ends: list[str],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    heartbeat.start_files(tmp_path, 3, 0)
    heartbeat.beat(phase)
    dog = Watchdog(stand(tmp_path), ends.append)
    beat = None if state == "missing" else beat_of(1, idle_s)
    others = [Finding(0, "waits", beat_of(0, idle_s)), Finding(1, state, beat)]  # type: ignore
    if is_left:
        with pytest.raises(Left):
            dog._decide(idle_s, others)
    else:
        dog._decide(idle_s, others)
        dog._decide(idle_s, others)
        assert caplog.text.count("waiting on") == 1 and "rank 1 " in caplog.text
        assert capfd.readouterr().err.count("Current thread") == 1  # stacks, once
    assert len(ends) == is_left


def test_files_that_nobody_can_write_blame_nobody(tmp_path: Path, ends: list[str]) -> None:
    heartbeat.start_files(tmp_path, 3, 0)
    heartbeat.beat("load")
    dog = Watchdog(stand(tmp_path), ends.append)
    dog._decide(1500, [Finding(0, "silent", beat_of(0, 1)), Finding(1, "missing", None)])
    assert ends == []
    with pytest.raises(Left):
        dog._decide(4 * 1500, [Finding(0, "silent", beat_of(0, 1)), Finding(1, "missing", None)])


def test_a_rank_that_was_stopped_with_its_job_is_not_blamed(tmp_path: Path) -> None:
    dog = Watchdog(stand(tmp_path), pytest.fail)
    heartbeat._pulse = heartbeat.Pulse("agree", 4, time.monotonic() - 5000)
    assert dog._idle_s() < 60  # it was made just now, as after a SIGCONT


def test_a_process_that_was_stopped_counts_from_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Post, "interval_s", 0.01)
    monkeypatch.setattr(Post, "look_s", 0.1)
    dog, looks = Watchdog(stand(tmp_path), pytest.fail), threading.Semaphore(0)
    began = dog._awake_since

    def judge(now: float) -> None:
        time.sleep(0.3 if dog._awake_since == began else 0)  # as if stopped for so long
        looks.release()

    monkeypatch.setattr(dog, "_judge", judge)
    dog.start()
    assert all(looks.acquire(timeout=20) for _ in range(3))
    dog.stop()
    assert dog._awake_since >= began + 0.3


def test_a_lost_contact_is_explained_by_who_fell_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank, phase in ((0, LEFT), (1, "step")):
        path = heartbeat.start_files(tmp_path, 3, rank)
        heartbeat.write_beat(path, Beat(rank, "n1", 7, 3, 5, 4, phase, 0, "", False, time.time()))
    assert explain_loss(stand(tmp_path)).startswith("rank 1 on n1 is silent for 0 s (step 4")
    heartbeat.write_beat(path, Beat(1, "n1", 7, 3, 6, 4, LEFT, 0, "", False, time.time()))
    assert explain_loss(stand(tmp_path)) == ""  # it left by itself, and has said why
    assert slept == [1.5, 1.5]


def test_several_silent_ranks_are_looked_at_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one's next beat is late."""
    paths = [heartbeat.start_files(tmp_path, 3, rank) for rank in (0, 1)]

    def write(rank: int, number: int) -> None:
        beat = Beat(rank, "n1", 7, 3, number, 4, "step", 0, "", False, time.time())
        heartbeat.write_beat(paths[rank], beat)

    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        write(1, 4 + len(slept) // 2)

    write(0, 4)
    write(1, 4)
    monkeypatch.setattr(time, "sleep", sleep)
    assert explain_loss(stand(tmp_path)).startswith("rank 0 on n1 is silent")
    assert slept == [1.5, 1.5]


def test_an_error_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else nobody would put off the alarm that ends a process whose threads stand still."""
    monkeypatch.setattr(Post, "interval_s", 0.01)
    dog, looks = Watchdog(stand(tmp_path), pytest.fail), threading.Semaphore(0)

    def judge(now: float) -> None:
        looks.release()
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(dog, "_judge", judge)
    dog.start()
    assert all(looks.acquire(timeout=20) for _ in range(3))
    dog.stop()
    assert caplog.text.count("rank 0 cannot be watched for now: OSError") == 1
    [own, _] = read_beats(tmp_path, 3, 2)
    assert own and own.phase == LEFT


def test_a_condemned_rank_leaves_whatever_fails_on_the_way(
    tmp_path: Path, ends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat.start_files(tmp_path, 3, 0)

    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError

    def no_end(reason: str) -> None:
        ends.append(reason)
        raise RuntimeError

    monkeypatch.setattr("builtins.print", fail)  # whoever read the output is gone
    with pytest.raises(Left):
        Watchdog(stand(tmp_path), no_end)._condemn("no progress", can_read=False)
    assert ends == ["no progress"]
    with pytest.raises(Left):
        Watchdog(stand(tmp_path), no_end)._leave("another rank has said why")
