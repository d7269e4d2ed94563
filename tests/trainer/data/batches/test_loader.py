"""Loaders: the same rows for any number of ranks and after any resume."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import DataConfig, SourceConfig, load_config
from trainer.data.batches.collate import Batch, Row, collate
from trainer.data.batches.eval_loader import EvalLoader
from trainer.data.batches.loader import TrainLoader
from trainer.data.prepared.prepare import open_store, prepare
from trainer.data.prepared.store import TokenStore
from trainer.errors import ConfigError, DataError
from trainer.losses.cross_entropy import IGNORE_INDEX

SAMPLES = Path(__file__).resolve().parents[4] / "samples"
ROWS_PER_STEP = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("loader")
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in "abcdef"))
    return DataConfig(
        sources={
            "en": SourceConfig([str(SAMPLES / "en.jsonl")], weight=3.0),
            "zh_tw": SourceConfig([str(SAMPLES / "zh_tw.jsonl")], weight=1.0),
            "short": SourceConfig([str(folder / "short.jsonl")], weight=0.0, holdout_share=1.0),
        },
        store_dir=str(folder / "store"),
        max_length=64,
        holdout_share=0.1,
        num_processes=1,
    )


@pytest.fixture(scope="module")
def store(data: DataConfig, english_tokenizer: Path) -> TokenStore:
    return prepare(data, english_tokenizer)


def make(
    store: TokenStore, data: DataConfig, rank: int = 0, world_size: int = 1, **changes: int
) -> TrainLoader:
    options = {"seed": 1, "rows_per_step": ROWS_PER_STEP, "micro_batch_size": 2} | changes
    return TrainLoader(store, data, rank=rank, world_size=world_size, **options)


def rows_of(batches: list[Batch]) -> dict[int, tuple[list[int], ...]]:
    return {
        int(sample_id): (
            batch.input_ids[i].tolist(),
            batch.labels[i].tolist(),
            batch.position_ids[i].tolist(),
            [int(batch.source_ids[i])],
        )
        for batch in batches
        for i, sample_id in enumerate(batch.sample_ids)
    }


def step_rows(
    store: TokenStore, data: DataConfig, world_size: int, num_steps: int, **changes: int
) -> list[dict[int, tuple[list[int], ...]]]:
    """Return the rows of each step, gathered over ranks."""
    steps: list[dict[int, tuple[list[int], ...]]] = [{} for _ in range(num_steps)]
    for rank in range(world_size):
        loader = make(store, data, rank, world_size, **changes)
        batches = iter(loader)
        for step in steps:
            step |= rows_of(list(islice(batches, loader.micro_batches_per_step)))
    return steps


@pytest.mark.parametrize("packing", [True, False])
def test_any_world_size_and_micro_batch_take_the_same_rows(
    store: TokenStore, data: DataConfig, packing: bool
) -> None:
    # A width that hangs on the batch's longest row is no difference of content.
    data = dataclasses.replace(data, packing=packing)
    expected = step_rows(store, data, 1, 5)
    assert [sorted(step) for step in expected] == [
        list(range(i * ROWS_PER_STEP, (i + 1) * ROWS_PER_STEP)) for i in range(5)
    ]
    for world_size, micro_batch_size in ((2, 2), (4, 2), (4, 1), (1, 8), (8, 1)):
        found = step_rows(store, data, world_size, 5, micro_batch_size=micro_batch_size)
        for step, other in zip(expected, found, strict=True):
            assert step.keys() == other.keys()
            for sample_id in step:
                assert trimmed(step[sample_id]) == trimmed(other[sample_id])


def trimmed(row: tuple[list[int], ...]) -> tuple[list[int], ...]:
    last = max(i for i, label in enumerate(row[1]) if label != IGNORE_INDEX)
    return *(column[: last + 1] for column in row[:3]), row[3]


def test_rows_of_a_step_are_dealt_by_length(store: TokenStore, data: DataConfig) -> None:
    """All ranks pad little and finish a micro-batch together; the rows stay the step's own."""
    data = dataclasses.replace(data, packing=False)
    batches = [make(store, data, rank, 2, rows_per_step=32) for rank in (0, 1)]
    per_rank = [list(islice(loader, 3 * loader.micro_batches_per_step)) for loader in batches]
    num_micro = batches[0].micro_batches_per_step
    padding = size = 0
    for step in range(3):
        part = slice(step * num_micro, (step + 1) * num_micro)
        together = [b for pair in zip(*(own[part] for own in per_rank), strict=True) for b in pair]
        lengths = [sum(row) for batch in together for row in batch.piece_lengths]
        assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
        assert sorted(int(i) for b in together for i in b.sample_ids) == list(
            range(step * 32, (step + 1) * 32)
        )
        size += sum(batch.input_ids.numel() for batch in together)
        padding += sum(batch.input_ids.numel() - batch.num_tokens for batch in together)
    assert padding < 0.1 * size


