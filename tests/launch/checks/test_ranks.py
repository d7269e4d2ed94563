"""How ranks meet and go on without those who stay away; the whole on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch import doctor
from launch.checks import job
from launch.checks.machine import meeting_port
from launch.checks.meeting import Meeting
from launch.checks.rank import short, without
from launch.checks.rank_plan import CheckPlan, find_place, read_plan
from launch.checks.rates import matmul_tflops, memory_gb_per_s
from launch.checks.report import line
from launch.compose import compose_config
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
PLAN = CheckPlan(2, "/work/doctor", {"token stores": "/s"}, "ib0", True, 30.0, 400.0)


def test_ranks_go_on_without_one_that_never_came() -> None:
    store = dist.HashStore()

    def take_part(rank: int) -> tuple[list[int], dict[int, str], bool]:
        meeting = Meeting(store, rank, 3, wait_s=0.5)
        clock = meeting.gather()
        said = meeting.agree("round", f"word {rank}", 5.0)
        meeting.part()
        return meeting.present, said, clock is None or abs(clock[0]) <= clock[1] + 0.01

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(take_part, (0, 2)))
    assert results == [([0, 2], {0: "word 0", 2: "word 2"}, True)] * 2


def test_a_rank_that_comes_too_late_is_told() -> None:
    store = dist.HashStore()
    first = Meeting(store, 0, 2, wait_s=0.05)
    first.gather()
    assert first.present == [0]
    store.set("clock/1", "0")
    with pytest.raises(RuntimeError, match="came too late"):
        Meeting(store, 1, 2, wait_s=0.05).gather()


def test_groups_without_those_who_are_gone() -> None:
    everyone, none = ("a", "b", "c", "d"), set[tuple[str, ...]]()
    assert without(("a", "b"), {"b"}, none) == ()
    assert without(("a",), {"b"}, none) == ("a",)
    assert without(everyone, {"b"}, none) == ("a", "c", "d")
    assert without(everyone, set(), {("c", "d")}) == ("a", "b", "c")
    assert without(("c", "d"), set(), {("c", "d")}) == ("c", "d")


def test_place_comes_from_slurm_or_from_us() -> None:
    environ = {"SLURMD_NODENAME": "n2", "SLURM_LOCALID": "1", "MASTER_ADDR": "n1"}
    environ["MASTER_PORT"] = "23456"
    found = find_place(read_plan(PLAN.write()), ["n1", "n2"], environ)
    assert (found.rank, found.world_size, found.node_of(1)) == (3, 4, "n1")
    assert (found.address, found.port, found.interface) == ("n1", 23456, "ib0")
    here = find_place(PLAN, ["laptop"], {**environ, "LOCAL_RANK": "0"})
    assert (here.node, here.rank) == ("laptop", 0)


def test_rates_of_a_core_are_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.checks.rates.SECONDS", 0.01)
    device = torch.device("cpu")
    assert 0.0001 < matmul_tflops(device) < 10 and 0.01 < memory_gb_per_s(device) < 5000


def test_account_of_sbatch_counts_where_the_config_has_none() -> None:
    environ = {"SBATCH_ACCOUNT": "MST2"}
    config = compose_config(["cluster=taiwania2"])
    assert doctor.take_account(config, {}).cluster.account is None
    assert doctor.take_account(config, environ).cluster.account == "MST2"
    given = compose_config(["cluster=taiwania2", "cluster.account=MST109001"])
    assert doctor.take_account(given, environ).cluster.account == "MST109001"


def test_errors_are_cut_to_a_line() -> None:
    assert short(RuntimeError("x" * 500 + "\nmore")) == "x" * 300
    assert short(RuntimeError("")) == "RuntimeError"


def test_plan_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "store"
    store.mkdir()
    words = [f"run_dir={tmp_path}/run", f"data.store_dir={store}", "cluster=nano4"]
    config = compose_config(words)
    folder = job.name_folder(config)
    assert folder.parent == tmp_path and folder.name.startswith("doctor-")
    plan = job.plan_check(config, folder, 60.0)
    assert plan.folders == {"token stores": str(store)} and plan.expects_gpu
    assert plan.ranks_per_node == 8 and plan.profile_gb_per_s == 400.0
    monkeypatch.setenv("SLURM_JOB_ID", "40123")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert meeting_port() == 20123


def test_script_starts_one_step_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts: list[Path] = []
    monkeypatch.setattr(job.sbatch, "require_slurm", lambda cluster: None)
    monkeypatch.setattr(job.sbatch, "submit_script", lambda path: scripts.append(path) or "5")
    monkeypatch.setattr("launch.job_folder.copy_code", lambda target: None)
    words = ["cluster=taiwania2", "cluster.account=MST109001", "cluster.gpus_per_node=8"]
    plan = replace(PLAN, folder=str(tmp_path / "doctor"))
    assert job.submit(plan, compose_config(words).cluster) == "5"
    text = scripts[0].read_text()
    assert read_plan((tmp_path / "doctor/plan.json").read_text()) == plan
    for directive in ("--no-requeue", "--no-kill", "--gres=gpu:8", f"--time={job.TIME_LIMIT}"):
        assert f"\n#SBATCH {directive}\n" in text
    (step,) = re.findall(r"^  srun .*?&$", text, re.MULTILINE | re.DOTALL)
    assert '--nodelist="$HOST"' in step and '<"$RUN/plan.json"' in step
    assert "doctor --ranks" in step and "launch.job_end" not in text and "--signal" not in text
    subprocess.run(["bash", "-n", str(scripts[0])], check=True)


def test_folder_of_a_job_that_never_began(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(PLAN.write())
    (found,) = job.read(tmp_path)
    assert found.level == "error" and found.nodes == ()
    (tmp_path / "first_node").write_text("n7\n")
    (found,) = job.read(tmp_path)
    assert found.nodes == ("n7",) and found.what.startswith("n7: ")
    with pytest.raises(ConfigError, match="no readable plan"):
        job.read(tmp_path / "absent")


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        ("[W1] hostname\nsrun: error: Task launch failed\nsrun: error: x\n", "srun: error: Task"),
        ("Traceback\n    raise ConfigError(\nImportError: libcudart\n", "ImportError: libcudart"),
        ("a\nkuroshio: local rank 3 has no device\n", "kuroshio: local rank 3 has no device"),
        ("[W1] hostname\n", "the node is down"),
    ],
)
def test_reason_of_a_silent_node_is_read(tmp_path: Path, printed: str, why: str) -> None:
    (tmp_path / "plan.json").write_text(PLAN.write())
    (tmp_path / "hosts").write_text("n1\nn2\n")
    (tmp_path / "nodes").mkdir()
    places = [line(rank, "place", ["n1", rank]) for rank in range(2)]
    (tmp_path / "nodes/n1.out").write_text("\n".join(places))
    (tmp_path / "nodes/n2.err").write_text(printed)
    (silent,) = [f for f in job.read(tmp_path) if f.level != "ok"]
    assert silent.nodes == ("n2",) and silent.why.startswith(why)


class Slurm:
    """A controller that gives states one after the other; the last one stays."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: str | None) -> None:
        self.states, self.cancelled, self.now = list(states), list[str](), 0.0
        monkeypatch.setattr(job, "job_state", lambda number: self.next_state())
        monkeypatch.setattr(job, "ask_squeue", lambda number, column: f"answer {column}")
        monkeypatch.setattr(job.sbatch, "cancel", self.cancel)
        monkeypatch.setattr(job.time, "sleep", self.sleep)
        monkeypatch.setattr(job.time, "monotonic", lambda: self.now)

    def next_state(self) -> str | None:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def cancel(self, jobs: list[str], *flags: str) -> str:
        self.cancelled += jobs
        return "scancel 7 failed: no controller"

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_silent_job_is_ended_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm, said = Slurm(monkeypatch, None, "PENDING", "PENDING", "RUNNING"), list[str]()
    job.wait("7", replace(PLAN, folder=str(tmp_path)), said.append)
    # Each once.
    assert said[:2] == ["Slurm does not answer; asking on", "job 7 is PENDING: answer %r"]
    assert said[2:] == ["scancel 7 failed: no controller"]
    assert (tmp_path / "first_node").read_text() == "answer %B"
    assert slurm.cancelled == ["7"]
    assert PLAN.wait_s + job.MEASURING_S <= slurm.now < 2 * (PLAN.wait_s + job.MEASURING_S)


