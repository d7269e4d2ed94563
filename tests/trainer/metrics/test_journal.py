"""metrics.jsonl: whole lines, rewinding to a checkpoint, a full disk."""

import json
import math
import os
from pathlib import Path

import pytest

from trainer.errors import StorageError
from trainer.metrics.journal import Journal, read_journal, rewind


def train(step: int, loss: float = 1.0) -> dict[str, object]:
    return {"split": "train", "step": step, "loss": loss}


def write(path: Path, *records: dict[str, object]) -> None:
    journal = Journal(path)
    for record in records:
        journal.write(record)
    journal.close()


def test_appends_whole_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1))
    write(path, {"split": "sample", "step": 2, "text": "黑潮\n第二行"})
    lines = path.read_bytes().split(b"\n")
    assert [json.loads(line)["step"] for line in lines[:-1]] == [1, 2] and lines[-1] == b""
    assert "黑潮" in path.read_text("utf-8")


def test_non_finite_numbers_are_kept_and_the_line_is_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1, math.nan), train(2, -math.inf))
    values = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    assert math.isnan(float(values[0])) and float(values[1]) == -math.inf


def test_rewind_leaves_the_curve_of_the_unbroken_run(tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken.jsonl", tmp_path / "unbroken.jsonl"
    write(broken, *(train(step, 9.0 if step > 3 else 1.0) for step in range(1, 7)))
    with broken.open("ab") as file:
        file.write(b'{"split": "train", "st')  # killed inside a line
    assert rewind(broken, 3) == (3, 6)
    write(broken, *(train(step) for step in range(4, 7)))
    write(unbroken, *(train(step) for step in range(1, 7)))
    assert broken.read_bytes() == unbroken.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_rewind_to_the_start_keeps_only_events(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    start = {"split": "event", "step": 0, "event": "environment"}
    write(path, start, {"split": "eval", "step": 0, "sources": {}}, train(1))
    assert rewind(path, 0) == (2, 1)
    assert list(read_journal(path)) == [start]


def test_rewind_of_nothing_touches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert rewind(path, 5) == (0, 5) and not path.exists()
    write(path, train(1))
    inode = path.stat().st_ino
    assert rewind(path, 1) == (0, 1) and path.stat().st_ino == inode


def test_a_failed_rewind_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, train(1), train(2))
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"metrics\.jsonl: No space left on device"):
        rewind(path, 1)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_full_disk_is_a_storage_error_and_tears_no_line(tmp_path: Path) -> None:
    """A file-size limit stands for a full disk: the kernel writes the part that fits."""
    import resource
    import signal

    path = tmp_path / "metrics.jsonl"
    write(path, train(1))
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    journal = Journal(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        with pytest.raises(StorageError, match="start the same command again to resume"):
            journal.write(train(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.stat().st_size == size
    journal.write(train(3))
    assert [record["step"] for record in read_journal(path)] == [1, 3]
    journal.close()


def test_unwritable_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write"):
        Journal(tmp_path / "missing" / "metrics.jsonl")