def chat_store(chat_config: dict[str, Any]) -> tuple[TokenStore, DataConfig]:
    config = load_config(chat_config)
    return open_store(config.data, str(config.tokenizer.path)), config.data


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_holds_every_conversation_whole_with_its_weights(
    chat_config: dict[str, Any], packing: bool
) -> None:
    store, data = chat_store(chat_config)
    data = dataclasses.replace(data, packing=packing)
    loader = make(store, data, rows_per_step=1, micro_batch_size=1)
    source = store.sources["chat"]
    expected = sorted(
        (source.document(i).tolist(), source.document_weights(i).tolist())
        for i in source.document_ids(held_out=False)
    )
    found, targets = [], 0.0
    for batch in islice(loader, loader.mixture.rows_per_epoch["chat"]):
        longest = sum(batch.piece_lengths[0])
        width = batch.input_ids.shape[1]
        assert longest <= width < longest + 8 and (width % 8 == 0 or width == data.max_length)
        at = 0
        for length in batch.piece_lengths[0]:
            weights = batch.weights[0, at : at + length]
            found.append((batch.input_ids[0, at : at + length].tolist(), weights.tolist()))
            trained = batch.labels[0, at : at + length] != IGNORE_INDEX
            assert torch.equal(trained, weights > 0)
            at += length
        assert (len(batch.piece_lengths[0]) == 1) or packing
        targets += batch.num_targets
    assert sorted(found) == expected
    assert targets == pytest.approx(sum(sum(weights) for _, weights in expected))
    assert loader.epochs() == {"chat": 1.0}


def test_packed_conversations_fill_their_rows(chat_config: dict[str, Any]) -> None:
    store, data = chat_store(chat_config)
    loader = make(store, data)
    source = store.sources["chat"]
    trained = np.diff(source.offsets)[source.document_ids(held_out=False)].sum()
    rows = loader.mixture.rows_per_epoch["chat"]
    assert loader.fill_shares() == {"chat": trained / (rows * data.max_length)}
    assert loader.fill_shares()["chat"] > 0.93


def test_evaluation_of_conversations_counts_every_trained_token_once(
    chat_config: dict[str, Any],
) -> None:
    store, data = chat_store(chat_config)
    options: dict[str, int] = {"max_chars": 10**9, "micro_batch_size": 3, "world_size": 2}
    loaders = [EvalLoader(store, data, "chat", rank=rank, **options) for rank in (0, 1)]
    source = store.sources["chat"]
    weights = [source.document_weights(i) for i in source.document_ids(held_out=True)]
    num_trained = sum(int((own > 0).sum()) for own in weights)
    assert {0.5, 2.0} & {float(w) for own in weights for w in own}  # heavier ones are among them
    batches = [batch for loader in loaders for batch in loader]
    assert sum(batch.num_targets for batch in batches) == num_trained == loaders[0].num_targets


@pytest.mark.parametrize("resumed_world_size", [1, 2, 4])
def test_resume_replays_the_unbroken_run(
    store: TokenStore, data: DataConfig, resumed_world_size: int
) -> None:
    unbroken = step_rows(store, data, 2, 6)
    loader = make(store, data, 0, 2)
    batches = iter(loader)
    for _ in range(3 * loader.micro_batches_per_step):
        next(batches)
    state = loader.state()
    assert state == {"next_row": 3 * ROWS_PER_STEP}
    start = state["next_row"]
    assert step_rows(store, data, resumed_world_size, 3, start_row=start) == unbroken[3:]


def test_state_moves_when_a_step_is_taken_whole(store: TokenStore, data: DataConfig) -> None:
    loader = make(store, data)
    states = [loader.state()["next_row"] for _ in islice(loader, 9)]
    assert states == [0, 0, 0, 8, 8, 8, 8, 16, 16]