def test_a_job_that_ended_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = Slurm(monkeypatch, "RUNNING", "RUNNING", "")
    job.wait("7", replace(PLAN, folder=str(tmp_path)), print)
    assert slurm.now == job.POLL_S


def test_ctrl_c_leaves_the_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(number: str, plan: CheckPlan, say: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "submit", lambda plan, cluster: "41")
    monkeypatch.setattr(job, "wait", interrupt)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(SystemExit, match="130"):
        doctor.main(["--nodes", "2", "cluster=local_slurm", "run_dir=/work/run"])
    told = capsys.readouterr().err
    assert "job 41 goes on; kuroshio doctor --read /work/doctor-" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "has no scheduler"),
        (["--nodes", "0"], "1 or more"),
        (["--read", "/nowhere"], "no readable plan.json"),
        (["cluster=nowhere"], "expected"),
        (["--nodes", "1", "cluster=taiwania2"], "cluster.account=null"),
    ],
)
def test_bad_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        doctor.main(words)


def test_login_node_needs_no_torch(tmp_path: Path) -> None:
    """Run the whole verb in a process, which then looks at what it imported."""
    heavy = "('torch', 'transformers', 'deepspeed', 'datasets')"
    code = (
        "import sys\nfrom launch import doctor\n"
        f"code = doctor.main(['--json', 'run_dir={tmp_path}/run'])\n"
        f"print(code, [name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert done.stderr.splitlines()[-1] == f"{found['exit_code']} []"
    topics = {finding["topic"] for finding in found["findings"]}
    assert topics == {"environment", "slurm", "files", "network", "artefacts"}
    assert any(f["what"].startswith(f"torch {torch.__version__}") for f in found["findings"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_of_this_machine(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--nodes", "1", "--timeout", "60", "cluster.gpus_per_node=2"]
    doctor.main([*words, f"run_dir={tmp_path}/run"])
    output = capfd.readouterr()
    found = json.loads(output.out)
    text = "\n".join(finding["what"] for finding in found["findings"])
    assert "2 ranks on 1 nodes reported" in text and "gloo within nodes" in text
    (folder,) = tmp_path.glob("doctor-*")
    assert str(folder) in output.err and len(list((folder / "nodes").glob("*.out"))) == 2
    assert doctor.main(["--json", "--read", str(folder)]) == found["exit_code"]
    assert json.loads(capfd.readouterr().out) == found
