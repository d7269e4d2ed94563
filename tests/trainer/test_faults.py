"""Faults that tests ask for."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer import faults
from trainer.errors import ConfigError, DataError


def test_faults_are_read_with_their_facts() -> None:
    first, second = faults.parse_faults("kill@step rank=1 step=4; poison@loss once=/a/b")
    assert (first.kind, first.point, first.facts) == ("kill", "step", {"rank": "1", "step": "4"})
    assert (second.kind, second.facts, second.once) == ("poison", {}, Path("/a/b"))


@pytest.mark.parametrize(
    "text",
    [
        *("kill", "explode@step", "kill@step rank", "kill@ rank=1", "slow@step seconds=x"),
        "raise@step error=NoSuchError",
    ],
)
def test_what_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="KUROSHIO_FAULT"):
        faults.parse_faults(text)


def test_a_fault_happens_where_its_facts_hold_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"raise@step rank=1 step=4; poison@loss once={tmp_path}/done"
    monkeypatch.setattr(faults, "_FAULTS", faults.parse_faults(text))
    assert not faults.reach("step", rank=1, step=3) and not faults.reach("step", rank=0, step=4)
    with pytest.raises(RuntimeError, match="step"):
        faults.reach("step", rank=1, step=4)
    assert faults.reach("loss") and not faults.reach("loss")


def test_an_error_of_ours_is_raised_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_FAULTS", faults.parse_faults("raise@data error=DataError"))
    with pytest.raises(DataError, match="data"):
        faults.reach("data")


def test_a_slow_point_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    monkeypatch.setattr(faults, "_FAULTS", faults.parse_faults("slow@data rank=1 seconds=0.25"))
    assert not faults.reach("data", rank=0) and not faults.reach("data", rank=1)
    assert slept == [0.25]


def test_a_kill_is_a_sigkill() -> None:
    code = "from trainer.faults import reach; reach('step', step=2); reach('step', step=3)"
    environ = {faults.VARIABLE: "kill@step step=3"}
    done = subprocess.run([sys.executable, "-c", code], env=environ)
    assert done.returncode == -signal.SIGKILL
