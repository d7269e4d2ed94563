"""Preparation: exact, resumable, safe for two at once, honest about a full disk."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tokenizer.load import load_tokenizer
from trainer.config import DataConfig, SourceConfig
from trainer.data.encode import EncoderSpec
from trainer.data.prepared import merge
from trainer.data.prepared.merge import commit_source
from trainer.data.prepared.prepare import (
    deal,
    ensure_prepared,
    open_store,
    plan_sources,
    prepare,
)
from trainer.data.prepared.store import MANIFEST, TokenStore, verify
from trainer.data.prepared.workers import run_tasks
from trainer.errors import ConfigError, DataError, StorageError

ROOT = Path(__file__).resolve().parents[4]
TEXTS = [f"document number {i} of {i * 7919 % 1009} words, 海流 {i}" for i in range(400)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def make_data(folder: Path, *paths: Path, **changes: object) -> DataConfig:
    source = SourceConfig([str(path) for path in paths])
    options = {"store_dir": str(folder / "store"), "num_processes": 1, **changes}
    return DataConfig({"source": source}, **options)  # type: ignore[arg-type]


def digests(folder: Path) -> dict[str, str]:
    """Hash every file of the committed sources below a store folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "hashes" not in path.relative_to(folder).parts
    }


def holdings(store: TokenStore) -> dict[str, object]:
    return dict(store.sources["source"].manifest)


def test_store_holds_what_the_tokenizer_says(tmp_path: Path, english_tokenizer: Path) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    store = prepare(data, english_tokenizer)
    source, tokenizer = store.sources["source"], load_tokenizer(english_tokenizer)
    assert (store.bos_token_id, store.eos_token_id) == (1, 2)
    expected = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    for i, ids in enumerate(expected):
        assert source.document(i).tolist() == [1, *ids, 2]
    assert source.tokens.dtype == np.uint16 and isinstance(source.tokens, np.memmap)
    assert source.num_chars.tolist() == [len(text) for text in TEXTS]
    assert source.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    verify(source.folder)


def test_rejected_and_short_rows_add_up(tmp_path: Path, english_tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:10], "ab", "cd"])
    path.write_bytes(path.read_bytes() + b'{"text": 3}\nnot json\n')
    data = make_data(tmp_path, path, min_chars=3, max_bad_row_share=0.2)
    manifest = holdings(prepare(data, english_tokenizer))
    assert manifest["rows"] == {"read": 14, "rejected": 2, "short": 2}
    assert manifest["num_documents"] == 10
    (folder,) = [p.parent for p in (tmp_path / "store").glob(f"*/{MANIFEST}")]
    lines = [json.loads(x) for x in (folder / "rejected.jsonl").read_text().splitlines()]
    assert [(x["file"], x["row"]) for x in lines] == [(str(path), 13), (str(path), 14)]


@pytest.mark.faults(row=15)
def test_too_many_bad_rows_keep_their_list_and_the_work(
    tmp_path: Path, english_tokenizer: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:10])
    path.write_bytes(path.read_bytes() + b"not json\n")
    data = make_data(tmp_path, path)
    with pytest.raises(DataError, match=r"1 of 11 rows rejected, 9.09%, .*a.jsonl:11") as caught:
        prepare(data, english_tokenizer)
    (listed,) = (tmp_path / "store").glob("*.rejected.jsonl")
    assert str(listed) in str(caught.value)
    assert json.loads(listed.read_text())["row"] == 11
    store = prepare(dataclasses.replace(data, max_bad_row_share=0.1), english_tokenizer)
    assert holdings(store)["num_documents"] == 10
    assert not listed.exists()


def test_source_of_nothing_but_short_documents(tmp_path: Path, english_tokenizer: Path) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["ab"]), min_chars=3)
    with pytest.raises(DataError, match="none of 1 rows became a document"):
        prepare(data, english_tokenizer)


