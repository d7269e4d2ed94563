"""Folders and quotas."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.checks import quota
from launch.checks.files import FolderFacts, gather, judge, judge_room, nearest_folder, skew_between
from launch.checks.quota import QuotaFacts, parse_table

FINE = FolderFacts("run folder", "/work/me", "", 10**12, 10**6, 400.0, 0.01, {})


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({}, "ok", ""),
        ({"problem": "Disk quota exceeded"}, "error", "Disk quota exceeded"),
        ({"mb_per_s": 12.0}, "warning", "12 MB/s"),
        ({"free_inodes": 40}, "warning", "40 inodes"),
        ({"free_inodes": None}, "ok", ""),
        ({"skew_s": -8.0}, "warning", "-8 s"),
        ({"skew_s": 7200.0}, "error", "+7200 s"),
        ({"refuses": {"flock": "Function not implemented"}}, "warning", "no flock"),
        ({"refuses": {"flock": "x", "lockf": "x"}}, "warning", "no flock nor lockf"),
        ({"refuses": {"link": "Operation not permitted"}}, "error", "no link"),
    ],
)
def test_judge(changes: dict[str, object], level: str, words: str) -> None:
    found = judge(replace(FINE, **changes), is_run_folder=True)  # type: ignore[arg-type]
    bad = [f for f in found if f.level != "ok"]
    assert [f.level for f in bad] == ([] if level == "ok" else [level])
    assert words in " ".join(f"{f.what} {f.why}" for f in bad)


@pytest.mark.parametrize(
    ("planned", "free", "levels"),
    [(0.0, 10, []), (4e9, 5 * 10**9, ["ok"]), (6e9, 5 * 10**9, ["error"]), (6e9, None, [])],
)
def test_room_for_planned_checkpoints(planned: float, free: int | None, levels: list[str]) -> None:
    found = judge_room(replace(FINE, free_bytes=free), planned)
    assert [f.level for f in found] == levels
    assert not found or "6.0 GB" in found[0].what or "4.0 GB" in found[0].what


def test_only_run_folders_need_links() -> None:
    facts = replace(FINE, refuses={"link": "Operation not permitted"})
    assert all(f.level == "ok" for f in judge(facts))


def test_a_real_folder_is_measured_and_left_clean(tmp_path: Path) -> None:
    facts = gather("run folder", tmp_path / "not" / "there")
    assert facts.path == str(tmp_path) and facts.problem == "" and facts.refuses == {}
    assert facts.mb_per_s is not None and facts.mb_per_s > 0
    assert facts.skew_s is not None and abs(facts.skew_s) < 5
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_refuses_says_why() -> None:
    facts = gather("run folder", Path("/proc/nothing"))
    assert facts.path == "/proc" and facts.problem


def test_nearest_folder_of_a_file_is_its_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert nearest_folder(tmp_path / "file" / "x") == tmp_path


def test_clock_is_compared_with_the_middle_of_the_question() -> None:
    assert skew_between(100.0, 107.0, 102.0) == (6.0, 1.0)


QUOTA = (
    "Disk quotas for user me (uid 1000):\n"
    "     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace\n"
    "      /dev/sda1  95000000* 90000000 100000000 6days  1200       0       0\n"
)


def test_a_soft_quota_counts_where_there_is_no_hard_one() -> None:
    row = "/home 10* 8 {hard} none 5 4 {hard} none"
    (soft,) = parse_table("quota", row.format(hard=0))
    assert (soft.limit_bytes, soft.limit_files) == (8 * 1024, 4)
    (hard,) = parse_table("quota", row.format(hard=9))
    assert (hard.limit_bytes, hard.limit_files) == (9 * 1024, 9)


def test_quota_is_read_and_judged() -> None:
    (facts,) = parse_table("quota", QUOTA)
    assert facts.limit_bytes == 100000000 * 1024 and facts.used_files == 1200
    assert [f.level for f in quota.judge([facts], None)] == ["warning"]
    full = replace(facts, used_bytes=facts.limit_bytes)
    assert [f.level for f in quota.judge([full], None)] == ["error"]
    files = QuotaFacts("lfs quota", "/work", 10, 0, 99, 100)
    assert [f.level for f in quota.judge([files], None)] == ["warning"]
    free = replace(facts, limit_bytes=0)
    (found,) = quota.judge([free], None)
    assert found.level == "ok" and "unlimited" in found.what


def test_without_a_command_the_profile_is_quoted() -> None:
    (found,) = quota.judge([], 100.0)
    assert found.level == "ok" and "the profile says 100 GB" in found.what
    assert os.linesep not in found.what
