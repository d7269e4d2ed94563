"""A graph of jobs, as Slurm is told of it: a stand-in notes what it gets."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from launch.graph import jobs
from launch.graph.state import read_states
from trainer.errors import ConfigError
from trainer.lives import utc_now

TEXT = """
steps:
  letters: {{tokenizer: {{paths: [samples/en.jsonl], vocab_size: 400}}}}
  base: {{run: [stage=pretrain, data=samples, "tokenizer.path=@{{letters}}"]}}
  base_model: {{export: {{run: "@{{base}}"}}}}
  vocab:
    run:
      - stage=vocab
      - data=samples
      - stage.vocab_size=500
      - model=folder
      - model.path=@{{base_model}}
  tuned:
    run: [stage=sft, data=chat_samples, model=folder, "model.path=@{{vocab}}/model"]
  judge:
    run: [stage=reward, data=preference_samples, model=folder, "model.path=@{{vocab}}/model"]
"""
# sbatch counts its calls; squeue knows the jobs whose numbers stand in the file `alive`.
SBATCH = """#!/bin/sh
[ "$1" = --test-only ] && exit 0
[ -e {folder}/refuse ] && [ $(wc -l < {folder}/jobs) -ge 3 ] && {{ echo "no more" >&2; exit 1; }}
echo "$2" >> {folder}/jobs
wc -l < {folder}/jobs
"""
SQUEUE = """#!/bin/sh
for word in "$@"; do case $word in --jobs=*) job=${{word#--jobs=}} ;; *%r) r=1 ;; esac; done
[ "$r" ] && grep -qx "$job" {folder}/never && echo "$job DependencyNeverSatisfied" && exit
grep -qx "$job" {folder}/alive && echo "$job PENDING" || echo "Invalid job id specified" >&2
grep -qx "$job" {folder}/alive
"""
SCANCEL = """#!/bin/sh
echo "$@" >> {folder}/cancelled
for job in "$@"; do sed -i "/^$job$/d" {folder}/alive; done
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (folder / name).write_text(text.format(folder=folder))
        (folder / name).chmod(0o755)
    for name in ("jobs", "alive", "cancelled", "never"):
        (folder / name).touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    file = tmp_path / "p.yaml"
    file.write_text(TEXT.format())
    return [f"pipeline={file}", f"dir={tmp_path}/out", "cluster=local_slurm", "cluster.nodes=2"]


def scripts(slurm: Path) -> list[str]:
    return [Path(line).read_text() for line in (slurm / "jobs").read_text().splitlines()]


def directive(script: str, name: str) -> str:
    found = re.search(rf"^#SBATCH --{name}=(.*)$", script, re.MULTILINE)
    return found[1] if found else ""


def finish_letters(folder: Path) -> None:
    """Leave what the first step leaves when it is done."""
    (folder / "letters").mkdir()
    (folder / "letters/tokenizer.json").write_text("{}")
    (folder / "steps/letters.inputs.json").write_text('{"parents": {}}')


def test_jobs_wait_for_those_of_their_parents(
    words: list[str], slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.main(words) == 0
    letters, base, model, vocab, tuned, judge = scripts(slurm)
    waits = [directive(s, "dependency") for s in (letters, base, model, vocab, tuned, judge)]
    assert waits == ["", "afterok:1", "afterok:2", "afterok:3", "afterok:4", "afterok:4"]
    nodes = [directive(s, "nodes") for s in (letters, base, model, vocab, tuned, judge)]
    assert nodes == ["1", "2", "1", "1", "2", "2"]
    assert f" run --step {tmp_path}/out base_model " in model
    assert "after vocab" in capsys.readouterr().out
    record = json.loads((tmp_path / "out/steps/tuned.json").read_text())
    assert record["parents"] == ["vocab"] and record["values"]["cluster"]["nodes"] == 2
    (slurm / "alive").write_text("1\n2\n3\n4\n5\n6\n")
    assert {step.state for step in read_states(tmp_path / "out").values()} == {"submitted"}
    assert jobs.main(words) == 0  # all of them wait: nothing is submitted twice
    assert len(scripts(slurm)) == 6


def test_a_dry_run_shows_the_jobs_and_submits_none(
    words: list[str], slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jobs.main([*words, "cluster.time=1:00:00", "--dry-run"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1] == ["base", "2", "x", "1", "ranks,", "1:00:00", "after", "letters"]
    assert shown[2] == ["base_model", "one", "task", "after", "base"]
    assert not scripts(slurm) and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="step base: "):
        jobs.main([*words, "cluster.account='a b'", "--dry-run"])


def test_what_a_failed_step_holds_is_taken_out_and_submitted_again(
    words: list[str], slurm: Path, tmp_path: Path
) -> None:
    jobs.main(words)
    finish_letters(tmp_path / "out")
    (slurm / "alive").write_text("3\n4\n5\n6\n")  # job 2 has failed
    states = {name: step.state for name, step in read_states(tmp_path / "out").items()}
    assert states == {
        "letters": "done",
        "base": "failed",
        "base_model": "held",
        "vocab": "held",
        "tuned": "held",
        "judge": "held",
    }
    jobs.main(words)
    assert (slurm / "cancelled").read_text().split() == ["3", "4", "5", "6"]
    again = scripts(slurm)[6:]
    waits = [directive(script, "dependency") for script in again]
    assert waits == ["", "afterok:7", "afterok:8", "afterok:9", "afterok:9"]


def test_a_step_that_was_resumed_by_itself_frees_those_that_it_held(
    words: list[str], slurm: Path, tmp_path: Path
) -> None:
    jobs.main(words)
    finish_letters(tmp_path / "out")
    submission = tmp_path / "out/base/submit.json"  # job 2 failed, `kuroshio resume` made 20
    submission.write_text(json.dumps({**json.loads(submission.read_text()), "job_ids": [2, 20]}))
    (slurm / "alive").write_text("20\n3\n4\n5\n6\n")
    (slurm / "never").write_text("3\n")
    states = read_states(tmp_path / "out")
    assert (states["base"].state, states["base"].job) == ("submitted", "20")
    assert {states[name].state for name in ("base_model", "vocab", "tuned")} == {"held"}
    jobs.main(words)
    assert (slurm / "cancelled").read_text().split() == ["3", "4", "5", "6"]
    again = [directive(script, "dependency") for script in scripts(slurm)[6:]]
    assert again == ["afterok:20", "afterok:7", "afterok:8", "afterok:8"]


def test_a_job_between_two_lives_is_not_a_failed_one(
    words: list[str], slurm: Path, tmp_path: Path
) -> None:
    jobs.main(words)
    (slurm / "alive").write_text("1\n")
    life = {"started": "now", "token": 1, "job": "2", "restart": 0}
    decision = {"decided": utc_now(), "job": "2", "restart": 0, "decision": "requeue"}
    path = tmp_path / "out/base/lives.jsonl"
    path.write_text(f"{json.dumps(life)}\n{json.dumps(decision)}\n")
    assert read_states(tmp_path / "out")["base"].state == "submitted"
    decision |= {"decided": "2026-01-01T00:00:00+00:00"}
    path.write_text(f"{json.dumps(life)}\n{json.dumps(decision)}\n")
    found = read_states(tmp_path / "out")["base"]
    assert (found.state, "ended between two lives" in str(found.reason)) == ("failed", True)
    decision |= {"decision": "give up", "decision_reason": "its data cannot be used"}
    path.write_text(f"{json.dumps(life)}\n{json.dumps(decision)}\n")
    found = read_states(tmp_path / "out")["base"]
    assert (found.state, found.reason) == ("failed", "its data cannot be used")


def test_a_graph_is_submitted_whole_or_not_at_all(
    words: list[str], slurm: Path, tmp_path: Path
) -> None:
    (slurm / "refuse").touch()
    with pytest.raises(ConfigError, match="Slurm refuses the job: no more"):
        jobs.main(words)
    assert (slurm / "cancelled").read_text().split() == ["1", "2", "3"]


def test_a_job_that_cannot_be_cancelled_is_not_made_twice(
    words: list[str], slurm: Path, tmp_path: Path
) -> None:
    jobs.main(words)
    finish_letters(tmp_path / "out")
    (slurm / "alive").write_text("3\n4\n5\n6\n")  # job 2 has failed
    (slurm / "scancel").write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="scancel 3 failed: no controller"):
        jobs.main(words)


def test_a_run_that_does_not_fit_needs_force(words: list[str], slurm: Path) -> None:
    words += ["cluster=taiwania2", "cluster.account=MST109001", "cluster.max_lives=1", "--dry-run"]
    words += ["base.loop.max_steps=10000000000", "+base.model.architecture.vocab_size=512"]
    with pytest.raises(ConfigError, match=r"step base: takes \d+ jobs .*--force submits"):
        jobs.main(words)
    assert jobs.main([*words, "--force"]) == 0
    assert scripts(slurm) == []


def test_nothing_is_submitted_where_one_run_does_not_fit(words: list[str], slurm: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        jobs.main([*words, "judge.name=c d", "tuned.name=a b"])
    text = str(caught.value)
    assert "step judge: " in text and "step tuned: " in text
    assert scripts(slurm) == []
