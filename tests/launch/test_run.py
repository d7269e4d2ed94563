"""`kuroshio run` in one process: plan, frozen configs, refusals, single-process stages."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launch import agreement, run, run_folder
from launch.compose import compose_values
from launch.rendezvous import Rendezvous
from launch.summary import plan
from launch.tenancy import Stay
from launch.validation import Run, build_run
from trainer.config import RunConfig, load_config
from trainer.errors import STOP_FILE_CAUSE, ConfigError, DataError, StopRequestedError
from trainer.lease import Lease
from trainer.lives import read_lives
from trainer.stage import Context, Stage
from trainer.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
STAGE = """
from dataclasses import dataclass, field
from typing import ClassVar
from pathlib import Path
from trainer.stage import Stage

@dataclass(frozen=True)
class Note(Stage):
    name: ClassVar[str] = "note"
    single_process: ClassVar[bool] = True
    text: str = "default"
    must_differ: int = 1

    def check(self, config):
        same = self.must_differ == config.loop.seed
        return [f"stage.must_differ={self.must_differ} equals loop.seed"] if same else []

    def run(self, context):
        path = context.run_dir / "note"
        path.write_text(f"{self.text} {context.rank} {context.world_size}")
"""


@pytest.fixture(autouse=True)
def own_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pytest keep its signal handlers."""
    monkeypatch.setattr(run, "_leave_on_signals", lambda: None)


@pytest.fixture
def note_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a stage called ``note`` that runs in one process."""
    (tmp_path / "note_stage.py").write_text(STAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(STAGES, "note", "note_stage:Note")
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                "MASTER_PORT", "OMP_NUM_THREADS"):  # fmt: skip
        monkeypatch.setenv(key, "x")  # what a run exports is undone after the test
        monkeypatch.delenv(key)
    yield
    sys.modules.pop("note_stage", None)


def values(run_dir: Path, *overrides: str, **stage: Any) -> dict[str, Any]:
    composed = compose_values([f"run_dir={run_dir}", *overrides])
    return {**composed, "stage": {"name": "note", **stage}}


def write_config(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("note_stage")
def test_a_whole_config_runs_and_is_frozen_with_the_stages_defaults(tmp_path: Path) -> None:
    asked = write_config(tmp_path / "asked.yaml", values(tmp_path / "run"))
    assert run.main(["--config", asked]) == 0
    assert (tmp_path / "run" / "note").read_text() == "default 0 1"
    frozen = run_folder.read(tmp_path / "run" / "config.yaml")
    assert frozen["stage"] == {"name": "note", "text": "default", "must_differ": 1}


@pytest.mark.usefixtures("note_stage")
def test_a_frozen_config_runs_in_the_folder_it_lies_in(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    run.main(["--config", write_config(tmp_path / "asked.yaml", values(old))])
    old.rename(new)
    (new / "note").unlink()
    assert run.main(["--config", str(new / "config.yaml")]) == 0
    assert (new / "note").exists() and not old.exists()
    lives = read_lives(new)
    assert [(life["token"], life["exit_code"], life["reason"]) for life in lives] == [
        (1, 0, "finished"),
        (2, 0, "finished"),
    ]


@pytest.mark.usefixtures("note_stage")
def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = write_config(tmp_path / "asked.yaml", values(tmp_path / "run", text="hello"))
    assert run.main(["--dry-run", "--config", asked]) == 0
    assert "text=hello" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("note_stage")
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_problems_of_config_and_stage_stop_the_run_before_it_writes(
    tmp_path: Path, flags: list[str]
) -> None:
    asked = values(tmp_path / "run", "loop.seed=1", "engine.offload_params=cpu")
    with pytest.raises(ConfigError) as caught:
        run.main([*flags, "--config", write_config(tmp_path / "asked.yaml", asked)])
    assert "engine.offload_params=cpu needs ZeRO-3" in str(caught.value)
    assert "stage.must_differ=1 equals loop.seed" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("note_stage")
def test_of_several_ranks_one_runs_a_single_process_stage(tmp_path: Path) -> None:
    asked = values(tmp_path / "run", "cluster.gpus_per_node=2")
    other = Rendezvous(1, 2, 1, 2, "127.0.0.1", 1234, "slurm")
    assert run.run_rank(asked, other) == 0
    assert not (tmp_path / "run").exists()
    assert run.run_rank(asked, Rendezvous(0, 2, 0, 2, "127.0.0.1", 1234, "slurm")) == 0
    assert (tmp_path / "run" / "note").read_text() == "default 0 1"


@pytest.mark.usefixtures("note_stage")
def test_a_stop_is_recorded_before_any_rank_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun ends rank 0 as soon as another one has left, and then nobody knew of the stop."""

    def stop(context: Context) -> None:
        raise StopRequestedError(7, STOP_FILE_CAUSE)

    seen: list[Any] = []
    monkeypatch.setattr(agreement, "join", lambda *values: None)
    monkeypatch.setattr(agreement, "share_lease", lambda run_dir, lease: lease)
    monkeypatch.setattr(agreement, "part", lambda: seen.extend(read_lives(tmp_path)))
    monkeypatch.setattr("trainer.engine.engine.init_distributed", lambda *values: None)
    config = load_config(compose_values(["stage=pretrain", f"run_dir={tmp_path}"]))
    stay = Stay(tmp_path, 0, Lease(tmp_path, 1))
    found = Rendezvous(0, 1, 0, 1, "127.0.0.1", 29500, "plain")
    with pytest.raises(StopRequestedError):
        run._run_together(Run(config, SimpleNamespace(run=stop)), found, stay)  # type: ignore
    assert [(life["exit_code"], life["cause"]) for life in seen] == [(75, STOP_FILE_CAUSE)]


