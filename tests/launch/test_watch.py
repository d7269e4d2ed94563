"""`kuroshio watch`: the table, the page and the JSON of what run folders say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from run_folders import RunFolder, fake_commands

from launch import logs
from launch.__main__ import dispatch
from launch.graph.state import PipelineState, StepState, write_state
from launch.monitor.queue import Queue
from launch.watch import Watch, follow, main
from trainer.errors import CheckpointError, ConfigError, StorageError

ROOT = Path(__file__).resolve().parents[2]
PRICES = [
    {"who": "academic", "currency": "TWD", "per_gpu_hour": 10.0, "source": "s", "date": "2026"},
    {"who": "industrial", "currency": "TWD", "per_gpu_hour": 30.0, "source": "s", "date": "2026"},
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs and a Slurm in which one of them runs and one waits for its second life."""
    now = time.time()
    line = (
        f"7|7|RUNNING|{now + 300:.0f}|{now - 3600:.0f}|None|n[1-2]\n8|8|PENDING|N/A|N/A|Priority|"
    )
    path = fake_commands(tmp_path / "bin", squeue=line)
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "160")
    runs = tmp_path / "runs"
    cluster = {"site": {"prices": PRICES, "gpus_per_node": 8}}
    run = RunFolder(runs / "sft", now, cluster=cluster).submitted("7", plan={"gpu_hours": 9.5})
    run.life(3600, job="7", world_size=8).train(120, 1, accuracy=0.875).save(100, 240).hold(1)
    wandb = runs / "sft" / "wandb" / "offline-run-1"
    wandb.mkdir(parents=True)
    (wandb / "run-1.wandb").touch()
    run = RunFolder(runs / "group" / "ppo", now, stage={"name": "ppo"}).submitted("8")
    run.life(9000, job="8", token=0).end(4000, 1, token=0, reason="node lost")
    run.life(3600, job="8").end(1800, 75, decision="requeue", decision_reason="time limit. Life 2")
    run.write("metrics.jsonl", {"split": "train", "step": 3, "time": now, "reward": "nan"})
    RunFolder(runs / "done", now).life(60).train(400, 10).save(400, 5).end(5, 0)
    (runs / "store").mkdir()
    (runs / "store" / "config.yaml").write_text("not: a run")
    return runs


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return re.sub(r"[ \n]+", " ", capsys.readouterr().out)


def test_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--once"]) == 0
    text = shown(capsys)
    for part in (
        "running", "job 7 on n[1-2]", "30% loss 1.2345", "120 / 400", "accuracy 87.5%",
        "12.3k tok/s", "8.00 of 9.50 GPU-h", "TWD 80.0", "TWD 240.0",
        "step 100", "0:04:0", "done in 0:09:1", "limit in 0:0",
        "sft: its job's time ends before the run does",
        "requeued", "time limit. Life 2", "group/ppo: life 1 ended: node lost", "reward nan",
        "finished", "100%", "400 / 400",
        f"wandb sync {runs}/sft/wandb/offline-run-1",
    ):  # fmt: skip
        assert part in text, f"{part!r} is not in {text}"
    assert "store" not in text
    calls = (runs.parent / "bin" / "calls").read_text().splitlines()
    assert len(calls) == 1 and "--states=all" in calls[0]