def test_two_iterators_over_one_loader_go_on(store: TokenStore, data: DataConfig) -> None:
    loader = make(store, data)
    first = rows_of(list(islice(loader, 4)))
    second = rows_of(list(islice(loader, 4)))
    assert sorted(first) + sorted(second) == list(range(16))
    next(iter(loader))  # a step left half-way ...
    again = [(loader.state()["next_row"], batch) for batch in islice(loader, 4)]
    assert [row for row, _ in again] == [16, 16, 16, 24]  # ... begins again
    assert sorted(rows_of([batch for _, batch in again])) == list(range(16, 24))


def test_mixture_and_epochs(store: TokenStore, data: DataConfig) -> None:
    loader = make(store, data)
    drawn = torch.cat([batch.source_ids for batch in islice(loader, 200)]).tolist()
    assert abs(drawn.count(0) - 300) <= 4 and drawn.count(2) == 0
    epochs = loader.epochs()
    assert epochs["zh_tw"] == drawn.count(1) / loader.mixture.rows_per_epoch["zh_tw"]
    assert epochs["short"] == 0


def test_an_epoch_holds_every_training_token_once(store: TokenStore, data: DataConfig) -> None:
    only = {"en": store.sources["en"]}
    loader = make(TokenStore(only, 1, 2, 2), data, rows_per_step=1, micro_batch_size=1)
    batches = list(islice(loader, loader.mixture.rows_per_epoch["en"]))
    source = store.sources["en"]
    documents = source.document_ids(held_out=False)
    expected = np.sort(np.concatenate([source.document(i) for i in documents]))
    seen = torch.cat([batch.input_ids.flatten() for batch in batches])
    assert seen.sort().values[-1] == expected[-1]
    num_padding = len(seen) - len(expected)
    assert 0 <= num_padding < data.max_length
    assert np.array_equal(np.bincount(seen)[3:], np.bincount(expected)[3:])
    assert loader.epochs() == {"en": 1.0}


def test_seeds_give_other_orders(store: TokenStore, data: DataConfig) -> None:
    first = [rows_of(list(islice(make(store, data, seed=seed), 1))) for seed in (1, 2)]
    assert first[0] != first[1]


def test_batches_that_do_not_divide_are_refused(store: TokenStore, data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"8 rows a step do not divide .*=6; use 6 rows"):
        make(store, data, 0, 3)
    with pytest.raises(ConfigError, match="next_row=4 is not the start of a step"):
        make(store, data, start_row=4)


def test_source_without_training_rows_is_refused(store: TokenStore, data: DataConfig) -> None:
    sources = data.sources | {"short": dataclasses.replace(data.sources["short"], weight=1.0)}
    with pytest.raises(DataError, match=r"data.sources.short.weight=1, but no document"):
        make(store, dataclasses.replace(data, sources=sources))


def test_error_of_the_prefetching_thread_reaches_the_caller(
    store: TokenStore, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make(store, data)

    def fail(index: int) -> Batch:
        raise OSError("stale file handle")

    monkeypatch.setattr(loader, "batch", fail)
    with pytest.raises(OSError, match="stale file handle"):
        next(iter(loader))


def test_packed_labels_and_positions_by_hand() -> None:
    rows = [Row([np.array([1, 5, 6]), np.array([7, 8])], 3, 0), Row([np.array([9])], 4, 1)]
    batch = collate(rows, length=7, pad_token_id=2, isolate=True)
    no = IGNORE_INDEX
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 8, 2, 2], [9, 2, 2, 2, 2, 2, 2]]
    assert batch.labels.tolist() == [[no, 5, 6, no, 8, no, no], [no] * 7]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 5]]
    assert (batch.sample_ids.tolist(), batch.source_ids.tolist()) == ([3, 4], [0, 1])
    assert batch.num_targets == 3
    plain = collate(rows, length=None, pad_token_id=2, isolate=False)
    assert plain.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert plain.labels.tolist() == [row[:5] for row in batch.labels.tolist()]


