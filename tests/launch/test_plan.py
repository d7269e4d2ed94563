"""`kuroshio plan`: what it prints, refuses and reads, and that it does so without torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.inputs.llama_2_7b import LLAMA_2_7B
from launch import run_folder
from launch.compose import compose_config
from launch.plan import main
from launch.plan_inputs import WITHOUT_REFERENCE, read_work
from launch.plan_models import num_ids
from launch.planning import plan_config
from launch.report import plan_anew
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a model folder that has only its config.json yet."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_2_7B))
    return tmp_path


def words(model: Path, *more: str) -> list[str]:
    return ["model=llama2_7b", f"model.path={model}", "cluster=taiwania2", *more]


LENGTH = ("data.max_length=2048", "loop.global_batch_tokens=1048576", "loop.max_steps=500")


def test_plan_needs_no_torch_and_finds_what_fits(model: Path) -> None:
    code = (
        "import sys; from launch.plan import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets'}; "
        "print('HEAVY', sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    asked = [*words(model, *LENGTH), "--fit", "--rows", "3", "cluster.site.quota_gb=1500"]
    done = subprocess.run(
        [sys.executable, "-c", code, *asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert "ways fit" in done.stdout and "never fit" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "kuroshio submit" in line)
    chosen = compose_config(line.split()[2:])  # the words run as they stand
    plan = plan_config(chosen)
    assert plan is not None and plan.problems == ()


def test_plan_that_does_not_fit_says_what_does(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(model, *LENGTH, "engine=zero0", "cluster.site.quota_gb=1500")
    assert main(asked) == ConfigError.exit_code
    shown = " ".join(capsys.readouterr().out.split())
    assert "GB on each V100-SXM2-32GB of 32 GB" in shown
    assert "the cheapest way that fits: engine.zero_stage=" in shown


def test_quota_is_named_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(model, *LENGTH), "--fit", "--rows", "1"]) == ConfigError.exit_code
    shown = capsys.readouterr().out
    assert shown.count("cluster.site.quota_gb=100") == 1 and "ways fit" in shown


def test_json_has_the_figures(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = words(model, *LENGTH, "peft=lora", "cluster.site.prices=[]")
    assert main([*asked, "--json", "--efficiency", "0.5"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trained_parameters"] == 39_976_960 == plan["checkpoint_bytes"] / 12
    assert plan["parameters"]["policy"]["embedding"] == 55296 * 4096
    assert plan["precision"] == "fp16" and plan["costs"] == []
    assert plan["hours"] > 0 and plan["num_jobs"] == 1 and plan["tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["engine.precision=bf16"], "engine.precision=bf16: V100-SXM2-32GB"),
        (["cluster.nodes=6"], "48 GPUs: gp2d gives a user 40 at most"),
        (["cluster.partition=gp9d"], "gtest, gp1d, gp2d, gp4d, express"),
    ],
)
def test_what_the_machine_has_not_is_refused(model: Path, asked: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        main(words(model, *asked))
    assert expected in str(refusal.value)


def test_bad_efficiency_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"--efficiency=40: expected"):
        main([*words(model), "--efficiency", "40"])


def test_epochs_leave_hours_unknown(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(words(model, "stage=sft", "peft=lora"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "their number is unknown" in shown and "loop.max_steps=N plans N steps" in shown


def parts(model: Path, *more: str) -> dict[str, Any]:
    plan = plan_config(compose_config(words(model, *more)))
    assert plan is not None
    return plan.as_dict()


def test_dpo_holds_a_reference_only_where_it_is_computed_beside(model: Path) -> None:
    cached = parts(model, "stage=dpo")
    assert list(cached["parameters"]) == ["policy"]
    streaming = parts(model, "stage=dpo", "stage.reference=streaming")
    assert list(streaming["parameters"]) == ["policy", "reference"]
    assert streaming["flops_per_step"] > 1.3 * cached["flops_per_step"]
    adapted = parts(model, "stage=dpo", "peft=lora")
    assert list(adapted["parameters"]) == ["policy"]
    alone = parts(model, "stage=dpo", "loss=simpo", "peft=lora")
    assert alone["flops_per_step"] < adapted["flops_per_step"]


def test_ppo_has_its_models(model: Path) -> None:
    judge = f"+stage.rewards.judge={{kind: model, path: {model}}}"
    four = parts(model, "stage=ppo", judge)
    assert list(four["parameters"]) == ["policy", "reference", "critic", "reward: judge"]
    assert four["trained_parameters"] > 13e9
    shared = parts(model, "stage=ppo", judge, "peft=lora", "stage.models=shared")
    assert list(shared["parameters"]) == ["policy", "reward: judge"]
    grpo = ("stage.advantage=grpo", "stage.responses_per_prompt=4", "peft=lora")
    assert list(parts(model, "stage=ppo", judge, *grpo)["parameters"]) == [
        "policy",
        "reward: judge",
    ]
    assert any("rollout" in part for part in parts(model, "stage=ppo", judge)["step_parts"])


def test_qlora_packs_the_base(model: Path) -> None:
    plain, packed = parts(model, "peft=lora"), parts(model, "peft=qlora")
    saved = plain["memory"]["weights: policy"] - packed["memory"]["weights: policy"]
    assert saved == pytest.approx((2 - 0.5159) * 32 * (4 * 4096**2 + 3 * 4096 * 11008), rel=1e-3)


def test_vocab_is_no_work_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage=vocab"]) == 0
    assert "one process without a GPU" in capsys.readouterr().out


def test_rows_of_a_new_model_come_from_its_tokenizer(tmp_path: Path) -> None:
    described = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 99}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    assert num_ids(tmp_path) == 100
    work = read_work(compose_config([f"tokenizer.path={tmp_path}", "data=samples"]))
    assert work is not None and work.models[0].config["vocab_size"] == 128
    with pytest.raises(ConfigError, match=r"give \+model\.architecture\.vocab_size=ROWS"):
        read_work(compose_config(["data=samples"]))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="its ids cannot be counted"):
        num_ids(tmp_path)


def test_losses_without_a_reference_are_those_of_the_losses() -> None:
    from trainer.losses.preference import LOSSES

    without = {name for name, loss in LOSSES.items() if not loss.uses_reference}
    assert set(WITHOUT_REFERENCE) == without


def test_pipeline_is_planned_with_models_that_are_not_there(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = ["pipeline=demo", f"dir={tmp_path / 'demo'}", "cluster=taiwania2", "--json"]
    assert main(asked) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["steps"]) == ["base", "continued", "tuned", "reward", "dpo", "ppo"]
    rows = {name: step["parameters"] for name, step in plan["steps"].items()}
    # 700 rows of the tokenizer, then 1600 pieces and 2 more, in multiples of 64.
    assert rows["base"]["policy"]["embedding"] == 704 * 128
    assert rows["tuned"]["policy"]["embedding"] == 2368 * 128
    assert list(rows["ppo"]) == ["policy", "reference", "critic", "reward: manners"]
    assert plan["unknown"] == ["tuned", "reward", "dpo"] and plan["gpu_hours"] > 0
    small = [*asked[:3], "cluster.site.quota_gb=0.1"]
    assert main(small) == ConfigError.exit_code
    assert "all steps together leave" in capsys.readouterr().out


def test_run_that_was_not_submitted_is_planned_anew_for_its_report(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = compose_config(words(model, *LENGTH))
    (run_dir / "config.yaml").write_text(run_folder.freeze(config), encoding="utf-8")
    plan, again = plan_config(config), plan_anew(run_dir)
    assert plan is not None and again == plan.as_dict()
    (model / "config.json").unlink()
    assert plan_anew(run_dir) is None and "cannot be planned" in caplog.text
    (run_dir / "submit.json").write_text("{}")
    caplog.clear()
    assert plan_anew(run_dir) is None and not caplog.text  # the submission has its own


def test_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert len(commands) == 3
    for program, verb, *asked in commands:
        assert (program, verb) == ("kuroshio", "plan")
        assert main(asked) == 0
    assert "GPU-hours" in capsys.readouterr().out