def test_a_secret_in_a_config_file_is_refused(tmp_path: Path) -> None:
    asked = values(tmp_path / "run", text="hf_" + "a1B2" * 8)
    with pytest.raises(ConfigError, match=r"stage\.text looks like a secret"):
        run.main(["--config", write_config(tmp_path / "asked.yaml", asked)])


def test_many_nodes_need_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(key, raising=False)
    asked = [f"run_dir={tmp_path}/run", "cluster.nodes=2", "cluster.gpus_per_node=2"]
    with pytest.raises(ConfigError, match=r"cluster\.nodes=2, but this process was started alone"):
        run.main(asked)


class Plain(Stage):
    """A stage that needs ranks."""


class Unprepared(Plain):
    """A stage whose data is not prepared."""

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        raise DataError("no tokens of text")


class Settled(Plain):
    """A stage that turns epochs into 7 steps."""

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        loop = dataclasses.replace(config.loop, max_steps=7)
        return dataclasses.replace(config, loop=loop), ["first", "second"]


def plan_of(*overrides: str, stage: type[Stage] = Plain) -> dict[str, str]:
    composed = load_config({**compose_values(overrides), "stage": {"name": "plain"}})
    return dict(plan(Run(composed, stage())))


def test_plan_counts_the_steps_of_epochs_once_the_data_is_prepared() -> None:
    words = [
        "loop.epochs=2", "loop.max_steps=0", "data.weights_are=epochs", "schedule=wsd",
        "schedule.warmup_share=0.03", "+data.sources.a={paths: [x.txt], weight: 3}",
    ]  # fmt: skip
    before = plan_of(*words, stage=Unprepared)
    assert before["length"] == "2 epochs: as many steps as the prepared data takes"
    assert before["remarks"] == "not prepared yet: no tokens of text"
    assert "3% of the run" in before["learning rate"] and "last 20%" in before["learning rate"]
    assert before["data"] == "3 x a: x.txt"
    after = plan_of(*words, stage=Settled)
    assert after["length"] == "2 epochs: 7 steps = 57,344 tokens"
    assert (after["remarks"], after[""]) == ("first", "second")