def test_weights_and_labels_by_hand() -> None:
    weights = [np.array([1, 0, 0.5], np.float32), np.array([0, 2], np.float32)]
    rows = [
        Row([np.array([1, 5, 6]), np.array([7, 8])], 0, 0, weights),
        Row([np.array([3, 4])], 1, 1),  # of a source without weights
    ]
    batch = collate(rows, length=None, pad_token_id=2, isolate=True)
    no = IGNORE_INDEX
    assert batch.labels.tolist() == [[no, no, 6, no, 8], [no, 4, no, no, no]]
    assert batch.weights is not None
    assert batch.weights.tolist() == [[0, 0, 0.5, 0, 2], [0, 1, 0, 0, 0]]
    assert (batch.num_targets, batch.num_trained, batch.num_tokens) == (3.5, 3, 7)
    assert batch.piece_lengths == [[3, 2], [2]]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("max_length", [2, 7, 64, 4096])
def test_evaluation_predicts_every_token_once(
    store: TokenStore, data: DataConfig, max_length: int, world_size: int, micro_batch_size: int
) -> None:
    data = dataclasses.replace(data, max_length=max_length)
    loaders = [
        EvalLoader(
            store,
            data,
            "en",
            max_chars=900,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    source, documents = store.sources["en"], loaders[0].documents
    expected = np.sort(np.concatenate([source.document(i)[1:] for i in documents]))
    batches = [list(loader) for loader in loaders]
    assert len({len(own) for own in batches} | {len(loader) for loader in loaders}) == 1
    labels = torch.cat([b.labels[:, 1:].flatten() for own in batches for b in own])
    assert labels[labels != IGNORE_INDEX].sort().values.tolist() == expected.tolist()
    assert sum(b.num_targets for own in batches for b in own) == loaders[0].num_targets
    assert all(b.input_ids.shape[0] == micro_batch_size for own in batches for b in own)


def test_evaluation_counts_the_characters_of_its_documents(
    store: TokenStore, data: DataConfig
) -> None:
    make_eval = {"micro_batch_size": 1, "rank": 0, "world_size": 1}
    loader = EvalLoader(store, data, "short", max_chars=10**9, **make_eval)
    assert (loader.num_chars, loader.num_bytes, len(loader.documents)) == (6, 6, 6)
    whole = EvalLoader(store, data, "zh_tw", max_chars=10**9, **make_eval)
    texts = [json.loads(line)["text"] for line in (SAMPLES / "zh_tw.jsonl").open(encoding="utf-8")]
    sizes = {(len(text), len(text.encode())) for text in texts}
    chars = store.sources["zh_tw"].num_chars[whole.documents].tolist()
    sizes_found = zip(
        chars, store.sources["zh_tw"].num_bytes[whole.documents].tolist(), strict=True
    )
    assert set(sizes_found) <= sizes and whole.num_chars == sum(chars)


def test_evaluation_takes_whole_documents_up_to_its_limit(
    store: TokenStore, data: DataConfig
) -> None:
    make_eval = {"micro_batch_size": 1, "rank": 0, "world_size": 1}
    source = store.sources["en"]
    sizes = []
    for limit in (0, 500, 1500, 10**9):
        loader = EvalLoader(store, data, "en", max_chars=limit, **make_eval)
        assert loader.num_chars <= limit or len(loader.documents) == 1
        sizes.append(len(loader.documents))
    assert sizes == sorted(sizes) and sizes[0] == 1
    assert sizes[-1] == len(source.document_ids(held_out=True))


def test_evaluation_takes_the_same_documents_whatever_the_tokenizer(
    store: TokenStore, data: DataConfig
) -> None:
    """Bits per character before and after an extension are of the same text."""
    make_eval = {"max_chars": 700, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    source = store.sources["en"]
    doubled = dataclasses.replace(  # a tokenizer that needs two tokens where the other needs one
        source, tokens=np.repeat(source.tokens, 2), offsets=source.offsets * 2
    )
    other = TokenStore({"en": doubled}, 1, 2, 2)
    one = EvalLoader(store, data, "en", **make_eval)
    two = EvalLoader(other, data, "en", **make_eval)
    assert one.documents.tolist() == two.documents.tolist() and len(one.documents) > 1
    assert (one.num_chars, one.num_bytes) == (two.num_chars, two.num_bytes)


def test_source_without_held_out_documents_is_named(store: TokenStore, data: DataConfig) -> None:
    nothing = dataclasses.replace(store.sources["en"], holdout_share=0.0)
    with pytest.raises(
        DataError, match=r"'en' has no held-out document .*sources.en.holdout_share"
    ):
        EvalLoader(
            TokenStore({"en": nothing}, 1, 2, 2),
            data,
            "en",
            max_chars=10,
            micro_batch_size=1,
            rank=0,
            world_size=1,
        )
