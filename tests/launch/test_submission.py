"""From a configuration to a job in the queue, with Slurm's commands played by scripts."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import job_folder, run_folder, sbatch, submission, submit
from launch.compose import compose_config, compose_values
from launch.job_folder import keep_settled
from trainer.deadline import name_ranks
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.lease import Lease
from trainer.lives import append_line, utc_now

WORDS = ["cluster=taiwania2", "cluster.account=MST109001", "+model.architecture.vocab_size=512"]
SBATCH = """#!/bin/sh
printf '%s\\n' "$@" >>"$FAKE/sbatch.calls"
env | grep '^SBATCH_\|^SLURM_' >>"$FAKE/sbatch.environment"
if [ -e "$FAKE/refuse" ]; then
  echo "sbatch: error: Batch job submission failed: $(cat "$FAKE/refuse")" >&2
  exit 1
fi
case "$1" in
  --test-only)
    [ -e "$FAKE/drained" ] && echo "allocation failure: not available" >&2 && exit 1
    echo "sbatch: Job 7 to start at 2026-11-20T10:00:00 using 8 processors on nodes n1" >&2 ;;
  *) echo $((40 + $(grep -c parsable "$FAKE/sbatch.calls")))
    echo "sbatch: MST109001 has 120 hours left" >&2 ;; # a site's plugin has its say
