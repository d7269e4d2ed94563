"""Pipelines and sweeps as jobs of a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from launch.graph.state import StepState, read_states

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 400
PLACE = [
    "cluster=local_slurm",
    "cluster.account=MST109001",
    'cluster.site.gres="gpu:{n}"',
    "cluster.gpus_per_node=1",
    "cluster.site.cpus_per_gpu=1",  # one thread a rank: the number decides the last bits of sums
]
MICRO = [
    "engine.precision=fp32",
    "data.max_length=64",
    "data.num_processes=1",
    "loop.global_batch_tokens=512",
    "loop.micro_batch_size=2",
    "loop.save_every=2",
    "loop.max_steps=4",
    "loop.eval_chars=1000",
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_hidden_layers=1",
]
GRAPH = """
# In miniature.
steps:
  letters: {{tokenizer: {{paths: [samples/en.jsonl], vocab_size: 400}}}}
  base:
    run:
      - stage=pretrain
      - data=samples
      - data.sources.zh_tw.weight=0
      - data.store_dir=@{{dir}}/store
      - tokenizer.path=@{{letters}}
{micro}
  base_model: {{export: {{run: "@{{base}}", dtype: fp32}}}}
  tuned:
    run:
      - stage=sft
      - stage.sample_tokens=0
      - data=chat_samples
      - data.sources.chat.paths=["{chats}"]
      - data.template=plain
      - data.max_length=64
      - data.max_bad_row_share=1
      - data.store_dir=@{{dir}}/store
      - model=folder
      - model.path=@{{base_model}}
      - engine.precision=fp32
      - loop.max_steps=4
      - loop.global_batch_tokens=512
  tuned_model: {{export: {{run: "@{{tuned}}"}}}}
"""

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def kuroshio(environ: Mapping[str, str], *words: str) -> str:
    """Run a command from the checkout; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "launch", *words],
        env={**environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait(folder: Path, *ended: str) -> dict[str, StepState]:
    """Return the steps once each is in one of the states ``ended``."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        steps = read_states(folder)
        if all(step.state in ended for step in steps.values()):
            return steps
        assert time.monotonic() < deadline, steps
        time.sleep(0.5)


def test_a_failed_step_holds_its_children_and_a_second_submit_goes_on(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    chats, file, out = tmp_path / "chats.jsonl", tmp_path / "graph.yaml", tmp_path / "out"
    micro = "\n".join(f"      - {word}" for word in MICRO)
    file.write_text(GRAPH.format(micro=micro, chats=chats), encoding="utf-8")
    chats.write_text('{"messages": "none"}\n', encoding="utf-8")
    words = ["submit", f"pipeline={file}", f"dir={out}", *PLACE, "cluster.nodes=2"]
    printed = kuroshio(cluster.environ, *words)
    assert "tuned_model  submitted" in printed and "after tuned" in printed
    steps = wait(out, "done", "failed", "held")
    assert [step.state for step in steps.values()] == ["done", "done", "done", "failed", "held"]
    assert "65" in str(steps["tuned"].reason), steps["tuned"]
    lives = [json.loads(line) for line in (out / "base/lives.jsonl").read_text().splitlines()]
    assert lives[0]["world_size"] == 2
    assert cluster.show(str(steps["base"].job))["NumNodes"] == "2"
    first_jobs = {name: step.job for name, step in steps.items()}
    rows = (ROOT / "samples/chat_zh_tw.jsonl").read_text(encoding="utf-8").splitlines(True)
    chats.write_text("".join(rows[:300]), encoding="utf-8")
    kuroshio(cluster.environ, *words)
    steps = wait(out, "done")
    kept = [name for name, step in steps.items() if step.job == first_jobs[name]]
    assert kept == ["letters", "base", "base_model"]
    assert (out / "tuned_model/model.safetensors").is_file()
    # Nothing is left to do, and no job of the first graph waits for what cannot come.
    assert "submitted" not in kuroshio(cluster.environ, *words)
    deadline = time.monotonic() + TIMEOUT_S
    while cluster.call("squeue", "--noheader").strip():  # the last one's script may still end
        assert time.monotonic() < deadline, cluster.call("squeue")
        time.sleep(0.5)


def test_a_sweep_is_an_array_with_a_limit(
    cluster: Any, tmp_path: Path, english_tokenizer: Path
) -> None:
    out = tmp_path / "sweep"
    words = ["submit", "--multirun", "stage=pretrain", "data=samples", f"run_dir={out}", *PLACE]
    words += [f"tokenizer.path={english_tokenizer}", f"data.store_dir={tmp_path}/store", *MICRO]
    words += ["optim.lr=1e-3,3e-3", "--at-once", "1"]
    printed = kuroshio(cluster.environ, *words)
    number = printed.split()[1].partition("_")[0]
    assert "at most 1 at once" in printed
    assert "%1" in (out / "job.sbatch").read_text()
    deadline = time.monotonic() + TIMEOUT_S
    names = ("lr=0.001", "lr=0.003")
    while not all((out / name / "checkpoints/step_00000004").is_dir() for name in names):
        running = cluster.call("squeue", "--noheader", "--states=RUNNING", f"--jobs={number}")
        assert len(running.splitlines()) <= 1
        assert time.monotonic() < deadline, running
        time.sleep(0.5)
    while cluster.call("squeue", "--noheader").strip():
        time.sleep(0.5)
    table = kuroshio(cluster.environ, *words)
    rows = [
        line.split() for line in table.splitlines() if line.split()[:1] in (["0.001"], ["0.003"])
    ]
    assert [row[:2] for row in rows] == [["0.001", "4/4"], ["0.003", "4/4"]]
    assert "job " not in table


def test_a_pipeline_whose_runs_are_all_killed_ends_as_an_unbroken_one(
    cluster: Any, tmp_path: Path
) -> None:
    """Every stage of the demo, shortened; the whole demo takes the same script by hand."""
    short = ["loop.max_steps=10", "loop.eval_chars=2000", "ppo.loop.eval_chars=500"]
    short += [
        "engine.precision=fp32",
        "vocab.stage.audit_chars=1000",
        "tuned.stage.sample_tokens=1",
    ]
    short += ["dpo.stage.sample_tokens=1", "ppo.stage.sampling.max_new_tokens=4"]
    short += ["ppo.stage.rollouts_per_step=8", "ppo.loop.micro_batch_size=4"]
    script = ROOT / "benchmarks/long/killed_pipeline.py"
    words = ["--out", str(tmp_path), "--set", *short, "--cluster", *PLACE, "cluster.nodes=2"]
    done = subprocess.run(
        [sys.executable, str(script), *words],
        env={**cluster.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    runs = {name: row for name, row in result["steps"].items() if name in result["kills"]}
    # A run may end in the moment between its step and its kill; benchmarks has the long ones.
    assert len({*runs} & {"base", "vocab", "continued", "tuned", "reward", "dpo", "ppo"}) >= 5
    # The vocabulary's process may have died before it could say that it had begun.
    assert all(row["lives"] == 2 for name, row in runs.items() if name != "vocab"), runs
    assert all(row["equal"] for row in result["steps"].values())
