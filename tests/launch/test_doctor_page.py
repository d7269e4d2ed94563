"""docs/doctor.md: its commands are taken, its thresholds are those of the code."""

from __future__ import annotations

import re
import shlex

import pytest

from launch import ROOT, doctor
from launch.checks import median, verdict
from launch.checks.rank_plan import CheckPlan
from launch.compose import compose_config

PAGE = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_commands_are_taken(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(doctor, "report", lambda found, as_json: len(seen))
    monkeypatch.setattr(doctor.machine, "examine", lambda config: seen.append(config.run_dir))
    monkeypatch.setattr(doctor.job, "submit", lambda plan, cluster: seen.append(plan.folder))
    monkeypatch.setattr(doctor.job, "wait", lambda number, plan, say: seen.append(str(number)))
    monkeypatch.setattr(doctor.job, "read", lambda folder: seen.append(str(folder)))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    program, verb, *words = shlex.split(line, comments=True)
    assert (program, verb) == ("kuroshio", "doctor")
    assert doctor.main(words) >= 1


def test_figures_are_those_of_the_code() -> None:
    assert f"below {median.SLOW_SHARE:.0%}".replace("%", " %") in PAGE
    assert f"below {median.BROKEN_SHARE:.0%}".replace("%", " %") in PAGE
    assert f"latency above {median.LATE_FACTOR:g} times" in PAGE
    assert f"writes below {verdict.SICK_DISK_SHARE:.0%}".replace("%", " %") in PAGE
    timeout = doctor.DEFAULT_WAIT_S
    assert f"`--timeout` seconds ({timeout:g};" in PAGE


def test_what_the_page_says_of_a_profile_is_so() -> None:
    plan: CheckPlan = doctor.job.plan_check(
        compose_config(["cluster=nano4", "run_dir=/runs/a"]), ROOT, doctor.DEFAULT_WAIT_S
    )
    assert plan.profile_gb_per_s == 8 * 50 and "cluster.site.inter_node_gb_per_s" in PAGE
