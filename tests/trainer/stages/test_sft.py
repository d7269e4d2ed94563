"""Supervised fine-tuning: packed rows equal padded ones, weights, noise, samples, epochs."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plain_loop import train_plainly
from scenarios import explode
from training_support import largest_difference, read_losses, read_masters, run_scenarios

from tokenizer.load import load_tokenizer, num_ids
from trainer.config import RunConfig, load_config
from trainer.data.batches.collate import Batch
from trainer.data.batches.loader import TrainLoader
from trainer.data.prepared.prepare import open_store
from trainer.errors import ConfigError
from trainer.models.head import install_fused_head
from trainer.models.language_model import LanguageModel
from trainer.models.load import load_model, make_config
from trainer.sample_answers import choose_questions
from trainer.stages.pretrain import Pretrain
from trainer.stages.sft import Sft

ROOT = Path(__file__).resolve().parents[3]
Vary = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def config(chat_config: dict[str, Any]) -> RunConfig:
    return load_config(chat_config)


@pytest.fixture(scope="module")
def packed(config: RunConfig) -> Batch:
    """Return a batch whose rows hold several conversations."""
    loader = TrainLoader(
        open_store(config.data, str(config.tokenizer.path)), config.data, seed=0,
        rows_per_step=6, micro_batch_size=6, rank=0, world_size=1,
    )  # fmt: skip
    batch = next(iter(loader))
    assert len(batch.piece_lengths[0]) > 1 and max(map(len, batch.piece_lengths)) > 2
    return batch


@pytest.fixture
def model(config: RunConfig) -> LanguageModel:
    num_tokens = num_ids(load_tokenizer(str(config.tokenizer.path)))
    plain = load_model(config.model, make_config(config.model, num_tokens, {}), torch.float32, 0)
    install_fused_head(plain, num_tokens)
    return LanguageModel(plain, num_tokens).train()


def loss_of(model: LanguageModel, batch: Batch) -> torch.Tensor:
    return model(batch.input_ids, batch.position_ids, batch.labels, batch.weights)


def test_packed_and_padded_rows_give_the_same_loss_and_gradients(
    model: LanguageModel, packed: Batch
) -> None:
    padded = explode(packed)
    assert padded.num_targets == packed.num_targets
    results = []
    for batch in (packed, padded):
        model.zero_grad()
        loss = loss_of(model, batch) / batch.num_targets
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (one, grads), (other, other_grads) = results
    assert one == pytest.approx(other, abs=1e-5)
    for mine, theirs in zip(grads, other_grads, strict=True):
        assert (mine - theirs).abs().max() < 1e-5
    assert max(float(grad.abs().max()) for grad in grads) > 1e-3


def test_one_conversation_moves_no_bit_of_the_others(model: LanguageModel, packed: Batch) -> None:
    seen: list[torch.Tensor] = []
    head = model.decoder.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    loss_of(model, packed)
    start, stop = packed.piece_lengths[0][0], sum(packed.piece_lengths[0][:2])
    changed = packed.input_ids.clone()
    changed[0, start:stop] = (changed[0, start:stop] + 7) % 300
    loss_of(model, dataclasses.replace(packed, input_ids=changed))
    before, after = (head.weight @ hidden.transpose(1, 2) for hidden in seen)
    inside = torch.zeros(packed.input_ids.shape, dtype=torch.bool)
    inside[0, start:stop] = True
    real = torch.arange(packed.input_ids.shape[1]) < torch.tensor(
        [[sum(lengths)] for lengths in packed.piece_lengths]
    )
    same = (before == after).all(1)
    assert same[real & ~inside].all()
    assert not same[inside].any()


def test_same_parameters_for_every_split_zero_stage_and_packing(
    vary_chat: Vary, tmp_path: Path
) -> None:
    def scenario(name: str, zero_stage: int, **changes: Any) -> dict[str, Any]:
        return {"config": vary_chat(tmp_path / name, engine__zero_stage=zero_stage, **changes)}

    unpacked = {"data__packing": False}
    one = [
        scenario("packed_1", 0),
        scenario("packed_1_padded", 1) | {"explode": True},
        scenario("unpacked_1", 0, **unpacked),
    ]
    two = [
        scenario("packed_2_zero2", 2, loop__micro_batch_size=1),
        scenario("packed_2_zero3", 3),
        scenario("unpacked_2_zero3", 3, loop__micro_batch_size=1, **unpacked),
    ]
    for num_ranks, scenarios in ((1, one), (2, two)):
        done = run_scenarios(scenarios, num_ranks, tmp_path)
        assert done.returncode == 0, done.stdout
    for kind in ("packed", "unpacked"):
        expected = train_plainly(vary_chat(tmp_path, **(unpacked if kind == "unpacked" else {})))
        for run_dir in tmp_path.glob(f"{kind}_*"):
            assert largest_difference(expected, read_masters(run_dir)) < 2e-6, run_dir.name
        reference = read_masters(tmp_path / f"{kind}_1")
        for run_dir in tmp_path.glob(f"{kind}_*"):
            assert largest_difference(reference, read_masters(run_dir)) < 1e-6, run_dir.name
        losses = read_losses(tmp_path / f"{kind}_1")
        assert losses[5] < losses[1] - 0.02  # it did learn, so the comparison compares something


def records(run_dir: Path, split: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == split]


def test_noise_changes_training_and_no_evaluation(vary_chat: Vary, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"loop__max_steps": 2, "loop__eval_chars": 500}
    runs = [
        {"config": vary_chat(tmp_path / str(alpha), stage__neftune_alpha=alpha, **changes)}
        for alpha in (0.0, 10.0)
    ]
    done = run_scenarios(runs, 1, tmp_path)
    assert done.returncode == 0, done.stdout
    plain, noisy = tmp_path / "0.0", tmp_path / "10.0"
    first = [records(run_dir, "eval")[0]["sources"]["chat"]["loss"] for run_dir in (plain, noisy)]
    assert first[0] == first[1]
    assert abs(read_losses(plain)[1] - read_losses(noisy)[1]) > 1e-4


def test_run_as_a_user_starts_it(
    chat_config: dict[str, Any], vary_chat: Vary, tmp_path: Path
) -> None:
    """Two ranks, epochs, held-out questions; the same command finds its run again."""
    changes = {"loop__max_steps": 0, "loop__epochs": 1.5, "loop__eval_chars": 800}
    changes["engine__zero_stage"] = 3  # answers are then written by a gathered model
    values = vary_chat(
        tmp_path / "run", cluster__gpus_per_node=2, stage__sample_tokens=4, **changes
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "launch", "run", "--config", str(tmp_path / "run.yaml")]

    def launch(*more: str) -> str:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *more], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    config = load_config(values)
    store = open_store(config.data, str(config.tokenizer.path))
    loader = TrainLoader(
        store, config.data, seed=0, rows_per_step=8, micro_batch_size=1, rank=0, world_size=1
    )
    rows = loader.mixture.rows_per_epoch["chat"]
    steps = -(-3 * rows // 16)
    launch()
    frozen = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (frozen["loop"]["max_steps"], frozen["loop"]["epochs"]) == (steps, 1.5)
    last = records(tmp_path / "run", "train")[-1]
    assert last["step"] == steps and last["epoch"] == pytest.approx(8 * steps / rows)
    tokens = sum(b.num_tokens for b in islice(loader, 8 * steps))
    assert last["tokens"] == tokens
    assert 0.2 < last["trained_share"] < 0.9 and 0 < last["padding_share"] < 0.2
    [mixture] = [e for e in records(tmp_path / "run", "event") if e["event"] == "mixture"][1:]
    assert mixture["fill_share"] == loader.fill_shares()
    samples = records(tmp_path / "run", "sample")
    assert len(samples) == 4 and all(sample["prompt"].endswith("?\n") for sample in samples)
    tokenizer = load_tokenizer(str(tmp_path / "run/tokenizer"))
    assert "bos_token" in tokenizer.chat_template
    plan = " ".join(launch("--dry-run").split())
    assert f"1.5 epochs: {steps} steps" in plan and f"{rows} rows an epoch, 8 rows a step" in plan
    assert "(exists: this would resume it)" in plan


def test_prompts_are_asked_through_the_template(vary_chat: Vary, tmp_path: Path) -> None:
    values = vary_chat(tmp_path, data__system="Be short.")
    config = load_config(values)
    stage = Sft()
    stage.config = config
    tokenizer = stage.load_tokenizer(str(config.tokenizer.path))
    prepared = load_config(vary_chat(tmp_path)).data  # given questions need no other store
    store = open_store(prepared, str(config.tokenizer.path))
    [(shown, ids)] = choose_questions(config, tokenizer, store, ["Is it cold?"])
    assert shown == "Is it cold?"
    assert tokenizer.decode(ids[1:]).strip() == "Be short.\n\nIs it cold?"


def test_settling_epochs(vary_chat: Vary, tmp_path: Path) -> None:
    def settle(**changes: Any) -> tuple[RunConfig, list[str]]:
        return Sft().settle(load_config(vary_chat(tmp_path, **changes)))

    config, remarks = settle(loop__max_steps=0, loop__epochs=3.0)
    steps = config.loop.max_steps
    assert steps > 5 and len(remarks) == 1
    again, _ = Sft().settle(config)
    assert again == config  # a frozen config means the same run
    assert settle(loop__max_steps=0, loop__epochs=6.0)[0].loop.max_steps in (
        2 * steps - 1,
        2 * steps,
    )
    short, remarks = settle(loop__max_steps=4, loop__epochs=3.0)
    assert short.loop.max_steps == 4 and "ends the run earlier" in remarks[1]
    values = vary_chat(tmp_path, loop__max_steps=0, loop__epochs=3.0)
    values["data"]["sources"]["chat"]["weight"] = 2.0
    doubled, _ = Sft().settle(load_config(values))
    assert doubled.loop.max_steps in (2 * steps - 1, 2 * steps)


@pytest.mark.parametrize(
    ("mode", "lr", "num"), [("lora", 2e-5, 1), ("lora", 2e-4, 0), ("full", 2e-5, 0)]
)
def test_learning_rate_of_full_training_is_remarked_on_for_adapters(
    vary_chat: Vary, tmp_path: Path, mode: str, lr: float, num: int
) -> None:
    config = load_config(vary_chat(tmp_path, peft__mode=mode, optim__lr=lr))
    _, remarks = Sft().settle(config)
    assert len(remarks) == num
    assert all(f"optim.lr={lr:g} is little for peft.mode={mode}" in line for line in remarks)


def test_family_that_cannot_isolate_is_padded(vary_chat: Vary, tmp_path: Path) -> None:
    values = vary_chat(tmp_path)
    values["model"]["architecture"] = {"model_type": "bloom", "hidden_size": 32}
    config, remarks = Sft().settle(load_config(values))
    assert not config.data.packing
    assert "model_type=bloom does not keep the documents" in remarks[0]
    values["data"]["isolate_documents"] = False
    config, remarks = Sft().settle(load_config(values))
    assert config.data.packing and not remarks


def test_warns_of_a_small_data_set(
    vary_chat: Vary, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from trainer.data.batches.loader import make_mixture, make_rows
    from trainer.length import rows_per_step, warn_of_repetition

    for max_steps, expected in ((5, 0), (500, 1)):
        config = load_config(vary_chat(tmp_path, loop__max_steps=max_steps))
        store = open_store(config.data, str(config.tokenizer.path))
        mixture = make_mixture(make_rows(store, config.data, 0), config.data, 0)
        warnings = warn_of_repetition(config, mixture, rows_per_step(config))
        assert len(warnings) == expected
    assert "loop.max_steps=500 passes" in warnings[0] and "data.sources.chat" in warnings[0]


def test_bad_values_are_named(vary_chat: Vary, tmp_path: Path) -> None:
    config = load_config(vary_chat(tmp_path))
    problems = Sft(sample_tokens=-1, neftune_alpha=-0.5).check(config)
    assert [line.split(":")[0] for line in problems] == [
        "stage.sample_tokens=-1",
        "stage.neftune_alpha=-0.5",
    ]
    [problem] = Pretrain().check(config)
    assert "data.content=conversations, but stage=sft trains on documents" in problem
    for changes, message in (
        ({"loop__max_steps": 0}, "loop.max_steps=0 is as long as loop.epochs"),
        ({"loop__epochs": 0.0}, "loop.epochs=0: expected more than 0"),
        ({"schedule__warmup_share": 1.5}, "schedule.warmup_share=1.5: expected 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(vary_chat(tmp_path, **changes))


def test_warm_up_as_a_share_of_the_run(vary_chat: Vary, tmp_path: Path) -> None:
    stage = Sft()
    changes = {"schedule__warmup_steps": 3, "schedule__warmup_share": 0.1, "optim__lr": 1.0}
    for max_steps, warmup in ((100, 10), (10, 3)):
        stage.config = load_config(vary_chat(tmp_path, loop__max_steps=max_steps, **changes))
        rates = [stage.lr(step) for step in range(max_steps)]
        assert rates.index(1.0) == warmup - 1
