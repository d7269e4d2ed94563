"""The reward model's stage: what it learns, on what, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from plain_loop import descend
from training_support import largest_difference, read_losses, read_masters, run_scenarios
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from launch import export
from launch.run_folder import CONFIG_FILE
from tokenizer.load import load_tokenizer
from trainer.config import load_config
from trainer.data.batches.collate import Batch, Example, Row, collate
from trainer.data.prepared.prepare import ensure_prepared, open_store
from trainer.errors import DataError
from trainer.losses.ranking import ranking_losses
from trainer.stages.reward import Reward, answer_ends

Vary = Callable[..., dict[str, Any]]

MODES: dict[str, dict[str, Any]] = {
    "full": {"mode": "full"},
    "freeze": {"mode": "freeze", "trainable_layers": 1, "trainable": "norm"},
    "lora": {"mode": "lora", "rank": 4, "alpha": 8.0},
    "qlora": {"mode": "qlora", "rank": 4, "alpha": 8.0},
}
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "offload": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_params": "cpu"},
}
# Trained by default; the slow test completes the product.
RUNS = [("full", "zero3"), ("freeze", "zero2"), ("lora", "zero2"), ("lora", "zero3")]
RUNS += [("qlora", "zero3")]
REST = [(m, e) for m in MODES for e in ENGINES if (m, e) not in RUNS]


def make_classifier(folder: Path, tokenizer: Path, architecture: dict[str, Any]) -> Path:
    """Write a random one-label classifier whose weights are as large as trained ones."""
    sizes = {"vocab_size": 448, "num_labels": 1, "initializer_range": 0.15, "pad_token_id": 0}
    config = AutoConfig.for_model(**{**architecture, **sizes})
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(
    tmp_path_factory: pytest.TempPathFactory, base_config: dict[str, Any], english_tokenizer: Path
) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    return make_classifier(folder, english_tokenizer, base_config["model"]["architecture"])


def start_from(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    values["model"] = {"name": "base", "path": str(folder)}
    values["tokenizer"]["path"] = None
    return values


def answered(source: Any, document: int) -> list[list[int]]:
    """Return the chosen and the rejected sequence up to the end of the answer."""
    ids, weights = source.document(document), source.document_weights(document)
    first = int(source.first_lengths[document])
    sides = [(ids[span], weights[span]) for span in (np.s_[:first], np.s_[first:])]
    return [own[: int(np.flatnonzero(factors)[-1]) + 1].tolist() for own, factors in sides]


def train_reward_plainly(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the weights after ``loop.max_steps`` in float64, each sequence scored alone."""
    config = load_config(values)
    path = str(config.model.path)
    model = AutoModelForSequenceClassification.from_pretrained(path).double().train()
    store = open_store(config.data, path)
    [source] = store.sources.values()

    def mean_loss(batch: Batch) -> torch.Tensor:
        assert batch.examples is not None
        losses = []
        for document in batch.examples.documents[batch.examples.sides > 0].tolist():
            scores = [
                model(input_ids=torch.tensor([ids])).logits[0, 0]
                for ids in answered(source, document)
            ]
            advance = scores[0] - scores[1] - float(source.margins[document])
            losses.append(
                -torch.log(torch.sigmoid(advance)) + config.stage["centering"] * sum(scores) ** 2
            )
        return torch.stack(losses).mean()

    return descend(model, config, store, mean_loss)


def test_update_hangs_on_no_split_and_equals_plain_pytorch(
    vary_preferences: Vary, tmp_path: Path, classifier: Path
) -> None:
    """Ranks, accumulation, micro-batch and packing against a float64 loop over single answers."""

    def vary(name: str, **changes: Any) -> dict[str, Any]:
        values = start_from(vary_preferences(tmp_path / name, **changes), classifier)
        values["stage"] |= {"use_margin": True, "centering": 0.05}
        return {"config": values}

    one = [
        vary("whole", loop__micro_batch_size=8),
        vary("accumulated", loop__micro_batch_size=1),
        vary("padded", loop__micro_batch_size=2) | {"explode": True},
    ]
    two = [vary("two", engine__zero_stage=3, loop__micro_batch_size=2)]
    for num_ranks, scenarios in ((1, one), (2, two)):
        done = run_scenarios(scenarios, num_ranks, tmp_path)
        assert done.returncode == 0, done.stdout
    expected = train_reward_plainly(one[0]["config"])
    for name in ("whole", "accumulated", "padded", "two"):
        # Adam brings the rounding of small gradients to the size of large ones: lr is 1e-3.
        assert largest_difference(expected, read_masters(tmp_path / name)) < 1e-5, name
    losses = read_losses(tmp_path / "whole")
    assert losses[5] < losses[1] - 0.02  # it did learn, so the comparison compares something


