"""Every way of tuning a base, under ZeRO-2 and ZeRO-3: same losses, exact resume, true exports."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_support import largest_difference, read_losses, read_masters, run_scenarios
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from launch import export
from launch.run_folder import CONFIG_FILE
from trainer.config import ModelConfig, PeftConfig
from trainer.errors import ConfigError
from trainer.models.adapter_files import AdapterFiles
from trainer.models.adapters import apply_peft
from trainer.models.load import load_model, make_config

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "freeze": {"mode": "freeze", "trainable_layers": 1, "trainable": "norm"},
    "lora": {"mode": "lora"},
    "plus": {"mode": "lora", "b_lr_ratio": 16.0},
    "rslora": {"mode": "lora", "rslora": True, "train_embeddings": True},
    "dora": {"mode": "lora", "dora": True},
    "nf4": {"mode": "qlora"},
    "int8": {"mode": "qlora", "quantization": "int8"},
    "qdora": {"mode": "qlora", "dora": True, "train_embeddings": True},
}


def make_base(folder: Path, tokenizer: Path, architecture: dict[str, Any]) -> Path:
    """Write a random model whose weights are as large as trained ones."""
    config = AutoConfig.for_model(**architecture, vocab_size=448, initializer_range=0.15)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any], english_tokenizer: Path
) -> dict[str, Path]:
    """Return a tied and an untied base."""
    folder = tmp_path_factory.mktemp("bases")
    architecture = base_config["model"]["architecture"]
    return {
        name: make_base(
            folder / name,
            english_tokenizer,
            {**architecture, "tie_word_embeddings": name == "tied"},
        )
        for name in ("tied", "untied")
    }


# Trained by default; ``REST`` completes the product of stages, modes and ZeRO stages.
RUNS = [("pretrain", mode, 3) for mode in MODES]
RUNS += [("pretrain", mode, 2) for mode in ("lora", "nf4", "qdora")]
RUNS += [("sft", "full", 3), ("sft", "freeze", 2), ("sft", "lora", 2), ("sft", "nf4", 3)]
REST = [
    (stage, mode, zero_stage)
    for stage, modes in (("pretrain", list(MODES)), ("sft", ["full", "freeze", "lora", "nf4"]))
    for mode in modes
    for zero_stage in (2, 3)
    if (stage, mode, zero_stage) not in RUNS
]
Run = tuple[str, str, int]


def name_of(run: Run) -> str:
    return "_".join(map(str, run))


def base_of(mode: str) -> str:
    return "tied" if mode in ("rslora", "qdora") else "untied"


def tune(values: dict[str, Any], run_dir: Path, bases: dict[str, Path], run: Run) -> Any:
    """Return the config of a short run."""
    _, mode, zero_stage = run
    values = copy.deepcopy(values)
    values["run_dir"] = str(run_dir)
    values["model"] = {"name": "base", "path": str(bases[base_of(mode)])}
    values["tokenizer"]["path"] = None
    values["peft"] = dict(MODES[mode])
    is_adapter = MODES[mode]["mode"] in ("lora", "qlora")
    if is_adapter:
        values["peft"] |= {"rank": 4, "alpha": 8.0}
    values["engine"] |= {"zero_stage": zero_stage, "activation_checkpointing": mode == "qdora"}
    values["loop"] |= {"max_steps": 4, "save_every": 2}
    values["optim"]["lr"] = 1e-2 if is_adapter else 1e-3
    return values


@pytest.fixture(scope="module")
def train(
    base_config: dict[str, Any], chat_config: dict[str, Any], bases: dict[str, Path]
) -> Callable[[list[Run], Path], None]:
    """Return a function that trains runs on two ranks, each in a folder of its name."""
    stages = {"pretrain": base_config, "sft": chat_config}

    def train_in(runs: list[Run], folder: Path) -> None:
        configs = [tune(stages[run[0]], folder / name_of(run), bases, run) for run in runs]
        scenarios = [{"config": config, "split_everything": True} for config in configs]
        done = run_scenarios(scenarios, 2, folder)
        assert done.returncode == 0, done.stdout
        for config in configs:
            (Path(config["run_dir"]) / CONFIG_FILE).write_text(yaml.safe_dump(config))

    return train_in


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, train: Callable[[list[Run], Path], None]
) -> Path:
    """Train ``RUNS``; return the folder they are in."""
    folder = tmp_path_factory.mktemp("trained")
    train(RUNS, folder)
    return folder


def assert_alike(left: Path, right: Path) -> None:
    two, three = read_losses(left), read_losses(right)
    assert two.keys() == three.keys() == {1, 2, 3, 4}
    assert max(abs(two[s] - three[s]) for s in two) < 2e-5, left.name
    assert largest_difference(read_masters(left), read_masters(right)) < 1e-4, left.name


@pytest.mark.parametrize("mode", ["lora", "nf4", "qdora"])
def test_zero2_and_zero3_train_alike(trained: Path, mode: str) -> None:
    assert_alike(trained / f"pretrain_{mode}_2", trained / f"pretrain_{mode}_3")


@pytest.mark.slow
def test_every_mode_and_stage_trains_alike_under_zero2_and_zero3(
    trained: Path, train: Callable[[list[Run], Path], None]
) -> None:
    train(REST, trained)
    pairs = {(stage, mode) for stage, mode, _ in RUNS + REST}
    assert len(pairs) == 13
    for stage, mode in pairs:
        assert_alike(trained / f"{stage}_{mode}_2", trained / f"{stage}_{mode}_3")


@pytest.mark.parametrize("run", RUNS, ids=name_of)
def test_every_run_learns(trained: Path, run: Run) -> None:
    losses = read_losses(trained / name_of(run))
    assert min(losses[3], losses[4]) < losses[1]


def test_only_what_is_tuned_is_saved(trained: Path) -> None:
    kinds = {
        mode: {name.rpartition(".default")[0].rpartition(".")[2] or name for name in saved}
        for mode in MODES
        for saved in [read_masters(trained / f"pretrain_{mode}_3")]
    }
    assert kinds["lora"] == kinds["nf4"] == kinds["int8"] == {"lora_A", "lora_B"}
    assert kinds["dora"] == {"lora_A", "lora_B", "lora_magnitude_vector"}
    whole = {"base_model.model.model.embed_tokens.weight"}
    assert kinds["qdora"] == kinds["dora"] | whole and kinds["rslora"] == kinds["lora"] | whole
    assert {name.split(".")[2] for name in kinds["freeze"] if ".layers." in name} == {"0", "1"}
    first = {name for name in kinds["freeze"] if ".layers.0." in name}
    assert len(first) == 2 and all("norm" in name for name in first)


def test_quantised_base_learns_like_the_unquantised(trained: Path) -> None:
    losses = {mode: read_losses(trained / f"pretrain_{mode}_3") for mode in ("lora", "nf4", "int8")}
    assert max(abs(losses["int8"][s] - losses["lora"][s]) for s in range(1, 5)) < 2e-3
    assert max(abs(losses["nf4"][s] - losses["lora"][s]) for s in range(1, 5)) < 3e-2
    assert losses["nf4"] != losses["int8"] != losses["lora"]


def test_lora_plus_moves_the_b_matrices_faster(trained: Path) -> None:
    plain, plus = (
        read_masters(trained / "pretrain_lora_3", 2),
        read_masters(trained / "pretrain_plus_3", 2),
    )
    for name in (n for n in plain if ".lora_B." in n):  # B starts at zero
        assert 8 < float(plus[name].norm() / plain[name].norm()) < 24, name
    # A has no gradient in the first step, where B is zero, and the same one but for size after it.
    ratios = [float(plus[n].norm() / plain[n].norm()) for n in plain if ".lora_A." in n]
    assert all(0.98 < ratio < 1.02 for ratio in ratios)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 43)[None]).logits[..., :400]


def load_base(folder: Path, quantization: str) -> Any:
    model = ModelConfig(name="base", path=str(folder))
    config = make_config(model, 400, {})
    return load_model(model, config, torch.float32, 0, None, quantization)


ADAPTERS = [mode for mode in MODES if MODES[mode]["mode"] in ("lora", "qlora")]


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    """Export every run that was tuned under ZeRO-3: merged, and adapters alone."""
    for mode in MODES:
        run = str(trained / f"pretrain_{mode}_3")
        export.main([run, str(trained / f"{mode}_merged")])
        if mode in ADAPTERS:
            export.main([run, str(trained / f"{mode}_adapter"), "--adapter"])
    for mode in ("nf4", "int8", "qdora"):
        run, out = str(trained / f"pretrain_{mode}_3"), str(trained / f"{mode}_dequantized")
        export.main([run, out, "--base", "dequantized"])
    return trained


@pytest.mark.parametrize("mode", ADAPTERS)
def test_merged_model_computes_what_peft_does(
    exported: Path, bases: dict[str, Path], mode: str
) -> None:
    from peft import PeftModel

    base = bases[base_of(mode)]
    merged = AutoModelForCausalLM.from_pretrained(exported / f"{mode}_merged")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits_of(plain)
    adapted = PeftModel.from_pretrained(plain, exported / f"{mode}_adapter")
    expected = logits_of(adapted)
    assert (expected - before).abs().max() > 1e-2
    assert torch.equal(logits_of(adapted.merge_and_unload()), logits_of(merged))
    # Logits of up to 5: the merged weights' own rounding.
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=5e-6)
    assert merged.config.tie_word_embeddings is (base_of(mode) == "tied")
    tokenizer = AutoTokenizer.from_pretrained(exported / f"{mode}_adapter")
    assert len(tokenizer) == 400


@pytest.mark.parametrize("mode", ["nf4", "int8", "qdora"])
def test_dequantised_merge_computes_what_training_did(
    exported: Path, bases: dict[str, Path], mode: str
) -> None:
    from peft import PeftModel

    quantised = load_base(bases[base_of(mode)], MODES[mode].get("quantization", "nf4"))
    expected = logits_of(PeftModel.from_pretrained(quantised, exported / f"{mode}_adapter"))
    merged = AutoModelForCausalLM.from_pretrained(exported / f"{mode}_dequantized")
    assert (logits_of(merged) - expected).abs().max() < 2e-6 * expected.abs().max()
    other = AutoModelForCausalLM.from_pretrained(exported / f"{mode}_merged")
    assert (logits_of(other) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_our_layers_compute_what_those_of_bitsandbytes_do(
    bases: dict[str, Path], kind: str
) -> None:
    from peft.utils.integrations import dequantize_bnb_weight

    settings = BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        bases["untied"], quantization_config=settings, dtype=torch.float32
    )
    ours = load_base(bases["untied"], kind)
    for name, layer in theirs.named_modules():
        if "Linear" in type(layer).__name__ and name != "lm_head":
            stored = ours.get_submodule(name)
            assert torch.equal(stored.packed, layer.weight), name
            expected = dequantize_bnb_weight(layer.weight, vars(layer).get("state"))
            torch.testing.assert_close(stored.weight, expected, rtol=1e-6, atol=1e-7)
    assert type(ours.lm_head) is torch.nn.Linear


def test_tuned_chat_model_is_exported_with_its_stops(exported: Path, tmp_path: Path) -> None:
    export.main([str(exported / "sft_lora_2"), str(tmp_path / "chat")])
    generation = json.loads((tmp_path / "chat/generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert tokenizer.chat_template and tokenizer.eos_token_id in generation["eos_token_id"]
    card = (tmp_path / "chat/README.md").read_text()
    assert "stage `sft`" in card and "LoRA of rank 4" in card and "chat template" in card
    assert "base_model:" not in card and "bases0/untied" in card.replace("bases1", "bases0")


def test_adapter_of_a_run_is_continued_on_its_base_only(
    exported: Path, bases: dict[str, Path]
) -> None:
    files = AdapterFiles.open(exported / "dora_adapter")
    files.check_base(bases["untied"])
    with pytest.raises(ConfigError, match="was trained on"):
        files.check_base(bases["tied"])
    model = AutoModelForCausalLM.from_pretrained(bases["untied"])
    peft = PeftConfig(mode="lora", adapter=str(exported / "dora_adapter"))
    continued = apply_peft(model, peft, str(bases["untied"]))
    merged = AutoModelForCausalLM.from_pretrained(exported / "dora_merged")
    torch.testing.assert_close(logits_of(continued), logits_of(merged), rtol=0, atol=5e-6)


def test_what_a_run_does_not_hold_is_not_exported(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"peft.mode=full and has no adapter"):
        export.main([str(trained / "pretrain_full_3"), str(tmp_path / "out"), "--adapter"])
    with pytest.raises(ConfigError, match=r"of a peft=qlora run"):
        export.main([str(trained / "pretrain_lora_3"), str(tmp_path / "out"), "--base=dequantized"])


def test_base_that_changed_since_is_refused(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported / "pretrain_lora_3", run)
    kept = json.loads((run / "adapter/base.json").read_text())
    (run / "adapter/base.json").write_text(json.dumps({**kept, "identity": "0" * 64}))
    with pytest.raises(ConfigError, match="has changed since the run"):
        export.main([str(run), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="has changed since the run"):
        export.main([str(run), str(tmp_path / "out"), "--adapter"])


def resume(trained: Path, folder: Path, runs: list[Run], num_ranks: int) -> list[tuple[Path, Path]]:
    """Take back the last two steps of copies of runs and do them again."""
    scenarios, pairs = [], []
    for run in runs:
        left, right = trained / name_of(run), folder / name_of(run)
        shutil.copytree(left, right)
        shutil.rmtree(right / "checkpoints/step_00000004")
        config = yaml.safe_load((left / CONFIG_FILE).read_text())
        config["run_dir"] = str(right)
        if num_ranks == 1:
            config["engine"]["zero_stage"] = 5 - run[2]
        scenarios.append({"config": config, "split_everything": True})
        pairs.append((left, right))
    done = run_scenarios(scenarios, num_ranks, folder)
    assert done.returncode == 0, done.stdout
    return pairs


def test_resumed_run_equals_the_unbroken_one(trained: Path, tmp_path: Path) -> None:
    runs = [("pretrain", "dora", 3), ("pretrain", "int8", 3)]
    runs += [("pretrain", "qdora", 2), ("sft", "lora", 2), ("sft", "nf4", 3)]
    for left, right in resume(trained, tmp_path, runs, 2):
        assert largest_difference(read_masters(left), read_masters(right)) == 0, right.name
        assert read_losses(left) == read_losses(right), right.name


@pytest.mark.slow
def test_resumes_on_another_number_of_ranks_and_zero_stage(trained: Path, tmp_path: Path) -> None:
    runs = [("pretrain", "dora", 3), ("pretrain", "nf4", 2), ("pretrain", "qdora", 3)]
    for left, right in resume(trained, tmp_path, runs, 1):
        assert largest_difference(read_masters(left), read_masters(right)) < 1e-4, right.name
