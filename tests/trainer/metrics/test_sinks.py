"""The fan-out: journal, console, wandb offline, TensorBoard, and sinks that fail."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.config import LogConfig
from trainer.errors import StorageError
from trainer.metrics import sinks as sinks_module
from trainer.metrics.console import RunConsole, describe_step, show_count, show_duration
from trainer.metrics.sinks import Sinks, wandb_run_id

CONFIG: dict[str, Any] = {"loop": {"max_steps": 10}, "hub": {"hf_token": "very-secret-value"}}
METRICS = {"loss": 3.25, "lr": 1e-3, "grad_norm": 0.5, "tokens": 4096, "tokens_per_s": 12345.0}
SOURCES = {"法律": {"loss": 2.0, "perplexity": 7.389, "bits_per_character": 2.5, "num_tokens": 10}}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keep wandb away from this user's settings and from every server."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def open_sinks(run_dir: Path, resume_step: int = 0, is_main: bool = True, **log: Any) -> Sinks:
    return Sinks(run_dir, LogConfig(**log), "tiny", CONFIG, is_main, resume_step)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_record_has_its_line(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = open_sinks(run_dir)
    sinks.train(1, METRICS)
    sinks.evaluate(1, SOURCES)
    sinks.event(1, "save", path="checkpoints/step-1", epochs={"法律": 1.23456, "en": 1})
    sinks.sample(1, "黑潮", "往北流")
    sinks.close()
    lines = records(run_dir)
    assert [line["split"] for line in lines] == ["train", "eval", "event", "sample"]
    assert all(line["step"] == 1 and line["time"] > 1e9 for line in lines)
    assert lines[0].items() >= METRICS.items()
    assert lines[1]["sources"] == SOURCES
    assert lines[2]["event"] == "save" and lines[2]["path"] == "checkpoints/step-1"
    assert (lines[3]["prompt"], lines[3]["text"]) == ("黑潮", "往北流")
    shown = capsys.readouterr().err
    assert "step 1/10  loss 3.2500  lr 1.00e-03  grad 0.50  12.3k tok/s" in shown
    assert "step 1  save  path=checkpoints/step-1  epochs={法律 1.235, en 1}" in shown
    assert "eval 法律" in shown and "bits_per_character 2.5000" in shown
    assert "\x1b" not in shown  # plain lines when this is no terminal


def test_other_ranks_write_nothing(run_dir: Path) -> None:
    sinks = open_sinks(run_dir, is_main=False, wandb="offline", tensorboard=True)
    sinks.train(1, METRICS)
    sinks.evaluate(1, SOURCES)
    sinks.event(1, "save")
    sinks.sample(1, "a", "b")
    sinks.close()
    assert list(run_dir.iterdir()) == []


def test_resume_cuts_back_and_says_so(run_dir: Path) -> None:
    first = open_sinks(run_dir)
    for step in range(1, 6):
        first.train(step, METRICS)
    second = open_sinks(run_dir, resume_step=3)
    for step in range(4, 7):
        second.train(step, METRICS)
    second.close()
    lines = records(run_dir)
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    (event,) = (line for line in lines if line["split"] == "event")
    assert (event["event"], event["num_dropped"], event["last_step"]) == ("rewind", 2, 5)


def test_tensorboard_events_are_readable(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = open_sinks(run_dir, tensorboard=True)
    for step in (1, 2, 3):
        sinks.train(step, {"loss": 4.0 - step})
    sinks.evaluate(3, {"laws": {"bits_per_character": 1.5}})
    sinks.close()
    resumed = open_sinks(run_dir, resume_step=2, tensorboard=True)
    resumed.train(3, {"loss": 0.5})
    resumed.close()
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 3), (2, 2), (3, 0.5)]
    # Purged by the resume, as the journal is.
    assert [e.step for e in events.Scalars("eval/laws/bits_per_character")] == []


def wandb_files(run_dir: Path) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(run_dir.rglob("*")) if p.is_file())


def test_wandb_offline_has_figures_and_no_secret(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sinks = open_sinks(run_dir, wandb="offline")
        sinks.train(1, METRICS)
        sinks.evaluate(1, SOURCES)
        sinks.sample(1, "prompt", "<b>text")
        sinks.close()
    assert not [r for r in caplog.records if "is off from here on" in r.getMessage()]
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert folder.name.endswith(wandb_run_id(run_dir))
    content = wandb_files(run_dir / "wandb")
    assert b"train/tokens_per_s" in content and b"[redacted]" in content
    assert b"very-secret-value" not in content


def test_run_id_belongs_to_the_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run_dir.parent)
    assert wandb_run_id(Path("run")) == wandb_run_id(run_dir)
    assert wandb_run_id(run_dir) != wandb_run_id(run_dir.parent)


@pytest.mark.parametrize("api_key", [None, "0" * 40])
def test_wandb_online_without_network_goes_offline(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    api_key: str | None,
) -> None:
    monkeypatch.setattr(sinks_module, "WANDB_INIT_TIMEOUT_S", 2)
    if api_key:
        monkeypatch.setenv("WANDB_API_KEY", api_key)
    with caplog.at_level(logging.WARNING):
        sinks = open_sinks(run_dir, wandb="online")
        sinks.train(1, METRICS)
        sinks.close()
    assert "recording offline, send later with `wandb sync" in caplog.text
    assert list((run_dir / "wandb").glob("offline-run-*"))
    assert [line["split"] for line in records(run_dir)] == ["train"]


def test_a_failing_dashboard_warns_once_and_the_run_goes_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            self.closed = False

        def scalars(self, step: int, values: dict[str, float]) -> None:
            raise ConnectionError("server gone")

    monkeypatch.setattr(sinks_module, "TensorBoardSink", Broken)
    sinks = open_sinks(run_dir, tensorboard=True)
    with caplog.at_level(logging.WARNING):
        sinks.train(1, METRICS)
        sinks.train(2, METRICS)
        sinks.close()
    assert [line["step"] for line in records(run_dir)] == [1, 2]
    warnings = [r for r in caplog.records if "tensorboard failed" in r.getMessage()]
    assert len(warnings) == 1 and "server gone" in warnings[0].getMessage()


def test_a_sink_that_cannot_start_warns(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("quota")

    monkeypatch.setattr(sinks_module, "WandbSink", refuse)
    with caplog.at_level(logging.WARNING):
        sinks = open_sinks(run_dir, wandb="offline")
        sinks.train(1, METRICS)
        sinks.close()
    assert "wandb failed and is off from here on: quota" in caplog.text
    assert len(records(run_dir)) == 1


def test_unwritable_journal_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        open_sinks(tmp_path / "missing")


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm-256color")
    with (tmp_path / "terminal").open("w+") as terminal:
        console = RunConsole("tiny", 10, first_step=4, file=terminal)
        console.train(5, {**METRICS, "eta_s": 75.0, "memory_gib": 1.5})
        console.evaluate(5, SOURCES)
        console.note("[saved] step 5")
        console.close()
        terminal.seek(0)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.read())
    assert "tiny" in shown and "5/10" in shown and "━" in shown
    for part in ("loss 3.2500", "12.3k tok/s", "1.50 GiB", "eta 0:01:15", "法律", "[saved] step 5"):
        assert part in shown


def test_figures_for_people() -> None:
    assert [show_count(v) for v in (950, 12_345, 2.5e6, 3e9)] == ["950", "12.3k", "2.5M", "3.0G"]
    assert show_duration(90_061) == "25:01:01"
    assert show_duration(float("inf")) == "-:--:--"
    shown = describe_step({"loss": 1.0, "unknown": 2.0, "epoch": 0.125})
    assert shown == "epoch 0.12  loss 1.0000"