def tune(values: dict[str, Any], run_dir: Path, base: Path, mode: str, engine: str) -> Any:
    """Return the config of a short run."""
    values = start_from(copy.deepcopy(values), base)
    values["run_dir"], values["peft"] = str(run_dir), dict(MODES[mode])
    values["engine"] |= ENGINES[engine]
    values["loop"] |= {"max_steps": 12, "eval_chars": 100_000, "eval_every": 6}
    values["optim"]["lr"] = 2e-2 if mode in ("lora", "qlora") else 2e-3
    return values


@pytest.fixture(scope="module")
def train(
    preference_config: dict[str, Any], english_tokenizer: Path, tmp_path_factory: Any
) -> Callable[[list[tuple[str, str]]], Path]:
    """Return a function that trains reward models from a language model on two ranks."""
    folder = tmp_path_factory.mktemp("reward")
    architecture = preference_config["model"]["architecture"]
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    sizes = {"vocab_size": 448, "initializer_range": 0.15}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**architecture, **sizes})
    ).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(english_tokenizer).save_pretrained(folder / "base")

    def train_in(runs: list[tuple[str, str]]) -> Path:
        configs = [
            tune(preference_config, folder / "_".join(run), folder / "base", *run) for run in runs
        ]
        scenarios = [{"config": config, "split_everything": True} for config in configs]
        done = run_scenarios(scenarios, 2, folder)
        assert done.returncode == 0, done.stdout
        for config in configs:
            (Path(config["run_dir"]) / CONFIG_FILE).write_text(yaml.safe_dump(config))
        return folder

    return train_in


@pytest.fixture(scope="module")
def trained(train: Callable[[list[tuple[str, str]]], Path]) -> Path:
    """Train ``RUNS``; return the folder they are in."""
    return train(RUNS)


