"""``make demo``, from nothing to the tables and a chat model that plain transformers loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_demo_ends_with_tables_and_reports(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "samples/demo.py"],
        cwd=ROOT,
        env={**os.environ, "DEMO_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "continued/report.html").stat().st_size > 10_000
    assert (tmp_path / "vocab/audit.html").is_file()
    row = next(line for line in done.stdout.splitlines() if "zh_tw" in line and "→" in line)
    before, after, _, extended, trained = map(float, re.findall(r"\d+\.\d+", row))
    assert after < before  # tokens per character
    assert trained < extended  # bits per character
    prompts = [line for line in done.stdout.splitlines() if line.startswith("春天 → 春天")]
    assert prompts and len(prompts[0]) > len("春天 → 春天")
    assert (tmp_path / "tuned/report.html").stat().st_size > 10_000
    score = re.search(r"answered right, by rule: (\d+) of (\d+) → (\d+) of \2", done.stdout)
    assert score is not None
    right_before, num_questions, right_after = map(int, score.groups())
    assert num_questions == sum(1 for _ in (ROOT / "samples/chat_zh_tw_test.jsonl").open())
    assert right_before <= 0.02 * num_questions
    assert right_after >= 0.6 * num_questions
    assert "<|im_start|>user\n那高雄呢？<|im_end|>\n<|im_start|>assistant" in done.stdout
    sft, dpo, ppo = (figures_of(name, done.stdout) for name in ("SFT", "DPO", "PPO"))
    assert sft[1:3] == [50, 50] and sft[5] == 0
    for score, wins, wins_by_rule, courteous, right, kl, _ in (dpo, ppo):
        assert score > sft[0] + 2
        assert wins > 75 and wins_by_rule > 75
        assert courteous > 75 > 50 > sft[3]
        assert right > 0.5 * sft[4]
        assert 1 < kl < 12
    for run in ("reward", "dpo", "ppo"):
        assert (tmp_path / run / "report.html").stat().st_size > 10_000
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward_model")
    assert judge.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "chat_model")
    question = [{"role": "user", "content": "「黑」的反義詞是什麼？"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)
    # Whatever it says, the turn ends with the template's own token, not by the limit.
    assert out[0, -1].item() == tokenizer.convert_tokens_to_ids("<|im_end|>")


def figures_of(model: str, output: str) -> list[float]:
    """Return a model's row of the table of preferences."""
    row = next(line for line in output.splitlines() if re.match(rf"│ {model} +│", line))
    return [float(figure) for figure in re.findall(r"-?\d+\.\d+", row)]