def test_plan_derives_what_no_key_sets() -> None:
    rows = plan_of(
        "cluster.nodes=2", "cluster.gpus_per_node=4", "loop.micro_batch_size=2",
        "data.max_length=1024", "loop.global_batch_tokens=65536", "loop.max_steps=50",
        "loop.save_every=20", "engine=zero3_offload", "schedule=wsd", "schedule.warmup_steps=5",
        "optim.lr=1e-3", "+data.sources.a={paths: [x.txt], weight: 3}",
        "+data.sources.b.paths=[y.txt]", "run_dir=nowhere/run",
    )  # fmt: skip
    assert rows["world size"] == "8 = 2 nodes x 4 ranks"
    assert rows["step"] == ("65,536 tokens = 64 rows of 1024 = 8 ranks x 4 micro-batches x 2 rows")
    assert rows["length"] == "50 steps = 3,276,800 tokens"
    assert rows["checkpoints"].startswith("every 20 steps (3 times)")
    assert rows["engine"] == "ZeRO-3, optimizer on cpu, parameters on cpu"
    assert (
        "5 steps of warm-up, decay over the last 10 steps, down to 0.0001"
        in (rows["learning rate"])
    )
    assert rows["data"] == " 75.0 % a: x.txt" and rows[""] == " 25.0 % b: y.txt"
    assert rows["folder"] == "nowhere/run (new)"


def test_plan_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size"):
        plan_of("cluster.gpus_per_node=3", "loop.global_batch_tokens=8192")
    with pytest.raises(ConfigError, match="must keep its global batch: use 2 ranks, which divide"):
        plan_of("cluster.gpus_per_node=3", "loop.global_batch_tokens=8192")
    batch = ("loop.global_batch_tokens=8192", "data.max_length=1024")
    with pytest.raises(ConfigError, match=r"keep its global batch: use loop\.micro_batch_size=2"):
        plan_of("cluster.gpus_per_node=4", "loop.micro_batch_size=4", *batch)


def test_plan_says_what_a_resumed_run_would_change(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}"]
    stage = {"stage": {"name": "plain"}}
    run_folder.claim(tmp_path, load_config({**compose_values(words), **stage}))
    assert plan_of(*words)["folder"] == f"{tmp_path} (exists: this would resume it)"
    folder = plan_of(*words, "engine=zero1")["folder"]
    assert "changed: engine.zero_stage 2 -> 1" in folder
    with pytest.raises(ConfigError, match="belongs to a run with another config"):
        plan_of(*words, "loop.seed=1")


def test_dry_run_itself_needs_no_torch() -> None:
    code = (
        "import sys, launch.run, launch.summary, launch.compose, launch.local\n"
        "print(sorted({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_build_run_refuses_a_stage_section_that_is_none() -> None:
    composed = compose_values([])
    del composed["stage"]
    with pytest.raises(ConfigError, match="stage is missing"):
        build_run(composed)


@pytest.mark.usefixtures("note_stage")
@pytest.mark.parametrize(("shared", "hidden"), [("false", 0o077), ("true", 0o027)])
def test_who_may_read_what_a_run_writes(tmp_path: Path, shared: str, hidden: int) -> None:
    run_dir = tmp_path / "run"
    content = values(run_dir, f"cluster.share_with_group={shared}")
    before = os.umask(0o022)
    try:
        run.main(["--config", write_config(tmp_path / "whole.yaml", content)])
        assert os.umask(0o022) == 0o022  # outside of a run it is the user's own
    finally:
        os.umask(before)
    written = [run_dir, *run_dir.rglob("*")]
    assert {"config.yaml", "lives.jsonl", "logs", "note"} <= {path.name for path in written}
    for path in written:
        mode = path.stat().st_mode & 0o777
        assert mode == (0o777 if path.is_dir() else 0o666) & ~hidden, path