def records(run_dir: Path, split: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def assert_learnt(run_dir: Path) -> None:
    first, *_, last = (record["sources"]["pairs"] for record in records(run_dir, "eval"))
    assert last["loss"] < first["loss"] - 0.1, run_dir.name
    assert last["accuracy"] > max(first["accuracy"], 0.7), run_dir.name
    assert last["accuracy_low"] < last["accuracy"] <= last["accuracy_high"]


@pytest.mark.parametrize("run", RUNS, ids="_".join)
def test_learns_what_tells_answers_apart(trained: Path, run: tuple[str, str]) -> None:
    assert_learnt(trained / "_".join(run))


def test_zero2_and_zero3_learn_alike(trained: Path) -> None:
    two, three = read_losses(trained / "lora_zero2"), read_losses(trained / "lora_zero3")
    assert max(abs(two[s] - three[s]) for s in two) < 2e-5
    masters = (read_masters(trained / f"lora_{engine}") for engine in ("zero2", "zero3"))
    assert largest_difference(*masters) < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_adam")
def test_every_mode_learns_under_every_engine(
    trained: Path, train: Callable[[list[tuple[str, str]]], Path]
) -> None:
    train(REST)
    for mode in MODES:
        runs = [trained / f"{mode}_{engine}" for engine in ENGINES]
        for run in runs:
            assert_learnt(run)
            assert largest_difference(read_masters(runs[0]), read_masters(run)) < 1e-3, run.name


def held_out_sequences(values: dict[str, Any]) -> list[list[list[int]]]:
    """Return the chosen and the rejected sequences of the held-out pairs."""
    config = load_config(values)
    [source] = open_store(config.data, str(config.model.path)).sources.values()
    pairs = [answered(source, document) for document in source.document_ids(held_out=True)]
    return [[pair[side] for pair in pairs] for side in (0, 1)]


@pytest.mark.parametrize("run", [("full", "zero3"), ("lora", "zero2")], ids="_".join)
def test_plain_transformers_gives_the_evaluated_scores(
    trained: Path, tmp_path: Path, run: tuple[str, str]
) -> None:
    """Export, load as a classifier, score padded batches: the figures of the last evaluation."""
    run_dir = trained / "_".join(run)
    export.main([str(run_dir), str(tmp_path / "model")])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    values = yaml.safe_load((run_dir / CONFIG_FILE).read_text())
    sides = held_out_sequences(values)
    found = {}
    for padding_side in ("left", "right"):
        tokenizer.padding_side = padding_side
        with torch.no_grad():
            found[padding_side] = [
                model(**tokenizer.pad({"input_ids": side}, return_tensors="pt")).logits[:, 0]
                for side in sides
            ]
    for left, right in zip(found["left"], found["right"], strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=2e-5)
    chosen, rejected = (side.double() for side in found["right"])
    figures = records(run_dir, "eval")[-1]["sources"]["pairs"]
    assert figures["num_pairs"] == len(chosen) > 10
    assert figures["accuracy"] == (chosen > rejected).double().mean().item()
    assert figures["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    scores = torch.cat([chosen, rejected])
    stats = model.config.reward_mean, model.config.reward_std
    assert stats == pytest.approx((figures["reward_mean"], figures["reward_std"]), rel=1e-12)
    moments = scores.mean().item(), scores.std(correction=0).item()
    assert stats == pytest.approx(moments, abs=1e-5)
    losses = ranking_losses(chosen, rejected, None, Reward().centering)
    assert figures["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)


def test_evaluation_records_distribution_calibration_and_pairs(trained: Path) -> None:
    run_dir = trained / "full_zero3"
    num_pairs = records(run_dir, "eval")[-1]["sources"]["pairs"]["num_pairs"]
    histogram, calibration = records(run_dir, "plot")[-2:]
    assert {name: sum(n) for name, n in histogram["counts"].items()} == {
        "chosen": num_pairs, "rejected": num_pairs
    }  # fmt: skip
    assert sum(b["num"] for b in calibration["bins"]) == num_pairs
    rows = records(run_dir, "table")[-1]["rows"]
    margins = [row["margin"] for row in rows]
    assert len(rows) == 6 and margins == sorted(margins, reverse=True)
    assert all(row["chosen"].endswith("with thanks") for row in rows)
    assert not any("thanks" in row["rejected"] or "thanks" in row["prompt"] for row in rows)
    assert all(row["prompt"].endswith("?") for row in rows)
    last = records(run_dir, "train")[-1]
    assert last["margin"] == pytest.approx(last["chosen_reward"] - last["rejected_reward"])
    assert 0.5 < last["accuracy"] <= 1


def test_answers_are_scored_at_their_end() -> None:
    """Some templates write a line break behind the end token, which no model does."""
    pieces = [np.arange(1, 7), np.arange(1, 5), np.arange(1, 4)]
    weights = [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0]]
    examples = [Example((0, 0), 1, 5, 0.0), Example((0, 0), -1, 5, 0.0), Example((1, 0), 1, 6, 0.0)]
    factors = [np.array(own, np.float32) for own in weights]
    rows = [Row(pieces[:2], 0, 0, factors[:2], examples[:2]),
            Row(pieces[2:], 1, 0, factors[2:], examples[2:])]  # fmt: skip
    batch = collate(rows, length=16, pad_token_id=0, isolate=True)
    assert answer_ends(batch).tolist() == [3, 9, 1]
    empty = collate([Row([], -1, 0, examples=[])], length=16, pad_token_id=0, isolate=True)
    assert answer_ends(empty).tolist() == []  # of a rank that evaluates one pair less


def test_a_rank_without_held_out_pairs_evaluates_with_the_others(
    preference_config: dict[str, Any], english_tokenizer: Path, tmp_path: Path
) -> None:
    preference_config = copy.deepcopy(preference_config)
    preference_config["run_dir"] = str(tmp_path / "run")
    preference_config["loop"] |= {"max_steps": 1, "eval_chars": 1}  # one pair for two ranks
    done = run_scenarios([{"config": preference_config}], 2, tmp_path)
    assert done.returncode == 0, done.stdout
    assert records(tmp_path / "run", "eval")[-1]["sources"]["pairs"]["num_pairs"] == 1


def test_lone_answers_are_refused(
    preference_config: dict[str, Any], tmp_path: Path, english_tokenizer: Path
) -> None:
    rows = [{"prompt": f"{i}?", "completion": "yes", "label": i % 2 == 0} for i in range(10)]
    (tmp_path / "lone.json").write_text(json.dumps(rows))
    values = copy.deepcopy(preference_config)
    values["data"]["sources"]["lone"] = {"paths": [str(tmp_path / "lone.json")]}
    values["data"]["store_dir"] = str(tmp_path / "store")
    config = load_config(values)
    ensure_prepared(config.data, str(english_tokenizer))
    with pytest.raises(DataError, match=r"data\.sources\.lone: 10 of 10 rows are single answers"):
        Reward().settle(config)


def test_contradictions_are_named(preference_config: dict[str, Any]) -> None:
    config = load_config(preference_config)
    assert Reward().check(config) == []
    joined = dataclasses.replace(config.data, isolate_documents=False)
    problems = sorted(Reward(centering=-1.0).check(dataclasses.replace(config, data=joined)))
    assert len(problems) == 2
    assert problems[0].startswith("data.isolate_documents=false")
    assert problems[1].startswith("stage.centering=-1.0")
    chats = dataclasses.replace(config.data, content="conversations")
    [problem] = Reward().check(dataclasses.replace(config, data=chats))
    assert "stage=reward trains on preferences" in problem


def test_margins_that_go_unused_are_remarked(preference_config: dict[str, Any]) -> None:
    config = load_config(preference_config)
    [remark] = Reward().settle(config)[1]
    assert "data.sources.pairs are not used; stage.use_margin=true" in remark
    assert Reward(use_margin=True).settle(config)[1] == []


def test_tokenizer_of_the_run_has_the_template(preference_config: dict[str, Any]) -> None:
    config = load_config(preference_config)
    path = str(config.tokenizer.path)
    stage = Reward()
    stage.config = config
    assert load_tokenizer(path).chat_template is None
    assert "turn.content" in stage.load_tokenizer(path).chat_template
