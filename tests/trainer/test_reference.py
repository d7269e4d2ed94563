"""Reference log-probabilities on disk: what they are of, resuming, damage, and the three ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_support import largest_difference, read_losses, read_masters, run_scenarios

from trainer import reference_cache
from trainer.config import PeftConfig, load_config
from trainer.data.batches.mismatched import MismatchedAnswers
from trainer.data.prepared.prepare import open_store
from trainer.data.prepared.store import SourceStore
from trainer.errors import DataError
from trainer.losses.cross_entropy import IGNORE_INDEX
from trainer.reference import choose_reference
from trainer.reference_cache import Job, ReferenceCache

Vary = Callable[..., dict[str, Any]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(preference_config: dict[str, Any]) -> SourceStore:
    config = load_config(preference_config)
    return open_store(config.data, str(config.tokenizer.path)).sources["pairs"]


def make_cache(source: SourceStore, folder: Path, **changes: Any) -> ReferenceCache:
    third = MismatchedAnswers([source], max_length=96, packing=True, pad_token_id=0)
    job = Job(
        source=source, pad_token_id=0, max_length=96, packing=True, micro_batch_size=3,
        mismatched=third if changes.pop("mismatched", True) else None,
    )  # fmt: skip
    return ReferenceCache(folder, job, {"model": "m", "precision": "fp32", **changes})


class Model:
    """Stands for a model: a token's log-probability is -id/100 times a scale."""

    def __init__(self, scale: float = 1.0, dies_at: int = -1) -> None:
        self.scale, self.dies_at, self.num_passes = scale, dies_at, 0

    def __call__(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        self.num_passes += 1
        if self.num_passes == self.dies_at:
            raise KeyboardInterrupt
        targets = labels[:, 1:]
        return -self.scale * targets[targets != IGNORE_INDEX].float() / 100


def expected(source: SourceStore, document: int, side: int) -> float:
    first = int(source.first_lengths[document])
    span = np.s_[:first] if side > 0 else np.s_[first:]
    ids, weights = source.document(document)[span], source.document_weights(document)[span]
    return -float(ids[weights > 0].astype(float).sum()) / 100


def test_every_document_has_its_sums(source: SourceStore, tmp_path: Path) -> None:
    cache = make_cache(source, tmp_path)
    cache.compute(Model(), CPU, 0, 1)
    table = cache.open()
    assert table.shape == (len(source.text_hashes), 3) and table.dtype == np.float32
    for document in range(len(table)):
        sides = [expected(source, document, side) for side in (1, -1)]
        assert table[document, :2].tolist() == pytest.approx(sides, abs=1e-4)
    partner_answers = {round(expected(source, d, 1), 2) for d in range(len(table))}
    assert {round(float(x), 2) for x in table[:, 2]} <= partner_answers
    assert not (cache.folder / "parts").exists()
    assert make_cache(source, tmp_path, mismatched=False).folder != cache.folder


def test_two_ranks_share_the_parts(source: SourceStore, tmp_path: Path) -> None:
    alone, shared = make_cache(source, tmp_path / "1"), make_cache(source, tmp_path / "2")
    alone.compute(Model(), CPU, 0, 1)
    models = [Model(), Model()]
    assert len(shared.job.parts()) > 1
    with pytest.raises(FileNotFoundError):  # rank 0 joins before the other has begun: no barrier
        shared.compute(models[0], CPU, 0, 2)
    parts = {path.name for path in (shared.folder / "parts").iterdir()}
    assert parts == {f"{n:05d}.npy" for n in range(0, len(shared.job.parts()), 2)}
    shared.compute(models[1], CPU, 0, 1)
    assert np.array_equal(alone.open(), shared.open())


def test_goes_on_after_a_kill_with_what_is_missing(source: SourceStore, tmp_path: Path) -> None:
    whole = make_cache(source, tmp_path / "whole")
    counting = Model()
    whole.compute(counting, CPU, 0, 1)
    killed = make_cache(source, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.compute(Model(dies_at=counting.num_passes - 1), CPU, 0, 1)
    assert not killed.is_complete() and len(list((killed.folder / "parts").iterdir())) > 0
    rest = Model()
    killed.compute(rest, CPU, 0, 1)
    assert 0 < rest.num_passes < counting.num_passes / 2
    assert np.array_equal(whole.open(), killed.open())


def test_ranks_agree_on_what_is_missing(
    source: SourceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that sees a part which another does not see yet would else wait for it forever."""
    cache, first, second, third = make_cache(source, tmp_path), Model(), Model(), Model()
    monkeypatch.setattr(ReferenceCache, "_commit", lambda self, parts: None)
    cache.compute(first, CPU, 0, 1)
    cache.compute(second, CPU, 0, 1)
    monkeypatch.setattr(reference_cache, "max_over_ranks", lambda flags: [1] * len(flags))
    cache.compute(third, CPU, 0, 1)
    assert second.num_passes == 0 < third.num_passes == first.num_passes


def test_what_belongs_to_other_rows_is_refused(source: SourceStore, tmp_path: Path) -> None:
    cache = make_cache(source, tmp_path)
    cache.compute(Model(), CPU, 0, 1)
    cache.check(Model(), CPU, "fp32")
    with pytest.raises(DataError, match=r"not those of this model: .* nats a token apart; delete"):
        cache.check(Model(scale=1.1), CPU, "fp32")
    path = cache.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["identity"]["source"] = "pairs-of-somebody-else"
    manifest["identity"]["num_documents"] -= 1
    path.write_text(json.dumps(manifest))
    message = "belong to other rows or another model: source, num_documents differ .* delete"
    with pytest.raises(DataError, match=message):
        cache.open()
    path.write_text("{")
    with pytest.raises(DataError, match=r"manifest.json is damaged: .* delete"):
        cache.open()


def test_a_flipped_bit_is_found(source: SourceStore, tmp_path: Path) -> None:
    cache = make_cache(source, tmp_path)
    cache.compute(Model(), CPU, 0, 1)
    path = cache.folder / "logps.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"logps\.npy is damaged"):
        cache.open()


def test_the_folder_is_named_by_all_that_changes_numbers(
    source: SourceStore, tmp_path: Path
) -> None:
    caches = [make_cache(source, tmp_path)]
    caches += [make_cache(source, tmp_path, **{k: "x"}) for k in ("model", "precision", "adapter")]
    moved = dataclasses.replace(source, folder=Path("pairs-other"))
    caches.append(make_cache(moved, tmp_path))
    assert len({cache.folder for cache in caches}) == 5


@pytest.mark.parametrize(
    ("asked", "peft", "expected"),
    [
        ("auto", {"mode": "full"}, "cached"),
        ("auto", {"mode": "lora"}, "adapter_off"),
        ("auto", {"mode": "qlora"}, "adapter_off"),
        ("auto", {"mode": "lora", "train_embeddings": True}, "cached"),
        ("cached", {"mode": "lora"}, "cached"),
        ("streaming", {"mode": "full"}, "streaming"),
    ],
)
def test_auto_takes_the_way_that_fits(asked: Any, peft: dict[str, Any], expected: str) -> None:
    assert choose_reference(asked, PeftConfig(**peft)) == expected


def events(run_dir: Path) -> dict[str, Any]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return next(line for line in lines if line.get("event") == "reference")


def test_all_three_ways_give_the_same_losses(vary_dpo: Vary, tmp_path: Path) -> None:
    """And a second run, of another beta, computes nothing again."""
    lora = {"mode": "lora", "rank": 4, "alpha": 8.0}
    half = {"name": "sigmoid", "beta": 0.25}
    runs = {
        "full_cached": {"stage__reference": "cached"},
        "full_streaming": {"stage__reference": "streaming", "engine__zero_stage": 3},
        "full_cached_again": {"stage__reference": "cached", "stage__objective": half},
        "lora_cached": {"stage__reference": "cached", "peft": lora},
        "lora_off": {"stage__reference": "adapter_off", "peft": lora, "engine__zero_stage": 3},
    }
    scenarios = []
    for name, changes in runs.items():
        peft = changes.pop("peft", {})
        values = vary_dpo(tmp_path / name, loop__max_steps=3, **changes)
        values["peft"] |= peft
        values["data"]["store_dir"] = str(tmp_path / "store")
        scenarios.append({"config": values})
    store = Path(load_config(vary_dpo(tmp_path)).data.store_dir)
    (tmp_path / "store").mkdir()
    for folder in store.iterdir():  # prepared data, but no references
        if folder.name != "reference":
            (tmp_path / "store" / folder.name).symlink_to(folder)
    done = run_scenarios(scenarios, 2, tmp_path)
    assert done.returncode == 0, done.stdout
    for pair in (("full_cached", "full_streaming"), ("lora_cached", "lora_off")):
        one, other = (read_losses(tmp_path / name) for name in pair)
        assert one.keys() == other.keys() == {1, 2, 3}
        assert max(abs(one[step] - other[step]) for step in one) < 1e-6, pair
        left, right = (read_masters(tmp_path / name) for name in pair)
        assert largest_difference(left, right) < 1e-5
        assert one[3] < one[1] - 0.01
    found = {name: events(tmp_path / name) for name in runs}
    assert found["full_cached"]["computed"] == ["pairs"]
    assert found["full_cached_again"]["computed"] == []
    assert found["lora_cached"]["computed"] == []  # a fresh adapter changes nothing
    assert found["lora_off"]["kind"] == "adapter_off"
    assert read_losses(tmp_path / "full_cached_again")[2] > read_losses(tmp_path / "full_cached")[2]
