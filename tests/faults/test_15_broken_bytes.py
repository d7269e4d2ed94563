"""Row 15: whatever bytes a file holds, its reader accepts, rejects with file and line, or refuses.

``fuzz_readers.py`` does the same with any number of inputs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from broken_bytes import Rows, Tally, Target, fuzz
from fuzz_readers import fuzz_apart, make_targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import SourceConfig
from trainer.data.reading.raw import Row
from trainer.data.reading.readers import decode_row, walk_file
from trainer.data.reading.records import RejectLog
from trainer.data.reading.tables import refuse_broken
from trainer.errors import DataError

pytestmark = pytest.mark.faults(row=15)
NUM_SHORT, NUM_LONG = 10, 85  # inputs of each of 24 readers


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    return make_targets(tmp_path_factory.mktemp("readers"))


def test_broken_bytes_crash_no_reader_and_lose_no_row(targets: list[Target]) -> None:
    tallies = [fuzz_apart(target, NUM_SHORT, seed=1) for target in targets]
    check(tallies, NUM_SHORT)


@pytest.mark.slow
def test_many_broken_bytes(targets: list[Target]) -> None:
    check([fuzz_apart(target, NUM_LONG, seed=2) for target in targets], NUM_LONG)


def check(tallies: list[Tally], num: int) -> None:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    assert total.crashes == [] and total.losses == []
    assert total.inputs == total.accepted + total.refused == num * len(tallies)
    assert total.accepted and total.refused and total.rows["rejected"]


def test_the_harness_sees_crashes_losses_and_lost_processes(tmp_path: Path) -> None:
    def fail(path: Path) -> Rows:
        raise KeyError(path.name)

    def lose(path: Path) -> Rows:
        return Rows(3, 1, 1)

    def die(path: Path) -> None:
        os._exit(9)

    seeds = {"a": b"x"}
    assert "KeyError" in fuzz(Target("fails", seeds, fail), 1, tmp_path, 0).crashes[0]
    assert len(fuzz(Target("loses", seeds, lose), 2, tmp_path, 0).losses) == 2
    assert "ended with 9 on 0 a" in fuzz_apart(Target("dies", seeds, die), 1, 0).crashes[0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
RECORDS = st.lists(
    st.dictionaries(st.sampled_from(["text", "id", ""]), VALUES) | VALUES | st.text(max_size=9),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(records=RECORDS)
def test_any_json_is_accepted_or_rejected_by_its_line(
    records: list[object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    first = '{"text": "good"}\n'
    path.write_text(first + "".join(json.dumps(record) + "\n" for record in records))
    rejects = RejectLog(path.with_name("rejected.jsonl"), 1.0)
    source = SourceConfig([str(path)])
    kept = [
        row.number
        for row in walk_file(path, source)
        if decode_row(row, path, source, rejects) is not None
    ]
    rejects.close()
    left = []
    if rejects.path is not None and rejects.path.exists():
        left = [json.loads(line) for line in rejects.path.read_text().splitlines()]
    assert sorted([*kept, *(reject["row"] for reject in left)]) == list(range(1, len(records) + 2))
    assert all(reject["file"] == str(path) and reject["reason"] for reject in left)


def broken_list() -> pa.Array:
    offsets = pa.array([0, 9, 1], pa.int32()).buffers()[1]
    return pa.ListArray.from_buffers(
        pa.list_(pa.string()), 2, [None, offsets], children=[pa.array(["a"])]
    )


def broken_text(kind: pa.DataType) -> pa.Array:
    width = pa.int64() if kind == pa.large_string() else pa.int32()
    offsets = pa.array([0, 1 << 20, 2], width).buffers()[1]
    return pa.Array.from_buffers(kind, 2, [None, offsets, pa.py_buffer(b"ab")])


@pytest.mark.parametrize(
    "array",
    [broken_text(pa.string()), broken_text(pa.large_string()), broken_list()],
    ids=["text", "large text", "list"],
)
def test_arrow_offsets_that_lead_out_of_the_memory_are_refused(array: pa.Array) -> None:
    with pytest.raises(pa.ArrowInvalid):
        refuse_broken(array)
    with pytest.raises(pa.ArrowInvalid):
        refuse_broken(pa.StructArray.from_arrays([array], ["inside"]))


def test_whole_arrow_values_pass_with_invalid_utf8_among_them() -> None:
    spoilt = pa.array([b"\xff", b"ok"], pa.binary()).view(pa.string())
    nested = pa.array([[{"a": "x"}], None, []], pa.list_(pa.struct([("a", pa.string())])))
    for array in (spoilt, nested, pa.array(["a", "b", "a"]).dictionary_encode(), pa.array([1.5])):
        refuse_broken(array)


def test_memory_that_a_broken_length_asks_for_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n')

    def give_up(*_: object) -> list[Row]:
        raise MemoryError

    monkeypatch.setattr("trainer.data.reading.readers.iterate_rows", give_up)
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: MemoryError"):
        list(walk_file(path, SourceConfig([str(path)])))