def test_key_follows_content_and_options_only(tmp_path: Path, english_tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = make_data(tmp_path, path)

    def key(data: DataConfig, tokenizer: Path = english_tokenizer) -> str:
        return plan_sources(data, tokenizer)[0].key

    first = key(data)
    moved = write_jsonl(tmp_path / "moved.jsonl", TEXTS)
    source = data.sources["source"]
    assert key(make_data(tmp_path, moved)) == first
    heavier = dataclasses.replace(source, weight=9.0, holdout_share=0.5)
    assert key(dataclasses.replace(data, sources={"source": heavier})) == first
    as_lines = dataclasses.replace(source, format="lines")
    others = {
        key(dataclasses.replace(data, min_chars=5)),
        key(dataclasses.replace(data, sources={"source": as_lines})),
        key(make_data(tmp_path, path, moved)),
    }
    write_jsonl(path, [*TEXTS, "one more"])
    others.add(key(data))
    assert len(others | {first}) == 5


def test_number_of_processes_and_ranks_changes_nothing(
    tmp_path: Path, english_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.prepared.workers.BYTES_PER_PROCESS", 1)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl.gz", TEXTS[i::3]) for i in range(3)]
    big = write_jsonl(tmp_path / "big.jsonl", [t * 40 for t in TEXTS * 2])
    results = []
    for name, num_processes in (("one", 1), ("three", 3)):
        data = make_data(tmp_path / name, *paths, big, num_processes=num_processes)
        prepare(data, english_tokenizer)
        results.append(digests(tmp_path / name / "store"))
    data = make_data(tmp_path / "ranks", *paths, big)
    (plan,) = plan_sources(data, english_tokenizer)
    plan.work_folder.mkdir(parents=True)
    spec = EncoderSpec.of(load_tokenizer(english_tokenizer))
    tasks = deal([plan], 2, 0.0)
    for rank in (1, 0):
        run_tasks(tasks[rank::2], spec, 1)
    commit_source(plan, spec, 0.0)
    results.append(digests(tmp_path / "ranks" / "store"))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 7


def test_split_is_by_text(tmp_path: Path, english_tokenizer: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS + TEXTS[::-1])
    more = write_jsonl(tmp_path / "0.jsonl", [f"another {i}" for i in range(100)] + TEXTS[:50])
    data = make_data(tmp_path, first, holdout_share=0.3)
    source = prepare(data, english_tokenizer).sources["source"]
    texts = np.array(TEXTS + TEXTS[::-1])
    held_out = set(texts[source.document_ids(held_out=True)])
    trained = set(texts[source.document_ids(held_out=False)])
    assert held_out.isdisjoint(trained) and held_out | trained == set(TEXTS)
    assert 0.2 < len(held_out) / len(TEXTS) < 0.4
    larger = make_data(tmp_path, more, first, holdout_share=0.3)
    source = prepare(larger, english_tokenizer).sources["source"]
    texts = np.array([f"another {i}" for i in range(100)] + TEXTS[:50] + TEXTS + TEXTS[::-1])
    assert {t for t in texts[source.document_ids(held_out=True)] if t in TEXTS} == held_out


def test_share_of_held_out_documents_needs_no_new_store(
    tmp_path: Path, english_tokenizer: Path
) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS), holdout_share=0.0)
    assert len(prepare(data, english_tokenizer).sources["source"].document_ids(True)) == 0
    data = dataclasses.replace(data, holdout_share=1.0)
    assert len(open_store(data, english_tokenizer).sources["source"].document_ids(True)) == 400


def test_open_store_names_the_command(tmp_path: Path, english_tokenizer: Path) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with pytest.raises(DataError, match=r"no tokens of source .*run `kuroshio prepare`"):
        open_store(data, english_tokenizer)
    ensure_prepared(data, english_tokenizer)
    assert holdings(open_store(data, english_tokenizer))["num_documents"] == 400
    write_jsonl(tmp_path / "a.jsonl", TEXTS[1:])
    with pytest.raises(DataError, match="run `kuroshio prepare`"):
        open_store(data, english_tokenizer)


def test_damaged_store_is_refused(tmp_path: Path, english_tokenizer: Path) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    folder = prepare(data, english_tokenizer).sources["source"].folder
    tokens = folder / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-5] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(DataError, match=r"tokens.npy is damaged.*delete"):
        prepare(data, english_tokenizer)
    tokens.write_bytes(content[:-8])
    with pytest.raises(DataError, match="its manifest says"):
        open_store(data, english_tokenizer)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match=f"no readable {MANIFEST}"):
        open_store(data, english_tokenizer)


