"""Every kind of damage in a run's folder is named; what is whole passes; nothing imports torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import RunFolder

from launch import run_folder, verify
from launch.exports import note_export, read_exports
from launch.snapshot import copy_code, hash_code
from launch.verification import inputs, parents, records
from launch.verification.check import Check, problem
from trainer.engine.manifest import FORMAT
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
NOW = 1_800_000_000.0
CONFIG: dict[str, Any] = {
    "name": "one",
    "run_dir": "to be set",
    "stage": {"name": "pretrain"},
    "model": {"name": "micro", "architecture": {"model_type": "llama"}},
    "tokenizer": {"path": "missing.model"},
    "data": {"sources": {"en": {"paths": ["missing.jsonl"]}}, "store_dir": "missing"},
    "engine": {"zero_stage": 0, "precision": "fp32"},
    "optim": {"lr": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 1},
    "peft": {},
    "loop": {"max_steps": 8, "log_every": 2, "global_batch_tokens": 8192},
    "log": {},
    "cluster": {},
}
INPUTS = {"tokenizer": "a" * 64, "data.sources.en": "en-0123456789abcdef"}


def save(run_dir: Path, step: int, content: bytes = b"weights") -> Path:
    """Write a committed checkpoint of one small file."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = {"format": FORMAT, "step": step, "world_size": 1, "zero_stage": 0,
                "precision": "fp32", "files": {"rank_00000.safetensors": facts},
                "parameters": {"a": [2]},
                "state": {"inputs": INPUTS, "evaluated": True}}  # fmt: skip
    (folder / "rank_00000.safetensors").write_bytes(content)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return the folder of a finished run of eight steps, logged every second one."""
    path = tmp_path / "runs" / "one"
    made = RunFolder(path, NOW, **CONFIG)
    frozen = yaml.safe_load((path / "config.yaml").read_text())
    made.life(90, config=run_folder.identify(frozen), first_step=0, world_size=1)
    for step in (2, 4, 6, 8):
        made.train(step, 10)
    made.end(1, 0).hold(1)
    (path / "leases" / "00001.end").write_text("{}")
    save(path, 4)
    save(path, 8)
    return path


def check(run_dir: Path) -> dict[str, list[Check]]:
    """Return the problems of a run by topic."""
    found: dict[str, list[Check]] = {}
    for one in verify.verify(run_dir, lambda _: None):
        if one.state == "problem":
            found.setdefault(one.topic, []).append(one)
    return found


def test_a_whole_run_has_no_problem(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(run_dir) == {}
    assert verify.main([str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "step_00000008: 1 files" in text and "0 problems" in text
    assert "not checkable  inputs" in text  # tokenizer and store are nowhere
    assert verify.main([str(run_dir), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["exit_code"] == 0 and {c["topic"] for c in data["checks"]} >= {"lives", "lease"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Return a damage: ``new`` in the place of ``old`` in a file of the run's folder."""

    def edit(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return edit


CHECKPOINT = "checkpoints/step_00000008"
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a flipped bit": (
        lambda run: flip(run / CHECKPOINT / "rank_00000.safetensors"),
        "checkpoint", "step_00000008: rank_00000.safetensors does not match its SHA-256",
    ),
    "a truncated shard": (
        lambda run: (run / CHECKPOINT / "rank_00000.safetensors").write_bytes(b"we"),
        "checkpoint", "has 2 bytes instead of 7",
    ),
    "a lost shard": (
        lambda run: (run / CHECKPOINT / "rank_00000.safetensors").unlink(),
        "checkpoint", "rank_00000.safetensors is missing",
    ),
    "a foreign file": (
        lambda run: (run / CHECKPOINT / "rank_00001.safetensors").touch(),
        "checkpoint", "rank_00001.safetensors belongs to no manifest",
    ),
    "a broken manifest": (
        lambda run: (run / CHECKPOINT / "manifest.json").write_text("{"),
        "checkpoint", "manifest unreadable",
    ),
    "a renamed checkpoint": (
        lambda run: (run / CHECKPOINT).rename(run / "checkpoints/step_00000006"),
        "checkpoint", "is of step 8",
    ),
    "another source": (
        edited(f"{CHECKPOINT}/manifest.json", "data.sources.en", "data.sources.zh"),
        "checkpoint", "trained on the sources ['zh'], config.yaml has ['en']",
    ),
    "a save cut between two renames": (
        lambda run: (run / CHECKPOINT).rename(run / "checkpoints/.step_00000008.old"),
        "left-overs", ".step_00000008.old was put aside",
    ),
    "an edited config": (
        edited("config.yaml", "lr: 0.001", "lr: 0.002"),
        "config", "was changed in what decides the result",
    ),
    "a config that is none": (
        lambda run: (run / "config.yaml").write_text("- a"), "config", "holds no configuration",
    ),
    "a lost step": (
        edited("metrics.jsonl", '"step": 4', '"step": 3'),
        "metrics", "steps 4-5 are not recorded",
    ),
    "a double step": (
        edited("metrics.jsonl", '"step": 4', '"step": 2'),
        "metrics", "step 2 is double or out of order",
    ),
    "a loss that is none": (
        edited("metrics.jsonl", '"loss": 1.2345', '"loss": "nan"'),
        "metrics", "loss is no finite number at step 2, 4, 6, 8",
    ),
    "a torn line in the middle": (
        edited("metrics.jsonl", '{"split": "train", "step": 4', '{"split'),
        "metrics", "1 lines in the middle are no JSON",
    ),
    "a lost end": (
        lambda run: (run / "metrics.jsonl").write_text(
            "".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:2])
        ),
        "metrics", "the last record is of step 4, but a checkpoint of step 8 is there",
    ),
    "lost lives": (
        lambda run: (run / "lives.jsonl").unlink(), "lives", "there is no lives.jsonl",
    ),
    "a broken lease": (
        lambda run: (run / "leases/00001.json").write_text("{"), "lease", "cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, run_dir: Path) -> None:
    damage, topic, words = DAMAGE[name]
    damage(run_dir)
    found = check(run_dir)
    assert any(words in one.what for one in found.get(topic, [])), found
    assert all(one.remedy for ones in found.values() for one in ones)
    assert verify.main([str(run_dir)]) == 66


def test_what_a_kill_leaves_is_no_problem(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    with (run_dir / "lives.jsonl").open("a") as file:
        file.write('{"started')
    aside = run_dir / "checkpoints/.step_00000010.life_1.tmp"
    aside.mkdir()
    found = list(verify.verify(run_dir, lambda _: None))
    assert [one for one in found if one.state == "problem"] == []
    texts = [one.what for one in found]
    assert any("its last line torn" in text for text in texts)
    assert any("1 torn lines" in text for text in texts)
    assert any(aside.name in text for text in texts)


def test_steps_are_of_the_record_before_or_of_the_life() -> None:
    lines: list[dict[str, Any]] = [
        {"split": "train", "step": 2}, {"split": "train", "step": 4},
        {"split": "event", "event": "resume", "step": 5}, {"split": "train", "step": 6},
    ]  # fmt: skip
    spans = records.read_spans(lines)
    assert [(span.start, span.end) for span in spans] == [(0, 2), (2, 4), (5, 6)]


def test_code_of_a_submitted_run(run_dir: Path) -> None:
    assert inputs.check_code(run_dir).state == "unchecked"
    copy_code(run_dir / "code")
    life = {"started": "x", "token": 1, "code": hash_code(run_dir / "code")}
    (run_dir / "lives.jsonl").write_text(json.dumps(life) + "\n")
    assert inputs.check_code(run_dir).state == "ok"
    with (run_dir / "code/trainer/errors.py").open("a") as file:
        file.write("# changed\n")
    assert "is not what the last life ran" in inputs.check_code(run_dir).what


def test_inputs_that_changed_are_named(run_dir: Path, english_tokenizer: Path) -> None:
    config = {**CONFIG, "tokenizer": {"path": str(english_tokenizer)}}
    (changed,) = [c for c in inputs.check_inputs(run_dir, config) if "tokenizer:" in c.what]
    assert changed.state == "problem" and "was aaaaaaaaaaaa, now it is" in changed.what


def test_parents_of_a_pipeline_are_followed(run_dir: Path) -> None:
    steps = run_dir.parent / "steps"
    steps.mkdir()
    for name, parent in (("one", "two"), ("two", "")):
        record = {"kind": "run", "stage": "pretrain", "parents": [parent] if parent else []}
        (steps / f"{name}.json").write_text(json.dumps(record))
    (steps / "one.inputs.json").write_text(json.dumps({"parents": {"two": {"model": "x"}}}))
    other = run_dir.parent / "two"
    assert [c.state for c in parents.check_parents(run_dir)] == ["unchecked"]
    RunFolder(other, NOW, **CONFIG).life(90).end(1, 0)
    flip(save(other, 8) / "rank_00000.safetensors")
    found = check(run_dir)
    assert "parent two has another model, checkpoint now" in found["parents"][0].what
    assert found["checkpoint"][0].run == "two"


def test_files_of_exports_are_compared(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    (out / "sub").mkdir(parents=True)
    (out / "sub/code.py").write_text("x = 1\n")
    (out / "model.safetensors").write_bytes(b"no tensors")
    note_export(run_dir, out, run_dir / CHECKPOINT, {"dtype": "fp32", "adapter": True})
    (record,) = read_exports(run_dir)
    assert set(record["files"]) == {"sub/code.py", "model.safetensors"}
    assert "exports" not in check(run_dir)
    (out / "sub/code.py").write_text("x = 2\n")
    assert "sub/code.py does not match" in check(run_dir)["exports"][0].what
    note_export(run_dir, out, run_dir / CHECKPOINT, {"dtype": "fp32", "adapter": True})
    assert "exports" not in check(run_dir)  # exported again to the same folder: the last one counts


def test_other_folders_and_flags_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        verify.main([str(tmp_path)])
    for words in (["--replay", "0"], ["--step", "4"]):
        with pytest.raises(SystemExit):
            verify.parse([str(tmp_path), *words])


def test_a_problem_needs_a_remedy() -> None:
    with pytest.raises(ValueError, match="needs a remedy"):
        problem("lives", "broken", "")


def test_verify_imports_no_torch(run_dir: Path) -> None:
    code = (
        "import sys; from launch import verify; assert verify.main([sys.argv[1]]) == 0; "
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