esac
"""
SCANCEL = """#!/bin/sh
echo "$*" >>"$FAKE/scancel.calls"
[ ! -e "$FAKE/deaf" ] || { echo "scancel: error: no controller" >&2; exit 1; }
"""
SQUEUE = """#!/bin/sh
for word in "$@"; do case $word in --jobs=*) job=${word#--jobs=} ;; esac; done
[ -e "$FAKE/state" ] && echo "$job $(cat "$FAKE/state")"
exit 0
"""


class FakeSlurm:
    """A folder with commands of Slurm that say what a test wants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)

    def say(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return FakeSlurm(folder)


@pytest.fixture(scope="module")
def compose() -> Callable[..., dict[str, Any]]:
    """Return a function that gives a run's plain config; each choice is composed once."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def values(*words: str) -> dict[str, Any]:
        if words not in known:
            known[words] = compose_values([*WORDS, *words])
        return json.loads(json.dumps(known[words]))  # type: ignore[no-any-return]

    return values


Compose = Callable[..., dict[str, Any]]


def test_a_submitted_run_has_all_that_its_job_needs(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "express")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    run_dir = tmp_path / "runs/a"
    assert submission.submit_run(compose(), run_dir, parents=["12"]) == "41"
    facts = job_folder.read_submission(run_dir)
    assert (facts["job_ids"], facts["cluster"], facts["parents"]) == (["41"], "taiwania2", ["12"])
    assert facts["plan"]["gpus_per_node"] == 8
    config = run_folder.read(run_dir / "config.yaml")
    assert config["run_dir"] == str(run_dir) and config["cluster"]["site"]["name"] == "taiwania2"
    assert (run_dir / "logs").is_dir()  # sbatch would lose the log of a job without one
    script = (run_dir / "job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --dependency=afterok:12\n" in script
    # SBATCH_PARTITION would win over the script; the count is of the job that we are in.
    assert slurm.read("sbatch.environment") == ""
    for path in (run_dir, run_dir / "code", run_dir / "config.yaml", run_dir / "submit.json"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_job_takes_over_where_slurm_is_and_nothing_else_of_it() -> None:
    kept = {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/home/me"}
    more = {"SLURM_NODEID": "1", "SRUN_DEBUG": "1", "SBATCH_QOS": "long"}
    assert sbatch.clean_environment(kept | more) == kept


def test_the_snapshot_runs_before_any_other_checkout(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    submission.submit_run(compose(), tmp_path / "run")
    code = tmp_path / "run/code"
    assert not list(code.rglob("__pycache__"))
    asked = "import launch, trainer; print(launch.ROOT, trainer.__file__)"
    (code / "launch/where.py").write_text(asked, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, code, "-m", "launch.where"],
        cwd=run_folder.__file__.rpartition("/launch/")[0],  # a checkout
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(code), str(code / "trainer/__init__.py")], done.stderr


def test_every_problem_is_named_at_once(compose: Compose, tmp_path: Path) -> None:
    values = compose("log=wandb")
    values["log"]["wandb"] = "online"
    values["cluster"] |= {"account": "nobody", "exclude": "n1;id"}
    values["cluster"]["site"] |= {"internet": False, "arch": "aarch64", "name": "elsewhere"}
    with pytest.raises(ConfigError) as refused:
        submission.draft(values, tmp_path / "run")
    message = str(refused.value)
    for word in ("cluster.account", "cluster.exclude", "log.wandb", "aarch64", "elsewhere.sh"):
        assert word in message
    assert not (tmp_path / "run").exists()


def test_a_run_that_does_not_fit_needs_force(compose: Compose, tmp_path: Path) -> None:
    values = compose()
    values["model"]["architecture"] |= {"hidden_size": 32768, "intermediate_size": 131072}
    with pytest.raises(ConfigError, match="--force"):
        submission.draft(values, tmp_path / "run")
    assert submission.draft(values, tmp_path / "run", must_fit=False).plan is not None


def test_a_model_that_a_parent_writes_is_not_read(compose: Compose, tmp_path: Path) -> None:
    values = compose()
    values["model"] |= {"architecture": None, "path": str(tmp_path / "later")}
    with pytest.raises(ConfigError):
        submission.draft(values, tmp_path / "run")
    assert submission.draft(values, tmp_path / "run", parents=["3"]).plan is None


def test_what_slurm_refuses_is_said_in_its_words(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    slurm.say("refuse", "QOSMaxSubmitJobPerUserLimit")
    with pytest.raises(ConfigError, match=r"Slurm refuses.*QOSMaxSubmitJobPerUserLimit"):
        submission.submit_run(compose(), tmp_path / "run")
    assert job_folder.read_submission(tmp_path / "run") == {}


@pytest.mark.parametrize("tasks", [0, 2])
def test_no_job_is_left_that_its_folder_does_not_know(
    slurm: FakeSlurm,
    compose: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tasks: int,
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("disk quota exceeded")

    monkeypatch.setattr(submission, "record", refuse)
    slurm.say("deaf", "")
    with pytest.raises(StorageError, match="quota"):
        if tasks:
            drafts = [submission.draft(compose(), tmp_path / f"{n}") for n in range(tasks)]
            submission.submit_array(drafts, tmp_path / "sweep", at_once=1)
        else:
            submission.submit_run(compose(), tmp_path / "run")
    assert slurm.read("scancel.calls") == "41\n"
    assert "scancel 41 failed: scancel: error: no controller" in caplog.text


@pytest.mark.parametrize("answer", ["sleep 5", "echo; echo hello"])
def test_a_job_that_may_be_in_the_queue_is_looked_for_first(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    (slurm.folder / "sbatch").write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
    monkeypatch.setattr(sbatch, "TIMEOUT_S", 0.5)
    with pytest.raises(ConfigError, match=r"squeue -u \$USER"):
        sbatch.submit_script(tmp_path / "job.sbatch")


def test_without_slurm_it_says_what_to_do(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"kuroshio run.*apt-get install slurm-client"):
        submission.submit_run(compose(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_has_one_job(slurm: FakeSlurm, compose: Compose, tmp_path: Path) -> None:
    submission.submit_run(compose(), tmp_path / "run")
    slurm.say("state", "PENDING\n")
    with pytest.raises(ConfigError, match=r"in use: its job 41 is PENDING.*scancel 41"):
        submission.submit_run(compose(), tmp_path / "run")
    slurm.say("state", "")
    assert submission.submit_run(compose(), tmp_path / "run") == "42"
    assert job_folder.read_submission(tmp_path / "run")["job_ids"] == ["41", "42"]


def test_a_living_run_keeps_its_folder(slurm: FakeSlurm, compose: Compose, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    Lease.take(run_dir, 1, {"job": None, "restart": 0}, utc_now())  # of this process
    with pytest.raises(ConfigError, match="in use"):
        submission.submit_run(compose(), run_dir)


def test_another_submission_may_change_machines_but_not_the_run(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    run_dir, values = tmp_path / "run", compose()
    values["loop"] |= {"epochs": 2.0, "max_steps": 0}
    submission.submit_run(values, run_dir)
    settled = run_folder.read(run_dir / "config.yaml")
    settled["loop"]["max_steps"] = 77  # what ranks count from the data
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settled), encoding="utf-8")
    append_line(run_dir, {"started": utc_now(), "token": 1})
    values["cluster"]["nodes"] = 2
    submission.submit_run(values, run_dir)
    frozen = run_folder.read(run_dir / "config.yaml")
    assert (frozen["loop"]["max_steps"], frozen["cluster"]["nodes"]) == (77, 2)
    assert job_folder.read_submission(run_dir)["changes"] == {"cluster.nodes": [1, 2]}
    values["loop"]["epochs"] = 3.0
    with pytest.raises(ConfigError, match=r"loop.epochs: 2.0 there, 3.0 now"):
        submission.submit_run(values, run_dir)


def test_a_run_that_never_began_may_become_another(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    run_dir, values = tmp_path / "run", compose()
    slurm.say("refuse", "Invalid qos")
    with pytest.raises(ConfigError, match="Invalid qos"):
        submission.submit_run(values, run_dir)
    (slurm.folder / "refuse").unlink()
    values["loop"]["seed"] = 8
    submission.submit_run(values, run_dir)
    # The ranks refused it: no life began, and the config has to be mended.
    append_line(run_dir, {"ended": utc_now(), "job": "41", "restart": 0, "exit_code": 78})
    values["loop"]["seed"] = 9
    submission.submit_run(values, run_dir)
    assert run_folder.read(run_dir / "config.yaml")["loop"]["seed"] == 9


def test_a_damaged_record_of_jobs_is_named(tmp_path: Path) -> None:
    (tmp_path / "submit.json").write_text("")  # of a node that lost power
    with pytest.raises(CheckpointError, match=r"submit\.json cannot be read.*bring it back"):
        job_folder.read_submission(tmp_path)


def test_settled_values_stay_where_the_wish_is_the_same() -> None:
    before = {"a": 0, "b": {"c": 1, "d": 2}, "gone": 1}
    now = {"a": 0, "b": {"c": 5, "d": 2, "new": 9}}
    settled = {"a": 10, "b": {"c": 11, "d": 12}}
    assert keep_settled(before, now, settled) == {"a": 10, "b": {"c": 5, "d": 12, "new": 9}}


def test_an_array_holds_a_run_for_each_task(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("low", "high")]
    drafts = [submission.draft(compose(), folder) for folder in folders]
    number = submission.submit_array(drafts, tmp_path / "sweep", at_once=1)
    [list_file] = (tmp_path / "sweep").glob("runs-*.txt")
    assert list_file.read_text().split() == [str(f) for f in folders]
    script = (tmp_path / "sweep/job.sbatch").read_text(encoding="utf-8")
    code = list_file.with_suffix("").name.replace("runs", "code")
    assert "#SBATCH --array=0-1%1\n" in script and f"CODE={tmp_path}/sweep/{code}\n" in script
    ids = [job_folder.read_submission(folder)["job_ids"] for folder in folders]
    assert ids == [[f"{number}_0"], [f"{number}_1"]]
    other = replace(drafts[1].config, cluster=replace(drafts[1].config.cluster, nodes=2))
    with pytest.raises(ConfigError, match="same machines"):
        submission.submit_array([drafts[0], replace(drafts[1], config=other)], tmp_path, 1)


def test_arrays_of_one_sweep_keep_their_lists_apart(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    """Tasks of the first may wait still, or be requeued, when the second is submitted."""
    scripts = []
    for name in ("low", "high"):
        draft = submission.draft(compose(), tmp_path / "sweep" / name)
        submission.submit_array([draft], tmp_path / "sweep", at_once=1)
        scripts.append((tmp_path / "sweep/job.sbatch").read_text(encoding="utf-8"))
    read = [re.search(r"p\" (\S+/runs-\w+\.txt)\)", script) for script in scripts]
    assert [Path(found[1]).read_text() for found in read if found] == [
        f"{tmp_path}/sweep/{name}\n" for name in ("low", "high")
    ]


def test_an_old_request_to_stop_does_not_end_a_new_job(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    submission.submit_run(compose(), tmp_path / "run")
    assert not (tmp_path / "run/stop").exists()


def test_a_job_is_queued_while_nodes_are_drained(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    slurm.say("drained", "")
    number, start = submission.submit_draft(submission.draft(compose(), tmp_path / "run"))
    assert number.isdigit() and start is None


def test_a_command_is_a_job_of_one_gpu(slurm: FakeSlurm, tmp_path: Path) -> None:
    cluster = compose_config([*WORDS, "cluster.nodes=4"]).cluster
    submission.submit_command(["export", "a", "b c"], tmp_path / "out", cluster, ["5"], "export")
    script = (tmp_path / "out/job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --gres=gpu:1\n" in script and "#SBATCH --nodes=1\n" in script
    assert "\"$CODE\" export a 'b c'" in script


def test_a_job_of_one_gpu_leaves_partitions_for_many(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    """There it would wait for ever, and what comes after it too."""
    words = ["cluster=nano4", "cluster.account=MST115002", "cluster.partition=16gpus"]
    cluster = compose_config([*words, "cluster.nodes=2", "cluster.time=12:00:00"]).cluster
    submission.submit_command(["export"], tmp_path / "out", cluster)
    script = (tmp_path / "out/job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --partition=dev\n" in script and "#SBATCH --time=0-04:00:00\n" in script
    values = compose_values([*words, "stage=vocab"])
    with pytest.raises(ConfigError, match=r"16gpus is for 8 GPUs or more.*partition=dev"):
        submission.draft(values, tmp_path / "vocab")


def test_a_job_submitted_by_hand_makes_its_folder(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**compose(), "run_dir": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match="SLURM_JOB_ID is not set"):
        submission.enter_job(values)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    slurm.say("state", "RUNNING\n")
    assert submission.enter_job(values) == tmp_path / "run"
    marker = tmp_path / "run/code/of_the_first_life"
    marker.touch()
    # Its next life finds what the first one copied, also after a default of conf/ has changed.
    values["loop"] = {**values["loop"], "log_every": 7, "seed": 99}
    assert submission.enter_job(values) == tmp_path / "run"
    assert marker.exists()
    assert run_folder.read(tmp_path / "run/config.yaml")["loop"]["seed"] != 99
    assert job_folder.read_submission(tmp_path / "run")["job_ids"] == ["9"]


def test_a_folder_that_cannot_be_written(
    slurm: FakeSlurm, compose: Compose, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        submission.submit_run(compose(), tmp_path / "file/run")


def test_the_login_node_never_loads_torch(slurm: FakeSlurm, tmp_path: Path) -> None:
    script = (
        "import sys; from launch.submit import main; main(sys.argv[1:]);"
        "print('heavy', {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *WORDS, f"run_dir={tmp_path}/run"],
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "heavy set()", done.stderr
    said = dict(line.split(maxsplit=1) for line in lines[:-1] if not line.startswith("remark"))
    assert said["job"] == "41" and said["folder"] == f"{tmp_path}/run"
    assert said["start"] == "2026-11-20 10:00:00 (estimate of Slurm)"
    assert said["follow"].startswith("kuroshio watch ")


def test_a_dry_run_prints_the_script_and_writes_nothing(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dry-run", *WORDS[:1], "--force", *WORDS[1:]]  # flags may stand anywhere
    assert submit.main([*words, f"run_dir={tmp_path}/run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=pretrain-tiny\n")
    assert not (tmp_path / "run").exists() and slurm.read("sbatch.calls") == ""


def test_a_whole_config_takes_no_overrides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no place beside it"):
        submit.main(["--config", "x.yaml", "loop.seed=1"])


@pytest.mark.parametrize(
    ("time", "measured", "seconds"),
    [
        ("01:00:00", {}, 300),
        (None, {}, 120),  # nobody knows the limit, which may be short
        ("00:04:00", {}, 120),
        ("01:00:00", {"step": 3.0}, 300),
        (None, {"step": 3.0, "evaluation": 50.0, "save": 200.0}, 60 + 50 + 400),
        ("00:10:00", {"step": 3.0, "save": 500.0}, 300),
    ],
)
def test_the_signal_comes_early_enough_for_a_save(
    time: str | None, measured: dict[str, float], seconds: int
) -> None:
    cluster = compose_config(["cluster=local_slurm"]).cluster
    assert submission.signal_seconds(replace(cluster, time=time), measured) == seconds


def test_a_run_that_has_saved_says_how_long_that_takes(compose: Compose, tmp_path: Path) -> None:
    ranks = compose()["cluster"]["gpus_per_node"]
    for step, save in ((2, 9.0), (10, 400.0)):
        folder = tmp_path / f"run/checkpoints/step_{step:08}"
        folder.mkdir(parents=True)
        seconds = {name_ranks(ranks, "V100"): {"step": 5.0, "save": save}}
        seconds |= {name_ranks(99, "V100"): {"save": 999.0}}
        state = {"state": {"seconds": seconds}}
        (folder / "manifest.json").write_text(json.dumps(state), encoding="utf-8")
    assert submission.draft(compose(), tmp_path / "run").job.signal_s == 60 + 5 + 800
    (folder / "manifest.json").write_text("", encoding="utf-8")  # of a node that lost power
    assert submission.draft(compose(), tmp_path / "run").job.signal_s == 60 + 5 + 18


def test_a_group_may_be_let_in(slurm: FakeSlurm, compose: Compose, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        submission.submit_run(compose("cluster.share_with_group=true"), tmp_path / "run")
    finally:
        os.umask(before)
    assert "\numask 027\n" in (tmp_path / "run/job.sbatch").read_text()
    for path in [tmp_path / "run", *(tmp_path / "run").glob("*")]:  # in code/, as in the checkout
        mode = path.stat().st_mode & 0o777
        assert mode & 0o027 == 0 and mode & 0o040, path


def test_keys_in_open_files_are_no_keys_for_a_job(
    compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x")
    (tmp_path / ".netrc").chmod(0o644)
    with pytest.raises(ConfigError, match=r"log.wandb=online: .*\.netrc can be read by others"):
        submission.draft(compose("log.wandb=online"), tmp_path / "run")
    (tmp_path / ".netrc").chmod(0o600)
    submission.draft(compose("log.wandb=online"), tmp_path / "run")
