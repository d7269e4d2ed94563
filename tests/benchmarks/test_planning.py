"""The calibration of `kuroshio plan`: published runs, measured peaks, and the page's markers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.inputs.planned_memory import PEAK_CASES, planned_peak
from benchmarks.inputs.published_runs import Comparison, assumed, read_rows, stated, summarise
from benchmarks.planning import PUBLISHED, fill, published_table, run_child

ROOT = Path(__file__).resolve().parents[2]
# A row of each way in which throughputs are printed, from the sources that the CSV names.
HEADER = (
    "system,model,params_b,vocab,seq,gpu,num_gpus,precision,parallelism,metric,value,unit,source,"
    "kind,reliability,note"
)
ROWS = (
    "llm-foundry,MPT-7b,6.659,50432,2048,A100-80GB,8,amp_bf16,FSDP,tokens_per_s_per_gpu,4641,"
    "tokens/s/GPU,README,reported,A,MFU 64.23% HFU 64.23%",
    "Megatron-LM,GPT-1.3B,1.3,50257,2048,V100-32GB,8,fp16,DP8,step_seconds,23,"
    "s per 512 x 2048 tokens,bigscience,reported,A,44.4 model TFLOP/s",
    "Qwen,Qwen-7B LoRA,7.721,151936,2048,A100-80GB,1,bf16,batch 1,step_seconds,5.2,"
    "s per optimizer step of 8 x 2048 tokens,README,reported,A,3151 tokens/s/GPU",
    "somebody,unknown-3B,3,32000,2048,A100-80GB,8,bf16,FSDP,tokens_per_s_per_gpu,1,,x,x,A,MFU 50%",
)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.csv"
    path.write_text("\n".join((HEADER, *ROWS)), encoding="utf-8")
    return path


def by_model(found: list[Comparison]) -> dict[str, Comparison]:
    return {one.model: one for one in found}


def test_stated_shares_give_the_published_speed(published: Path) -> None:
    found = by_model(list(stated(read_rows(published))))
    assert set(found) == {"MPT-7b", "GPT-1.3B"}
    assert found["MPT-7b"].published == 4641 and abs(found["MPT-7b"].error) < 0.01
    assert found["GPT-1.3B"].published == pytest.approx(512 * 2048 / 23 / 8)
    assert abs(found["GPT-1.3B"].error) < 0.2


def test_assumed_shares_are_compared_with_everything_known(published: Path) -> None:
    found = by_model(list(assumed(read_rows(published))))
    assert set(found) == {"MPT-7b", "GPT-1.3B", "Qwen-7B LoRA"}
    assert found["Qwen-7B LoRA"].published == 3151 and found["Qwen-7B LoRA"].efficiency == 0.45
    assert "3 runs: median error" in published_table(list(found.values()))


def test_all_published_runs_are_within_a_fifth_at_their_stated_share() -> None:
    if not PUBLISHED.is_file():
        pytest.skip(f"the collection of published runs is not at {PUBLISHED}")
    rows = read_rows(PUBLISHED)
    summary = summarise(list(stated(rows)))
    assert summary["runs"] >= 30 and summary["largest"] <= 0.2
    assert summarise(list(assumed(rows)))["median"] <= 0.2


@pytest.mark.slow
def test_peaks_are_planned_within_15_percent() -> None:
    measured = run_child("peaks")
    errors = {c: planned_peak(c) / p - 1 for c, p in zip(PEAK_CASES, measured, strict=True)}
    assert all(abs(error) <= 0.15 for error in errors.values()), errors


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n")
    fill(page, {"x": "new"})
    fill(page, {"x": "newer"})
    assert page.read_text() == "a\n<!-- x -->\nnewer\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="no <!-- y -->"):
        fill(page, {"y": "?"})


def test_page_is_written_by_the_script() -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    for name in ("plans", "adam", "states", "activations", "stated", "assumed"):
        inside = page.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
        assert len(inside.strip()) > 20, name
    assert sys.executable not in page and str(ROOT) not in page
