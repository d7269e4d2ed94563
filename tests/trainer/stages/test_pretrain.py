"""Continued pretraining as a user runs it: signals, fine-tuning modes, evaluation, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_support import largest_difference, read_losses, read_masters, run_scenarios

from trainer.config import load_config
from trainer.errors import EXIT_RESUME, ConfigError
from trainer.held_out import describe_nll
from trainer.stages.pretrain import Pretrain

ROOT = Path(__file__).resolve().parents[3]
Vary = Callable[..., dict[str, Any]]


def start(config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """Start a run from a config file, as its own process."""
    path = folder / f"{Path(config['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "launch", "run", "--config", str(path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_the_same_command_goes_on(
    vary: Vary, tmp_path: Path, number: signal.Signals
) -> None:
    changes = {"loop__max_steps": 60, "cluster__gpus_per_node": 2, "engine__zero_stage": 2}
    config = vary(tmp_path / "run", **changes)
    process = start(config, tmp_path)
    journal = tmp_path / "run/metrics.jsonl"
    deadline = time.time() + 120
    while not (journal.exists() and len(read_losses(tmp_path / "run")) > 3):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_RESUME, output
    assert f"stopped by {number.name}" in output
    stopped_at = len(read_losses(tmp_path / "run"))
    assert 3 < stopped_at < 60
    again = start(config, tmp_path)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert "resume" in output
    assert read_losses(tmp_path / "run").keys() == set(range(1, 61))


def test_evaluation_does_not_depend_on_ranks(vary: Vary, tmp_path: Path) -> None:
    changes = {"loop__max_steps": 1, "loop__eval_chars": 3000}
    for num_ranks in (1, 2):
        config = vary(tmp_path / str(num_ranks), **changes)
        done = run_scenarios([{"config": config}], num_ranks, tmp_path)
        assert done.returncode == 0, done.stdout
    first, second = (evaluations(tmp_path / str(n)) for n in (1, 2))
    assert len(first) == len(second) == 2
    for one, two in zip(first, second, strict=True):
        assert one["num_tokens"] == two["num_tokens"] and one["num_chars"] == two["num_chars"]
        assert one["bits_per_character"] == pytest.approx(two["bits_per_character"], rel=1e-6)
        bits = one["loss"] * one["num_tokens"] / math.log(2)
        assert one["bits_per_character"] == pytest.approx(bits / one["num_chars"])
    # An untrained model knows nothing: about ln(400) nats a token.
    assert first[0]["loss"] == pytest.approx(math.log(400), rel=0.02)


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r["sources"]["en"] for r in map(json.loads, lines) if r["split"] == "eval"]


def test_nll_figures_by_hand() -> None:
    figures = describe_nll(nll=80 * math.log(2), num_tokens=10, num_chars=20, num_bytes=40)
    assert figures["loss"] == pytest.approx(8 * math.log(2))
    assert figures["perplexity"] == pytest.approx(256)
    assert (figures["bits_per_character"], figures["bits_per_byte"]) == pytest.approx((4, 2))


@pytest.fixture(scope="module")
def base_model(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any]
) -> Iterator[Path]:
    """Return a small exported model folder."""
    import copy

    from launch import export

    folder = tmp_path_factory.mktemp("base")
    config = copy.deepcopy(base_config)
    config["run_dir"] = str(folder / "run")
    config["loop"]["max_steps"] = 1
    done = run_scenarios([{"config": config}], 1, folder)
    assert done.returncode == 0, done.stdout
    (folder / "run/config.yaml").write_text(yaml.safe_dump(config))
    export.main([str(folder / "run"), str(folder / "model")])
    yield folder / "model"
    shutil.rmtree(folder)


def continued(vary: Vary, run_dir: Path, model: Path, **changes: Any) -> dict[str, Any]:
    config = vary(run_dir, **changes)
    config["model"] = {"name": "base", "path": str(model)}
    config["tokenizer"]["path"] = None
    return config


def test_two_phase_recipe_trains_embeddings_then_everything(
    vary: Vary, tmp_path: Path, base_model: Path
) -> None:
    from safetensors.torch import load_file

    freeze = continued(vary, tmp_path / "freeze", base_model, engine__zero_stage=2)
    freeze["peft"] = {"mode": "freeze", "trainable": "embed_tokens|lm_head"}
    zero3 = continued(vary, tmp_path / "zero3", base_model, engine__zero_stage=3)
    zero3["peft"] = freeze["peft"]
    plain = continued(vary, tmp_path / "plain", base_model)
    remat = continued(vary, tmp_path / "remat", base_model, engine__activation_checkpointing=True)
    runs = [freeze, zero3, plain, remat]
    done = run_scenarios([{"config": config} for config in runs], 2, tmp_path)
    assert done.returncode == 0, done.stdout
    trained = read_masters(tmp_path / "freeze")
    assert trained.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert largest_difference(trained, read_masters(tmp_path / "zero3")) < 1e-6
    before = load_file(base_model / "model.safetensors")
    assert all((trained[name] - before[name]).abs().max() > 1e-4 for name in trained)
    # Recomputed activations change nothing but memory.
    whole = read_masters(tmp_path / "plain")
    assert len(whole) > 10
    assert largest_difference(whole, read_masters(tmp_path / "remat")) < 1e-7


@pytest.mark.slow
def test_compiled_engine_trains_alike(vary: Vary, tmp_path: Path) -> None:
    runs = [
        vary(tmp_path / name, engine__zero_stage=2, engine__compile=name == "compiled")
        for name in ("eager", "compiled")
    ]
    done = run_scenarios([{"config": config} for config in runs], 1, tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stdout
    eager, compiled = (read_losses(tmp_path / name) for name in ("eager", "compiled"))
    assert max(abs(eager[s] - compiled[s]) for s in eager) < 1e-4


def test_contradictions_are_named_before_anything_is_loaded(vary: Vary, tmp_path: Path) -> None:
    config = vary(tmp_path / "run", data__max_length=512, loop__global_batch_tokens=4096)
    config["tokenizer"]["path"] = None
    config["peft"] = {"mode": "freeze", "trainable": "embed"}
    problems = "\n".join(Pretrain().check(load_config(config)))
    assert "data.max_length=512 is longer than the model's max_position_embeddings=256" in problems
    config["model"]["architecture"] = {"model_type": "gpt2", "n_positions": 256}
    assert problems.splitlines()[-1] in Pretrain().check(load_config(config))
    assert "tokenizer.path is null" in problems
    assert "peft.mode=freeze keeps weights as they are, but model.path is null" in problems


def test_regex_that_matches_nothing_is_refused(
    vary: Vary, tmp_path: Path, base_model: Path
) -> None:
    config = continued(vary, tmp_path / "run", base_model)
    config["peft"] = {"mode": "freeze", "trainable": "embed_tokenz"}
    done = run_scenarios([{"config": config}], 1, tmp_path)
    assert done.returncode != 0
    assert "peft.trainable='embed_tokenz' matches no parameter; names look like" in done.stdout


def test_tokenizer_of_another_model_is_refused_with_both_sizes(
    vary: Vary, tmp_path: Path, base_model: Path
) -> None:
    from tokenizer.load import save_tokenizer
    from tokenizer.train import train_base
    from trainer.data.prepared.prepare import ensure_prepared

    lines = (ROOT / "samples/en.jsonl").read_text(encoding="utf-8").splitlines()
    larger = train_base((json.loads(line)["text"] for line in lines), vocab_size=500)
    save_tokenizer(larger, tmp_path / "larger")
    config = continued(vary, tmp_path / "run", base_model)
    config["tokenizer"]["path"] = str(tmp_path / "larger")
    ensure_prepared(load_config(config).data, tmp_path / "larger")
    done = run_scenarios([{"config": config}], 1, tmp_path)
    assert done.returncode != 0
    assert "the tokenizer has 500 ids, the model 448 embedding rows" in done.stdout


def test_world_that_does_not_divide_the_batch_names_batches_that_do(vary: Vary) -> None:
    from trainer.config import grad_accum_steps

    config = load_config(vary(Path("run")))
    assert grad_accum_steps(config, 2) == 2
    with pytest.raises(
        ConfigError, match=r"global_batch_tokens=768 is not .*=576; use 576 or 1152"
    ):
        grad_accum_steps(config, 3)
