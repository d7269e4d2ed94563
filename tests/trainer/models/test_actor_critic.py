"""Actor, critic, reference and reward models in one engine, on two ranks under every ZeRO stage."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from trainer.config import PeftConfig
from trainer.models.adapters import apply_peft, keep_adapter_config
from trainer.models.export import write_adapter

COUNT = 40  # what the summed losses are divided by
TEMPERATURE = 0.7
LENGTHS = (10, 14)  # of the two sequences of every row
Results = Callable[[str], dict[str, Tensor]]


def make_rows(rank: int) -> dict[str, Tensor]:
    """Return two packed rows of a rank, [2, 24], whose answers are targets."""
    generator = torch.Generator().manual_seed(rank)
    input_ids = torch.randint(5, 400, (2, sum(LENGTHS)), generator=generator)
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS]).repeat(2, 1)
    labels = torch.full_like(input_ids, -100)
    for place in (slice(4, 10), slice(15 + rank, 24)):
        labels[:, place] = input_ids[:, place]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def answer_positions(labels: Tensor) -> Tensor:
    """Return the flat positions whose next token is a target."""
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return rows * labels.shape[1] + places


def actor_loss(logps: Tensor, entropies: Tensor) -> Tensor:
    factors = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    return (logps @ factors + 0.1 * entropies.sum()) / COUNT


def critic_loss(values: Tensor) -> Tensor:
    return ((values - 1) ** 2).sum() / COUNT


def run_one(scenario: dict[str, Any], folder: Path, rank: int) -> None:
    """Build the models, train them on the actor's and the critic's micro-batch, keep what came."""
    from tokenizer.load import load_tokenizer
    from trainer.config import load_config
    from trainer.policy import build_actor_critic
    from trainer.stage import Context

    config, options = load_config(scenario["config"]), scenario["options"]
    folder.mkdir(parents=True, exist_ok=True)
    context = Context(config, folder, rank, 2, rank)
    tokenizer = load_tokenizer(str(config.tokenizer.path))
    engine, _ = build_actor_critic(context, tokenizer, **options)
    ask = {"output": "logps", "temperature": TEMPERATURE}
    kept: dict[str, list[Tensor]] = {}
    for step in range(scenario["num_steps"]):
        for number in (0, 1):  # a micro-batch of one row each
            rows = {name: value[number : number + 1] for name, value in make_rows(rank).items()}
            inputs = {name: rows[name] for name in ("input_ids", "position_ids")}
            inputs["selected"] = answer_positions(rows["labels"])
            (logps, entropies), values = engine(
                part="both", **rows, **ask, with_entropy=True, selected=inputs["selected"]
            )
            # What is frozen may be asked between a forward and its backward.
            reference = engine(part="reference", **rows, **ask)
            names = options.get("rewards", {})
            scores = {f"score {n}": engine(part=f"reward:{n}", **inputs) for n in names}
            factor = 0.0 if scenario["held"] else 1.0
            total = factor * actor_loss(logps, entropies) + critic_loss(values)
            engine.backward(total, is_last=number == 1)
            engine.step(1e-2, held="actor." if scenario["held"] else None)
            found = {"logps": logps, "entropies": entropies, "values": values}
            for name, value in {**found, "reference": reference, **scores}.items():
                assert value.requires_grad == (name in found)
                kept.setdefault(f"later {name}" if step else name, []).append(value)
    out = {name: torch.cat(values).detach() for name, values in kept.items()}
    for fragment in engine.fragments():
        for kind, view in fragment.tensors().items():
            out[f"{kind} {fragment.name}@{fragment.offset}"] = view.detach().clone()
    save_file({k: v.contiguous() for k, v in out.items()}, folder / f"rank_{rank}.safetensors")


def run_as_rank(path: str) -> None:
    from launch.__main__ import leave
    from launch.agreement import part
    from trainer.engine.engine import init_distributed

    rank = int(os.environ["RANK"])
    init_distributed(rank, 300)
    for scenario in json.loads(Path(path).read_text()):
        run_one(scenario, Path(scenario["folder"]), rank)
    part()
    leave(0)


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any], english_tokenizer: Path
) -> dict[str, Path]:
    """Return a language model with dropout, which is to have no effect, and a reward model."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {"base": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
    for number, (name, auto) in enumerate(kinds.items()):
        sizes = {"vocab_size": 448, "initializer_range": 0.15, "attention_dropout": 0.5}
        config = AutoConfig.for_model(**base_config["model"]["architecture"], **sizes, num_labels=1)
        torch.manual_seed(number)
        auto.from_config(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(english_tokenizer).save_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = apply_peft(model, PeftConfig(mode="lora"), str(folder / "base"))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    keep_adapter_config(adapted, folder / "adapter", str(folder / "base"))
    write_adapter(trained, lambda n: trained[n].detach() + 0.02, folder / "adapter", torch.float32)
    return {name: folder / name for name in (*kinds, "adapter")}


def make_scenario(name: str, base: dict[str, Any], models: dict[str, Path], folder: Path) -> Any:
    """Return the scenario of a name: ZeRO stage, tuning, plan and the like."""
    words = name.split("_")
    config = copy.deepcopy(base)
    config["model"] = {"name": "base", "path": str(models["base"])}
    config["engine"] |= {"zero_stage": int(words[0])}
    config["engine"]["activation_checkpointing"] = "recomputed" in words
    if "offload" in words:
        config["engine"]["offload_optimizer"] = "cpu"
        config["engine"]["offload_params"] = "cpu" if words[0] == "3" else "none"
    config["peft"] = {"mode": words[1]}
    config["peft"] |= {"adapter": str(models["adapter"])} if "continued" in words else {}
    config["optim"] |= {"grad_clip": 0.0, "weight_decay": 0.1}
    options: dict[str, Any] = {"shared": "shared" in words}
    if words[1] == "full":
        options |= {"critic_path": str(models["reward"]), "rewards": {"r.1": str(models["reward"])}}
    return {
        "config": config,
        "options": options,
        "folder": str(folder / name),
        "num_steps": 1 if words[1] == "full" else 2,  # the value head begins at 0: adapters learn
        "held": "held" in words,
    }


def read_results(folder: Path) -> dict[str, Tensor]:
    """Return rank 0's outputs, and the fragments of both ranks joined."""
    ranks = [load_file(folder / f"rank_{rank}.safetensors") for rank in (0, 1)]
    found = {name: value for name, value in ranks[0].items() if "@" not in name}
    pieces: dict[str, dict[int, Tensor]] = {}
    for own in ranks:
        for key, value in own.items():
            name, at, offset = key.rpartition("@")
            if at:
                pieces.setdefault(name, {})[int(offset)] = value
    for name, parts in pieces.items():
        found[name] = torch.cat([parts[offset] for offset in sorted(parts)])
    return found


def run_all(names: list[str], base: Any, models: dict[str, Path], folder: Path) -> Results:
    from training_support import run_scenarios

    scenarios = [make_scenario(name, base, models, folder) for name in names]
    done = run_scenarios(scenarios, 2, folder, 600, Path(__file__))
    assert done.returncode == 0, done.stdout[-5000:]
    return lambda name: read_results(folder / name)


NAMES = [f"{stage}_lora_{plan}" for stage in (2, 3) for plan in ("separate", "shared")]
NAMES += ["2_lora_separate_continued", "3_lora_shared_continued"]
NAMES += ["3_lora_shared_recomputed", "0_full", "3_full", "2_full_held"]
SLOW_NAMES = ["0_lora_separate", "1_lora_shared", "1_full", "2_full", "2_full_offload"]
SLOW_NAMES += ["3_full_offload", "3_lora_shared_offload", "3_full_offload_held", "0_qlora_separate"]
SLOW_NAMES += ["3_qlora_shared_offload"]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any], models: dict[str, Path]
) -> Results:
    return run_all(NAMES, base_config, models, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def slow_results(
    tmp_path_factory: pytest.TempPathFactory,
    base_config: dict[str, Any],
    models: dict[str, Path],
    cpu_adam: None,
) -> Results:
    return run_all(SLOW_NAMES, base_config, models, tmp_path_factory.mktemp("slow_results"))


def of_critic(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the critic's parameters the same names under both plans."""
    renamed = {}
    for name, value in found.items():
        kind, _, parameter = name.partition(" ")
        if parameter.startswith("critic."):
            parameter = parameter.replace(".critic.weight", ".default.weight")
            parameter = parameter.replace("critic.decoder.", "critic.")
            parameter = parameter.replace("base_model.model.score.weight", "weight")
            name = f"{kind} {parameter}"
        renamed[name] = value
    return renamed


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    """Compare outputs, weights and moments, each relative to its size."""
    left, right = of_critic(left), of_critic(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        error = (value - right[name]).norm() / (right[name].norm() + 1e-12)
        assert error <= tolerance, (name, float(error))


def test_a_shared_backbone_computes_and_learns_as_separate_ones(results: Results) -> None:
    for stage in (2, 3):
        shared, separate = (results(f"{stage}_lora_{plan}") for plan in ("shared", "separate"))
        assert_same(shared, separate, 1e-6)
        assert torch.equal(shared["reference"], shared["logps"])  # adapters begin at 0
        moved = [name for name in shared if name.startswith("exp_avg critic.") and "lora_B" in name]
        assert len(moved) == 14 and all(shared[name].any() for name in moved)
    assert_same(results("3_lora_shared"), results("2_lora_shared"), 1e-5)


def test_recomputed_activations_are_those_of_the_adapter_that_was_on(results: Results) -> None:
    assert_same(results("3_lora_shared_recomputed"), results("3_lora_shared"), 1e-6)


def test_a_continued_adapter_is_compared_with_its_start(results: Results) -> None:
    found, new = results("3_lora_shared_continued"), results("3_lora_shared")
    assert_same(found, results("2_lora_separate_continued"), 1e-5)
    assert not torch.allclose(found["reference"], new["reference"], atol=1e-2)
    assert torch.equal(found["reference"], found["logps"])
    torch.testing.assert_close(found["later reference"], found["reference"])
    assert not torch.allclose(found["later logps"], found["logps"], atol=1e-2)
    learnt = {name.split(" ", 1)[1] for name in found if name.startswith("master ")}
    assert len(learnt) == 2 * 28 + 1 and not any("reference" in name for name in learnt)


def make_plain(path: Path, auto: Any) -> Any:
    return auto.from_pretrained(path, attention_dropout=0.0).double()


def score_alone(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """Return a classifier's outputs at the answers' positions, each sequence by itself."""
    states = []
    for row in rows["input_ids"]:
        for piece in row.split(LENGTHS):
            states.append(model.score(model.model(piece[None]).last_hidden_state)[0, :, 0])
    return torch.cat(states)[answer_positions(rows["labels"])]


def log_softmax_alone(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """Return log-probabilities [n, vocab] at the answers' positions, each sequence by itself."""
    logits = [model(p[None]).logits[0] for row in rows["input_ids"] for p in row.split(LENGTHS)]
    chosen = torch.cat(logits)[answer_positions(rows["labels"]), :400]
    return (chosen / TEMPERATURE).log_softmax(1)


def test_values_and_gradients_equal_plain_pytorch(
    results: Results, models: dict[str, Path]
) -> None:
    actor = make_plain(models["base"], AutoModelForCausalLM)
    critic = make_plain(models["reward"], AutoModelForSequenceClassification)
    total = torch.zeros((), dtype=torch.float64)
    outputs = []
    for rank in (0, 1):
        for number in (0, 1):
            rows = {name: value[number : number + 1] for name, value in make_rows(rank).items()}
            every, targets = log_softmax_alone(actor, rows), rows["labels"][:, 1:]
            logps = every.gather(1, targets[targets != -100][:, None])[:, 0]
            entropies, values = -(every.exp() * every).sum(1), score_alone(critic, rows)
            total += actor_loss(logps, entropies) + critic_loss(values)
            outputs.append({"logps": logps, "entropies": entropies, "values": values})
    total.backward()
    named = {f"exp_avg {name}": param.grad for name, param in actor.named_parameters()}
    named |= {f"exp_avg critic.decoder.{n}": p.grad for n, p in critic.named_parameters()}
    for name in ("0_full", "3_full"):
        found = results(name)
        assert torch.equal(found["reference"], found["logps"])
        assert torch.equal(found["score r.1"], found["values"])
        for key in outputs[0]:
            value = torch.cat([row[key] for row in outputs[:2]])  # rank 0's
            torch.testing.assert_close(found[key].double(), value, rtol=1e-5, atol=1e-6)
        moments = {key: value for key, value in found.items() if key.startswith("exp_avg ")}
        assert moments.keys() == named.keys()
        for key, grad in named.items():  # Adam's first moment is a tenth of the gradient
            error = (moments[key].double() * 10 - grad.flatten()).norm() / grad.norm()
            assert error < 1e-5, (name, key, float(error))


def assert_held(found: dict[str, Tensor], models: dict[str, Path]) -> None:
    """The critic has moved, the actor has not, not even by weight decay."""
    before = load_file(models["base"] / "model.safetensors")
    start = load_file(models["reward"] / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(found[f"master {name}"], value.flatten()), name
    for name, value in start.items():
        assert not torch.equal(found[f"master critic.decoder.{name}"], value.flatten()), name


def test_a_held_actor_stays_while_the_critic_learns(
    results: Results, models: dict[str, Path]
) -> None:
    assert_held(results("2_full_held"), models)


@pytest.mark.slow
def test_every_stage_and_offload_learns_alike(
    results: Results, slow_results: Results, models: dict[str, Path]
) -> None:
    for name in ("1_full", "2_full", "2_full_offload", "3_full_offload"):
        assert_same(slow_results(name), results("0_full"), 1e-5)
    for name in ("0_lora_separate", "1_lora_shared", "3_lora_shared_offload"):
        assert_same(slow_results(name), results("2_lora_shared"), 1e-5)
    assert_held(slow_results("3_full_offload_held"), models)
    shared, separate = "3_qlora_shared_offload", "0_qlora_separate"
    assert_same(slow_results(shared), slow_results(separate), 1e-5)


if __name__ == "__main__":
    run_as_rank(sys.argv[1])
