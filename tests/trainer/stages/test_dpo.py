"""Stage dpo: every split, packing and reference alike; equal to plain PyTorch; bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_preferences import train_preferences_plainly
from training_support import largest_difference, read_losses, read_masters, run_scenarios

from trainer.config import load_config
from trainer.data.prepared.prepare import open_store
from trainer.data.prepared.store import TokenStore
from trainer.errors import DataError
from trainer.losses.preference import LOSSES
from trainer.preference_data import check_labels, refuse_lone_answers
from trainer.stages.dpo import Dpo, check_objective

Vary = Callable[..., dict[str, Any]]

OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.5},
    "ipo": {"beta": 0.2},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "orpo": {"odds_weight": 0.5},
    "kto": {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 0.9},
}


def records(run_dir: Path, split: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def test_same_parameters_for_every_split_zero_stage_and_packing(
    vary_dpo: Vary, tmp_path: Path
) -> None:
    def scenario(name: str, **changes: Any) -> dict[str, Any]:
        loss = name.partition("_")[0]
        changes["stage__objective"] = {"name": loss, **OBJECTIVES[loss]}
        if loss == "sigmoid":
            changes["stage__nll_weight"] = 0.3
        # At a high rate Adam's first steps would turn rounding into differences.
        return {"config": vary_dpo(tmp_path / name, optim__lr=1e-4, **changes)}

    unpacked: dict[str, Any] = {"data__packing": False, "loop__global_batch_tokens": 96 * 12}
    one = [scenario(name) for name in OBJECTIVES]
    one += [
        scenario("sigmoid_padded", engine__zero_stage=1) | {"explode": True},
        scenario("kto_padded", engine__zero_stage=2) | {"explode": True},
        scenario("sigmoid_unpacked", **unpacked),
    ]
    two = [
        scenario("kto_2_zero3", engine__zero_stage=3, loop__micro_batch_size=1),
        scenario("sigmoid_2_zero3", engine__zero_stage=3, loop__micro_batch_size=1),
        scenario("sigmoid_2_zero2", engine__zero_stage=2),
        scenario("kto_2_zero2", engine__zero_stage=2),
        scenario("sigmoid_unpacked_2_zero3", engine__zero_stage=3, **unpacked),
    ]
    for num_ranks, scenarios in ((1, one), (2, two)):
        # So that one rank and two each compute the reference.
        store = Path(scenarios[0]["config"]["data"]["store_dir"])
        shutil.rmtree(store / "reference", ignore_errors=True)
        done = run_scenarios(scenarios, num_ranks, tmp_path)
        assert done.returncode == 0, done.stdout
    for one_of in one:
        name = Path(one_of["config"]["run_dir"]).name
        if name.endswith("_padded"):
            continue
        expected = train_preferences_plainly(one_of["config"])
        for run_dir in tmp_path.glob(f"{name}*"):
            if ("unpacked" in name) == ("unpacked" in run_dir.name):
                difference = largest_difference(expected, read_masters(run_dir))
                assert difference < 2e-6, (run_dir.name, difference)
        losses = read_losses(tmp_path / name)
        assert losses[5] < losses[1] - 0.01  # it did learn, so the comparison compares something


MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "lora": {"mode": "lora", "rank": 4, "alpha": 8.0},
    "qlora": {"mode": "qlora", "rank": 4, "alpha": 8.0},
}
OFFLOAD = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"}
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "offload": OFFLOAD,
}
# Trained by default; ``REST`` completes the product.
TUNED = [("full", "offload"), ("lora", "zero2"), ("qlora", "zero3")]
REST = [(mode, engine) for mode in MODES for engine in ENGINES if (mode, engine) not in TUNED]


def tune(vary: Vary, folder: Path, runs: list[tuple[str, str]]) -> dict[str, dict[int, float]]:
    """Train on two ranks; return the losses by run."""
    scenarios = []
    for mode, engine in runs:
        # The data are few and easy: answers are told apart after some steps.
        rate = 1e-3 if mode == "full" else 1e-2
        values = vary(folder / f"{mode}_{engine}", optim__lr=rate, loop__max_steps=4)
        values["peft"] |= MODES[mode]
        values["engine"] |= ENGINES[engine]
        scenarios.append({"config": values})
    done = run_scenarios(scenarios, 2, folder)
    assert done.returncode == 0, done.stdout
    return {f"{mode}_{engine}": read_losses(folder / f"{mode}_{engine}") for mode, engine in runs}


def check_learning(losses: dict[str, dict[int, float]]) -> None:
    for name, run in losses.items():
        assert run[1] == pytest.approx(np.log(2), abs=1e-5), name
        assert run[4] < 0.6, name


@pytest.mark.usefixtures("cpu_adam")
def test_every_way_of_tuning_learns(vary_dpo: Vary, tmp_path: Path) -> None:
    check_learning(tune(vary_dpo, tmp_path, TUNED))


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_adam")
def test_every_way_of_tuning_learns_the_same_under_every_engine(
    vary_dpo: Vary, tmp_path: Path
) -> None:
    losses = tune(vary_dpo, tmp_path, TUNED + REST)
    check_learning(losses)
    for mode in MODES:
        first, *others = (losses[f"{mode}_{engine}"] for engine in ENGINES)
        for other in others:
            assert list(other.values()) == pytest.approx(list(first.values()), abs=1e-4), mode


def test_single_answers_are_learnt_and_measured(vary_dpo: Vary, tmp_path: Path) -> None:
    """KTO on good and bad answers of which no two share a prompt."""
    from trainer.data.prepared.prepare import ensure_prepared

    rows = [
        {
            "prompt": f"{number} is it cold?",
            "completion": f"yes {number % 7} " + ("with thanks" if number % 2 else "go away"),
            "label": bool(number % 2),
        }
        for number in range(60)
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"name": "kto", **OBJECTIVES["kto"]}
    changes = {"stage__objective": objective, "loop__eval_chars": 10_000}
    values = vary_dpo(tmp_path / "run", optim__lr=3e-3, **changes)
    values["data"]["sources"] = {"answers": {"paths": [str(path)]}}
    config = load_config(values)
    ensure_prepared(config.data, str(config.tokenizer.path))
    done = run_scenarios([{"config": values}], 1, tmp_path)
    assert done.returncode == 0, done.stdout
    first, last = (r["sources"]["answers"] for r in records(tmp_path / "run", "eval"))
    assert first["loss"] == pytest.approx(0.475, abs=0.02) and first["baseline"] < 1e-3
    assert last["loss"] < first["loss"] - 0.05 and last["accuracy"] > 0.9
    assert last["chosen_reward"] > 0.1 > -0.1 > last["rejected_reward"]
    store = open_store(config.data, str(config.tokenizer.path))
    with pytest.raises(DataError, match=r"sources.answers: 60 of 60 rows are single answers"):
        refuse_lone_answers(store, "loss=sigmoid")
    assert check_labels(store, config.data, 1.25, 1.0) == []


def test_labels_of_one_kind_are_refused_and_lopsided_ones_remarked_on(vary_dpo: Vary) -> None:
    config = load_config(vary_dpo(Path("unused")))
    store = open_store(config.data, str(config.tokenizer.path))
    [pairs] = store.sources.values()

    def labelled(first_lengths: Any, **changes: Any) -> TokenStore:
        lengths = np.asarray(first_lengths, np.uint32)
        source = dataclasses.replace(pairs, first_lengths=lengths, **changes)
        return dataclasses.replace(store, sources={"pairs": source})

    lengths = np.diff(pairs.offsets)
    for first, missing in ((lengths, "undesirable .label false."), (0 * lengths, "desirable")):
        with pytest.raises(DataError, match=f"needs both kinds of answers.* none is {missing}"):
            check_labels(labelled(first), config.data, 1.0, 1.0)
    # Every fifth one is good.
    mixed = labelled(np.where(np.arange(len(lengths)) % 5, 0, lengths))
    [remark] = check_labels(mixed, config.data, 1.0, 1.0)
    assert "to 1; 1 to 1.33 is recommended, such as stage.objective.desirable_weight=" in remark
    weight = float(remark.rpartition("=")[2])
    assert check_labels(mixed, config.data, weight, 1.0) == []
    same = np.zeros(len(lengths), np.uint64)
    with pytest.raises(DataError, match="rows have one prompt"):
        check_labels(labelled(pairs.first_lengths, text_hashes=same), config.data, 1.0, 1.0)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({}, "stage.objective.name=None: expected sigmoid|cdpo"),
        ({"name": "sigmod", "beta": 0.1}, "did you mean sigmoid"),
        ({"name": "sigmoid"}, "stage.objective.beta=None: loss=sigmoid needs a number"),
        ({"name": "sigmoid", "beta": 0}, "stage.objective.beta=0: expected more than 0"),
        ({"name": "sigmoid", "beta": 0.1, "gamma": 1.0}, "gamma is no hyperparameter of loss"),
        ({"name": "robust", "beta": 0.1, "label_smoothing": 0.5}, "less than 0.5"),
        ({"name": "simpo", "beta": 2.0, "gamma": -1.0}, "gamma=-1: expected 0 or more"),
    ],
)
def test_bad_objectives_are_named(objective: dict[str, Any], message: str) -> None:
    [problem] = check_objective(objective)
    assert message in problem


def test_contradictions_are_named(vary_dpo: Vary, tmp_path: Path) -> None:
    config = load_config(vary_dpo(tmp_path))
    objectives = {n: {"name": n, **OBJECTIVES.get(n, {"beta": 0.1})} for n in LOSSES}

    def check(name: str = "sigmoid", **fields: Any) -> str:
        return " ".join(Dpo(objective=objectives[name], **fields).check(config))

    assert check() == ""
    assert "stage.reference=cached has no effect: loss=simpo" in check("simpo", reference="cached")
    off = check(reference="adapter_off")
    assert "stage.reference=adapter_off, but peft.mode=full trains no adapter" in off
    assert "loss=orpo has that term already" in check("orpo", nll_weight=1.0)
    assert "loss=kto knows no chosen answer of a pair" in check("kto", nll_weight=1.0)
    assert "stage.nll_weight=-1.0: expected 0 or more" in check(nll_weight=-1.0)
    config = load_config(vary_dpo(tmp_path, data__isolate_documents=False))
    assert "lets the answers of a row see each other" in check()
    scratch = vary_dpo(tmp_path)
    scratch["model"] = {"name": "new", "architecture": {"model_type": "llama"}}
    config = load_config(scratch)
    assert "model.path is null: preferences tune a model that can answer" in check()
