"""Composition: what a command line becomes, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.compose import compose_config, compose_values
from launch.validation import build_run
from trainer.errors import ConfigError


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_values(overrides)
    return str(caught.value)


def test_overrides_reach_the_values() -> None:
    values = compose_values(["model=small", "loop.max_steps=7", "optim.betas=[0.8,0.9]"])
    assert values["model"]["architecture"]["hidden_size"] == 256
    assert values["loop"]["max_steps"] == 7
    assert values["optim"]["betas"] == [0.8, 0.9]
    assert values["name"] == "pretrain-small"
    assert values["run_dir"] == "runs/pretrain-small"


def test_composed_values_are_plain_and_hold_no_helper_key() -> None:
    values = compose_values(["data_root=/somewhere"])
    assert type(values) is dict and type(values["model"]["architecture"]) is dict
    assert "data_root" not in values and "defaults" not in values and "hydra" not in values


def test_every_field_can_be_set_though_the_option_does_not_list_it() -> None:
    values = compose_values(["peft=lora", "peft.rank=8", "schedule=wsd", "schedule.warmup_steps=5"])
    assert values["peft"] | {"mode": "lora", "rank": 8} == values["peft"]
    assert values["schedule"]["name"] == "wsd" and values["schedule"]["warmup_steps"] == 5


def test_a_source_can_be_added() -> None:
    values = compose_values(["+data.sources.mine.paths=[a.txt]"])
    assert values["data"]["sources"] == {"mine": {"paths": ["a.txt"]}}


def test_composition_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose_values(["model=tiny"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loop.max_step=3", "loop.max_step is not a known key; did you mean loop.max_steps?"),
        ("max_steps=3", "max_steps is not a known key; did you mean loop.max_steps"),
        ("lop.max_steps=3", "did you mean loop.max_steps"),
        ("modle=tiny", "modle is not a known key; did you mean model"),
        ("engine=zero9", "engine=zero9: expected zero0|zero1|"),
        ("schedule=cosin", "did you mean cosine?"),
        ("stage=pretrian", "did you mean pretrain?"),
        ("debug=null", "debug=null: to leave a group out"),
        ("zero3", "'zero3' is neither KEY=VALUE nor GROUP=OPTION; did you mean engine=zero3?"),
        ("name=[1", "name: its value cannot be read"),
        ("loop.seed=1,2", "loop.seed: several values at once"),
        ("model=llama2_7b", "model.path has no value; give model.path=FOLDER"),
        ("name='${stage.nme}'", "name: Interpolation key 'stage.nme' not found"),
    ],
)
def test_refused_with_reason_and_nearest_names(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_all_misspelt_keys_are_reported_at_once() -> None:
    message = refusal("loop.max_step=3", "optim.lrr=1", "loop.seed=1")
    assert message.count("is not a known key") == 2


def test_all_bad_options_and_words_are_reported_at_once() -> None:
    assert refusal("engine=zero9", "model=giant").count("expected") == 2
    assert len(refusal("abc", "def").splitlines()) == 2


def test_an_added_unknown_key_is_refused_with_all_other_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["+loop.max_step=3", "loop.seed=abc", "+data.sources.x.weigth=1"])
    message = str(caught.value)
    assert "loop.max_step is not a known key; did you mean max_steps?" in message
    assert "loop.seed='abc': expected int, got str" in message
    assert "data.sources.x.weigth is not a known key; did you mean weight?" in message
    assert "data.sources.x.paths is missing" in message


def test_problems_of_config_and_stage_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        build_run(compose_values(["stage.name=pretrian", "loop.seed=x", "peft.rank=y"]))
    message = str(caught.value)
    assert "stage.name='pretrian'" in message and "did you mean pretrain?" in message
    assert "loop.seed='x'" in message and "peft.rank='y'" in message


def test_composing_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from launch.compose import compose_values; compose_values(['model=small']);"
        "heavy = {'torch', 'deepspeed', 'transformers'} & set(sys.modules); print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize(
    "word",
    ["hydra/launcher=basic", "+hydra/launcher=submitit", "hydra.searchpath=[file:///tmp]",
     "+hydra.callbacks.x._target_=os.system", "hydra.run.dir=/tmp/x", "hydra.job.chdir=true",
     "~hydra", "hydra/job_logging=none", "++hydra.sweeper._target_=x"],
)  # fmt: skip
def test_keys_of_hydra_itself_are_refused(word: str) -> None:
    """Plugins, callbacks and search paths would let a command line name code to run."""
    assert "keys of Hydra itself" in refusal(word)


@pytest.mark.parametrize(
    ("word", "named"),
    [("+_target_=os.system", "_target_"), ("+model._target_=os.system", "model._target_"),
     ("+stage._target_=os.system", "stage._target_"), ("name={_target_: os.system}", "name="),
     ("+optim.x={_target_: os.system}", "optim.x"),
     ("+data.sources.x={_target_: os.system,paths: [a]}", "data.sources.x._target_"),
     ("+cluster.site={_target_: os.system}", "cluster.site._target_"),
     ("+data.sources.x={paths: [a],columns: {_target_: os.system}}", "")],
)  # fmt: skip
def test_a_config_names_no_code(word: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``_target_`` is refused as a key that nobody knows; where names are free it is a word."""
    ran: list[object] = []
    monkeypatch.setattr("os.system", ran.append)
    if named:
        with pytest.raises(ConfigError, match=f"{named}.*(is not a known key|expected str)"):
            build_run(compose_values([word]))
    else:
        config = compose_config([word])
        assert config.data.sources["x"].columns == {"_target_": "os.system"}
    assert ran == []