def test_a_narrow_terminal_has_every_column(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main([str(runs), "--once"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for part in ("8.00 of 9.50", "GPU-h", "step 100", "120 / 400", "life 2", "accuracy"):
        assert part in out, part


def test_json_has_every_figure(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)["runs"]}
    assert set(found) == {"sft", "group/ppo", "done"}
    sft, ppo = found["sft"], found["group/ppo"]
    assert (sft["step"], sft["max_steps"], sft["saved_step"], sft["job"]) == (120, 400, 100, "7")
    assert sft["eta_s"] == pytest.approx(560, abs=5) and sft["limit_s"] == pytest.approx(300, abs=3)
    assert [cost["amount"] for cost in sft["costs"]] == pytest.approx([80, 240], rel=0.01)
    assert ppo["state"] == "requeued" and ppo["figures"] == {"reward": "nan"} and not ppo["costs"]
    assert found["done"]["state"] == "finished" and found["done"]["eta_s"] is None


class Tags(HTMLParser):
    """Collects text, references and unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.open, self.references = "", list[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data.strip()}" if "style" not in self.open else ""


def test_page_is_self_contained_and_escaped(runs: Path, tmp_path: Path) -> None:
    RunFolder(runs / "<b>odd", time.time()).life(9).end(1, 76, reason="<script>")
    page = tmp_path / "pages" / "watch.html"
    assert main([str(runs), "--once", "--html", str(page)]) == 0
    html = page.read_text("utf-8")
    tags = Tags(html)
    assert tags.open == [] and tags.references == [] and "http-equiv" not in html
    assert "<script" not in html and "<b>odd" not in html
    for part in ("<b>odd", "<script>", "8.00 of 9.50 GPU-h", "120 / 400", "wandb sync"):
        assert part in tags.text, part
    watch = Watch(runs, Queue(is_on=False), page)
    watch.refresh(30.0)
    assert '<meta http-equiv="refresh" content="30">' in page.read_text("utf-8")


def test_page_that_cannot_be_written(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="give another file with --html"):
        main([str(runs), "--once", "--html", str(tmp_path / "file" / "x.html")])


def test_without_slurm_the_files_decide(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "sft"), "--json", "--no-slurm"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["state"] == "running" and run["limit_s"] is None
    assert not (runs.parent / "bin" / "calls").exists()


def test_runs_without_jobs_need_no_squeue(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "done"), "--once"]) == 0
    assert not (runs.parent / "bin" / "calls").exists()


def test_a_failing_squeue_is_told(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runs.parent / "bin" / "squeue"
    script.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact' >&2\nexit 1\n")
    assert main([str(runs), "--once"]) == 0
    assert "squeue failed: slurm_load_jobs error: Unable to contact" in shown(capsys)


def test_a_folder_that_vanishes_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder"):
        main([str(tmp_path / "none"), "--once"])
    with pytest.raises(ConfigError, match=r"no run in .* or below"):
        main([str(tmp_path), "--once"])


def steps(folder: Path) -> dict[str, StepState]:
    states = {
        "tokenizer": StepState("tokenizer", None, str(folder / "tokenizer"), [], state="done"),
        "sft": StepState("run", "sft", str(folder / "sft"), ["tokenizer"], "submitted", "7"),
        "model": StepState("export", None, str(folder / "model"), ["sft"], "submitted", "8"),
        "dpo": StepState("run", "dpo", str(folder / "dpo"), ["model"], "submitted", "9"),
        "ppo": StepState("run", "ppo", str(folder / "ppo"), ["dpo"], "submitted", "10"),
    }
    return states


def test_steps_of_a_pipeline(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_state(runs, PipelineState("demo", "f", [], "submit", "t", steps(runs)))
    assert main([str(runs), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in found] == list(steps(runs))
    states = {run["name"]: run["state"] for run in found}
    # dpo's job is not known to Slurm any more and left nothing; ppo waits for it in vain.
    assert states == {"tokenizer": "finished", "sft": "running", "model": "pending",
                      "dpo": "failed", "ppo": "held"}  # fmt: skip
    assert found[-1]["note"] == "dpo did not finish" and found[-1]["parents"] == ["dpo"]
    assert main([str(runs.parent), "--json", "--no-slurm"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in found] == [f"runs/{name}" for name in steps(runs)]
    assert found[2]["state"] == "submitted"


def test_a_damaged_pipeline_is_told(runs: Path) -> None:
    (runs / "pipeline.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"pipeline\.json"):
        main([str(runs), "--once"])


def test_table_follows_until_it_is_interrupted(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        (runs / "done" / "metrics.jsonl").unlink(missing_ok=True)
        if len(waits) == 3:
            raise KeyboardInterrupt

    page = tmp_path / "watch.html"
    follow(Watch(runs, Queue(), page), 5.0, sleep)
    assert waits == [5.0, 5.0, 5.0]
    assert 'content="5"' in page.read_text("utf-8")
    assert len((runs.parent / "bin" / "calls").read_text().splitlines()) == 1  # within a minute
    with pytest.raises(SystemExit):
        main([str(runs), "--every", "0.5"])
    assert "less than 1 second" in capsys.readouterr().err


def test_verbs_of_a_login_node_import_nothing_heavy(runs: Path) -> None:
    (runs / "done" / "logs").mkdir()
    (runs / "done" / "logs" / "rank_00000.log").write_text("hello\n")
    done = str(runs / "done")
    code = (
        "import sys\nfrom launch.__main__ import dispatch\n"
        f"for words in (['watch', {str(runs)!r}, '--once', '--html', {str(runs / 'w.html')!r}],\n"
        f"  ['logs', {done!r}], ['stop', {done!r}], ['resume', {done!r}]):\n"
        "    assert dispatch(words) == 0, words\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'hydra', 'numpy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done_process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert done_process.stdout.endswith("HEAVY []\n"), done_process.stdout + done_process.stderr


def test_commands_of_the_page(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(runs.parent / "RUN", time.time()).life(60).train(400, 10).save(400, 5).end(5, 0)
    monkeypatch.chdir(runs.parent)
    text = (ROOT / "docs" / "watch.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    verbs = set()
    for line in lines:
        words = shlex.split(line.partition(" | ")[0], comments=True)[1:]
        verbs.add(words[0])
        if "--follow" in words:
            logs.parse(words[1:])  # it would never end
        else:
            assert dispatch(words) == 0, line
    assert verbs == {"watch", "logs", "stop", "resume"} and (runs.parent / "page.html").exists()
    last = json.loads("{" + capsys.readouterr().out.rpartition("\n{\n")[2])
    assert last["runs"][0]["state"] == "finished"


def test_config_of_a_run_is_only_read(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    main([str(runs), "--once"])
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before
    assert yaml.safe_load((runs / "sft" / "config.yaml").read_text())["name"] == "tuned"