def test_ranks_without_a_barrier_are_refused(tmp_path: Path, english_tokenizer: Path) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with pytest.raises(ConfigError, match="needs a barrier"):
        prepare(data, english_tokenizer, world_size=2)


def test_losing_a_race_is_no_error(
    tmp_path: Path, english_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    spec = EncoderSpec.of(load_tokenizer(english_tokenizer))
    (plan,) = plan_sources(data, english_tokenizer)
    plan.work_folder.mkdir(parents=True)
    tasks = deal([plan], 1, 0.0)
    run_tasks(tasks, spec, 1)
    prepare(data, english_tokenizer)  # the other job: uses our shards, commits, cleans up
    before = digests(tmp_path / "store")
    run_tasks(tasks, spec, 1)
    commit_source(plan, spec, 0.0)
    # ... committed just before our work began ...
    plan.work_folder.mkdir()
    run_tasks(tasks, spec, 1)
    commit_source(plan, spec, 0.0)
    # ... and while we join our shards.
    hidden = plan.folder.rename(tmp_path / "hidden")
    plan.work_folder.mkdir()
    run_tasks(tasks, spec, 1)

    def commit_first(*arguments: object) -> None:
        join(*arguments)
        hidden.rename(plan.folder)

    join = merge._join
    monkeypatch.setattr(merge, "_join", commit_first)
    commit_source(plan, spec, 0.0)
    assert digests(tmp_path / "store") == before
    assert not list((tmp_path / "store").glob("*.work*"))


def test_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, english_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = make_data(tmp_path, path)

    def change(*arguments: object) -> None:
        run_tasks(*arguments)  # type: ignore[arg-type]
        write_jsonl(path, TEXTS[:100])

    monkeypatch.setattr("trainer.data.prepared.prepare.run_tasks", change)
    with pytest.raises(DataError, match="files of source changed while"):
        prepare(data, english_tokenizer)
    monkeypatch.undo()
    write_jsonl(path, TEXTS)
    assert holdings(prepare(data, english_tokenizer))["num_documents"] == len(TEXTS)


def test_damaged_note_of_a_hash_is_no_hash(tmp_path: Path, english_tokenizer: Path) -> None:
    data = make_data(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    (before,) = plan_sources(data, english_tokenizer)
    (note,) = (tmp_path / "store/hashes").iterdir()
    note.write_text("{")
    assert plan_sources(data, english_tokenizer) == [before]


def test_store_that_cannot_be_made_is_named(tmp_path: Path, english_tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = make_data(tmp_path, path, store_dir=str(path / "store"))
    with pytest.raises(StorageError, match=r"a.jsonl/store.* a part of this path is a file"):
        prepare(data, english_tokenizer)


def test_unfinished_shards_are_never_committed(tmp_path: Path, english_tokenizer: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", TEXTS[i::2]) for i in range(2)]
    (plan,) = plan_sources(make_data(tmp_path, *paths), english_tokenizer)
    plan.work_folder.mkdir(parents=True)
    spec = EncoderSpec.of(load_tokenizer(english_tokenizer))
    run_tasks(deal([plan], 1, 0.0)[:1], spec, 1)
    with pytest.raises(FileNotFoundError):
        commit_source(plan, spec, 0.0)
    assert not plan.folder.exists() and list(plan.work_folder.glob("*.npz"))


# ---- processes that are killed, meet, or find no room

PROGRAM = """
import json, resource, sys
from trainer.config import DataConfig, SourceConfig
from trainer.data.prepared.prepare import prepare
from trainer.errors import KuroshioError
if __name__ == "__main__":
    store_dir, tokenizer, num_processes, limit, *paths = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    source = SourceConfig(paths)
    try:
        prepare(
            DataConfig({"source": source}, store_dir=store_dir, num_processes=int(num_processes)),
            tokenizer,
        )
    except KuroshioError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 8 MB of JSON Lines: enough chunks, and work for two processes."""
    words = [f"{a}{b}" for a in ("cur", "oce", "tide", "wa", "海", "流") for b in "abcdefgh"]
    choose = random.Random(0)
    texts = [" ".join(choose.choices(words, k=200)) for _ in range(8000)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts)


@pytest.fixture(scope="module")
def undisturbed(
    corpus: Path, english_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    prepare(make_data(folder, corpus), english_tokenizer)
    return digests(folder / "store")


def start(
    folder: Path, tokenizer: Path, corpus: Path, num_processes: int = 2, limit: int = 0
) -> subprocess.Popen[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    arguments = [folder / "store", tokenizer, num_processes, limit, corpus]
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_shards(folder: Path, number: int, process: subprocess.Popen[str]) -> list[Path]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        shards = sorted(folder.glob("store/*.work/*.npz"))
        if len(shards) >= number:
            return shards
        time.sleep(0.005)
    raise AssertionError(f"no {number} shards; exit code {process.poll()}")


def finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    return errors


def test_killed_preparation_goes_on_where_it_was(
    tmp_path: Path, english_tokenizer: Path, corpus: Path, undisturbed: dict[str, str]
) -> None:
    process = start(tmp_path, english_tokenizer, corpus)
    shards = wait_for_shards(tmp_path, 2, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(workers, timeout=20)
    assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE]
    assert not list(tmp_path.glob(f"store/*/{MANIFEST}"))
    made = {path: path.stat().st_mtime_ns for path in shards}
    process = start(tmp_path, english_tokenizer, corpus, num_processes=1)
    wait_for_shards(tmp_path, len(shards) + 1, process)
    assert {path: path.stat().st_mtime_ns for path in made} == made  # not made twice
    finish(process)
    assert digests(tmp_path / "store") == undisturbed


def test_two_jobs_at_once_agree(
    tmp_path: Path, english_tokenizer: Path, corpus: Path, undisturbed: dict[str, str]
) -> None:
    jobs = [start(tmp_path, english_tokenizer, corpus, num_processes=1) for _ in range(2)]
    for job in jobs:
        finish(job)
    assert digests(tmp_path / "store") == undisturbed


def test_full_disk_names_path_and_room_and_keeps_the_work(
    tmp_path: Path, english_tokenizer: Path, corpus: Path, undisturbed: dict[str, str]
) -> None:
    # Shards fit below the limit, the joined tokens do not.
    process = start(tmp_path, english_tokenizer, corpus, num_processes=1, limit=3_000_000)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 74, errors
    assert f"cannot write {tmp_path}" in errors and "tokens.npy" in errors and "bytes" in errors
    assert not list(tmp_path.glob(f"store/*/{MANIFEST}"))
    shards = list(tmp_path.glob("store/*.work/*.npz"))
    assert len(shards) >= 8 and not list(tmp_path.glob("store/*.work/merge*"))
    finish(start(tmp_path, english_tokenizer, corpus, num_processes=1))
    assert digests(tmp_path / "store") == undisturbed


def test_full_disk_in_a_worker_process(
    tmp_path: Path, english_tokenizer: Path, corpus: Path
) -> None:
    process = start(tmp_path, english_tokenizer, corpus, num_processes=2, limit=100_000)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 74, errors
    assert "cannot write" in errors and "start the same command again" in errors
    assert not list(tmp_path.glob("store/*.work/.*"))  # nothing half-written


def test_full_file_system(tmp_path: Path, english_tokenizer: Path, corpus: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(store)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    try:
        process = start(tmp_path, english_tokenizer, corpus, num_processes=1)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 74 and "the disk is full" in errors, errors
        assert not list(store.glob(f"*/{MANIFEST}"))
    finally:
        subprocess.run(["umount", str(store)], check=True)


def test_killed_worker_is_explained(tmp_path: Path, english_tokenizer: Path, corpus: Path) -> None:
    process = start(tmp_path, english_tokenizer, corpus)
    wait_for_shards(tmp_path, 1, process)
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].kill()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 65, errors
    assert "was killed" in errors and "lower data.num_processes=2" in errors
