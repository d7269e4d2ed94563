"""The punisher in miniature: two runs in a row, killed at random, end as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import missing

ROOT = Path(__file__).resolve().parents[2]
GRAPH = """
steps:
  letters: {tokenizer: {paths: [samples/en.jsonl], vocab_size: 400}}
  base:
    run:
      - stage=pretrain
      - data=samples
      - data.sources.zh_tw.weight=0
      - data.store_dir=@{dir}/store
      - data.max_length=128
      - data.num_processes=1
      - tokenizer.path=@{letters}
      - model=tiny
      - loop.global_batch_tokens=2048
      - loop.micro_batch_size=8
      - loop.max_steps=60
      - loop.eval_chars=1000
"""


@pytest.mark.faults(row=1)
@pytest.mark.slurm
@pytest.mark.slow
def test_a_punished_pipeline_ends_equal(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    file, out = tmp_path / "graph.yaml", tmp_path / "out"
    file.write_text(GRAPH, encoding="utf-8")
    script = [sys.executable, str(ROOT / "tests/faults/punish.py"), "--out", str(out)]
    words = ["--pipeline", str(file), "--faults", "4", "--per-minute", "8", "--node-share", "0"]
    done = subprocess.run(
        [*script, *words, "--seed", "3"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    punished, undisturbed = result["punished"], result["undisturbed"]
    assert result["steps_equal"] == {"letters": True, "base": True}
    assert punished["faults"] == len(result["faults"]) == 4
    assert undisturbed["faults"] == undisturbed["lost_steps"] == 0 and undisturbed["lives"] == 1
    assert undisturbed["runs"]["base"]["steps"] == 60
    rounds = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"round"')]
    assert punished["rounds"] == len(rounds) >= 1
    assert punished["runs"]["base"]["steps"] == 60 * len(rounds)
    assert sum(each["faults"] for each in rounds) == 4
    for each in (punished, undisturbed):
        assert 0 < each["productive_s"] < each["in_jobs_s"]
        share = each["productive_s"] / each["in_jobs_s"]
        assert each["effective_share"] == pytest.approx(share, abs=0.01)  # rounded
