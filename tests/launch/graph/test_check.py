"""Every pipeline of conf/ composes and passes its stages' checks before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch import ROOT
from launch.graph.check import check_sources, check_stages, compose_runs
from launch.graph.definition import Pipeline, names, read_pipeline
from trainer.errors import ConfigError


def compose(*words: str) -> tuple[Pipeline, Mapping[str, Any]]:
    pipeline = read_pipeline(words)
    return pipeline, compose_runs(pipeline)


@pytest.mark.parametrize("name", names())
def test_pipeline_passes_every_check(name: str, tmp_path: Path) -> None:
    pipeline, composed = compose(f"pipeline={name}", f"dir={tmp_path}")
    check_stages(pipeline, composed)
    for step, values in composed.items():
        assert values["run_dir"] == str(tmp_path / step)
        assert values["name"] == f"{name}-{step}" or values["name"].startswith(name)
    assert not list(tmp_path.iterdir())


def test_the_demo_is_the_whole_way(tmp_path: Path) -> None:
    _, composed = compose("pipeline=demo", f"dir={tmp_path}")
    stages = [values["stage"]["name"] for values in composed.values()]
    assert stages == ["pretrain", "vocab", "pretrain", "sft", "reward", "dpo", "ppo"]
    assert composed["vocab"]["cluster"]["gpus_per_node"] == 1  # it uses no ranks
    assert composed["base"]["cluster"]["gpus_per_node"] == 2


def test_problems_of_all_steps_are_found_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose("pipeline=demo", "ppo.stage.kl.ceof=1", "tuned.loop.epochs=-1", "base.run_dir=x")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("step base: run_dir: a pipeline decides it")
    assert lines[1] == "step tuned: loop.epochs=-1: expected more than 0"
    assert lines[2].startswith("step ppo: stage.kl.ceof is not a known key; did you mean stage.kl.")


def test_stages_are_checked_against_models_that_are_still_to_come(tmp_path: Path) -> None:
    words = ["ppo.stage.kl.coef=high", "dpo.data.max_length=4096", "reward.data.content=documents"]
    with pytest.raises(ConfigError) as caught:
        check_stages(*compose("pipeline=demo", f"dir={tmp_path}", *words))
    text = str(caught.value)
    assert "step ppo: stage.kl.coef='high': expected float, got str" in text
    assert "step dpo: data.max_length=4096 is longer than the model's" in text
    assert "step reward: data.content=documents, but stage=reward trains on preferences" in text
    assert len(text.splitlines()) == 3


def test_files_that_are_not_there_are_found_before_hours_are_spent(tmp_path: Path) -> None:
    words = ["dpo.data.sources.pairs.paths=[none.jsonl]", "base_tokenizer.paths=[away.txt]"]
    with pytest.raises(ConfigError) as caught:
        check_sources(*compose("pipeline=demo", f"dir={tmp_path}", *words))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("step dpo: data.sources.pairs: data source path 'none.jsonl'")
    assert lines[1].startswith("step base_tokenizer: paths: data source path 'away.txt'")
    assert len(lines) == 2
    check_sources(*compose("pipeline=demo", f"dir={tmp_path}"))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tuned.model.path=@{base}", "model.path=@{base} is a run folder; name a step that"),
        ("tuned.model.path=@{vocab}", "name @{vocab}/model"),
        ("out.run=@{vocab}", "export.run=@{vocab} is a vocabulary run"),
        ("out.run=@{letters}", "expected @{STEP} of a run"),
        ("out.adapter=true", "tuned has peft.mode=full; use peft=lora there"),
    ],
)
def test_references_must_lead_to_what_a_parent_writes(
    word: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "steps:\n"
        "  letters: {tokenizer: {paths: [a.txt], vocab_size: 300}}\n"
        '  base: {run: [stage=pretrain, "tokenizer.path=@{letters}"]}\n'
        "  vocab: {run: [stage=vocab, stage.vocab_size=9, model=folder, model.path=x]}\n"
        "  tuned: {run: [stage=sft, model=folder, model.path=x]}\n"
        '  out: {export: {run: "@{tuned}"}}\n'
    )
    with pytest.raises(ConfigError) as caught:
        compose(f"pipeline={file}", word)
    assert message in str(caught.value)


def test_submitting_a_pipeline_needs_no_torch(tmp_path: Path) -> None:
    """The refusal comes after every run is composed and drafted."""
    words = ["submit", "pipeline=demo", f"dir={tmp_path}/out", "cluster=local_slurm"]
    code = (
        "import sys; from launch.__main__ import dispatch; from trainer.errors import ConfigError\n"
        f"try: dispatch({words})\n"
        "except ConfigError as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'deepspeed', 'datasets'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert "does not have" in done.stdout, done.stdout
