"""A pipeline's file and the command line's words become steps with parents."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.graph.definition import ExportOptions, TokenizerOptions, names, read_pipeline
from trainer.errors import ConfigError

TEXT = """
# A test.
dir: {folder}
words:
  - &shared [engine=zero1, "data.store_dir=@{{dir}}/store"]
steps:
  letters: {{tokenizer: {{paths: [a.txt], vocab_size: 300}}}}
  base: {{run: [*shared, stage=pretrain, "tokenizer.path=@{{letters}}"]}}
  base_model: {{export: {{run: "@{{base}}", dtype: fp32}}}}
  judge: {{run: [*shared, stage=reward, "model.path=@{{base_model}}"]}}
  judge_model: {{export: {{run: "@{{judge}}"}}}}
  player:
    run:
      - stage=ppo
      - model.path=@{{base_model}}
      - "+stage.rewards.r={{kind: model, path: '@{{judge_model}}'}}"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT.format(folder=tmp_path / "out"), encoding="utf-8")
    return path


def test_parents_are_the_steps_that_words_name(file: Path, tmp_path: Path) -> None:
    pipeline = read_pipeline([f"pipeline={file}"])
    out = tmp_path / "out"
    assert {name: step.parents for name, step in pipeline.steps.items()} == {
        "letters": (),
        "base": ("letters",),
        "base_model": ("base",),
        "judge": ("base_model",),
        "judge_model": ("judge",),
        "player": ("base_model", "judge_model"),
    }
    assert pipeline.steps["base"].words == (
        "engine=zero1",
        f"data.store_dir={out}/store",
        "stage=pretrain",
        f"tokenizer.path={out}/letters",
    )
    assert pipeline.steps["base_model"].options == ExportOptions(f"{out}/base", "fp32")
    assert pipeline.steps["letters"].options == TokenizerOptions(["a.txt"], 300)
    assert pipeline.descendants("judge") == ["judge_model", "player"]


def test_later_words_win_for_all_runs_or_for_one(file: Path) -> None:
    words = [f"pipeline={file}", "engine=zero3", "judge.optim.lr=1e-3", "dir=elsewhere"]
    words += ["base_model.dtype=bf16", "letters.vocab_size=500", "+player.data.x.y=1"]
    steps = read_pipeline(words).steps
    runs = [step for step in steps.values() if step.kind == "run"]
    assert all([w for w in s.words if w.startswith("engine=")] == ["engine=zero3"] for s in runs)
    assert [s.name for s in runs if "optim.lr=1e-3" in s.words] == ["judge"]
    assert "+data.x.y=1" in steps["player"].words
    assert steps["base_model"].options == ExportOptions("elsewhere/base", "bf16")
    assert steps["letters"].options == TokenizerOptions(["a.txt"], 500)
    assert steps["base"].folder == Path("elsewhere/base")


def test_jobs_get_the_folder_from_the_root(file: Path) -> None:
    pipeline = read_pipeline([f"pipeline={file}", "dir=here"], absolute=True)
    assert pipeline.folder == Path.cwd() / "here"
    assert f"tokenizer.path={Path.cwd()}/here/letters" in pipeline.steps["base"].words


def test_steps_come_after_their_parents_else_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        'steps:\n  late: {run: ["model.path=@{early_model}"]}\n  other: {run: [stage=sft]}\n'
        '  early_model: {export: {run: "@{early}"}}\n  early: {run: [stage=sft]}\n'
    )
    assert list(read_pipeline([f"pipeline={path}"]).steps) == [
        "other",
        "early",
        "early_model",
        "late",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: {a: {run: ['model.path=@{b}']}}", "@{b} is no other step"),
        ("steps: {a: {run: ['model.path=@{a}']}}", "@{a} is no other step"),
        ("steps: {a1: {walk: []}, b1: {run: []}}", "expected one of run, export, tokenizer"),
        ("steps: {optim: {run: [stage=sft]}}", "optim.KEY=VALUE means the config's own keys"),
        ("steps: {a-b: {run: [stage=sft]}}", "use letters, digits and _"),
        ("steps: {a1: {run: [sft]}}", "'sft' is no KEY=VALUE"),
        ("step: {}\nsteps: {a1: {run: [stage=sft]}}", "step is not a known key; did you mean"),
        ("steps: {a1: {export: {run: x}}, b1: {run: [stage=sft]}}", "name one run as @{STEP}"),
        ("steps: {a1: {tokenizer: {paths: [x]}}, b1: {run: []}}", "vocab_size is missing"),
        ("dir: 'a b'\nsteps: {a1: {run: [stage=sft]}}", "use letters, digits and _ . / + - only"),
        ("steps: {}", "name at least one step"),
        ("steps: {a1: {tokenizer: {paths: [x]}}}", "name at least one step with `run`"),
        ("- 1", "holds no pipeline"),
        ("steps: {a1: 5, b1: {run: [stage=sft]}}", "steps.a1: expected one of run, export"),
        (
            'steps: {a1: {run: ["model.path=@{b1}"]}, b1: {run: ["model.path=@{a1}"]}}',
            "a circle: ",
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_pipeline([f"pipeline={path}"])
    assert message in str(caught.value)


def test_unknown_pipelines_are_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"expected demo\|taiwan .*did you mean demo"):
        read_pipeline(["pipeline=dem"])
    assert names() == ["demo", "taiwan"]
