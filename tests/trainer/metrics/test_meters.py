"""Throughput, ETA, MFU, training share and memory, on a clock of our own."""

import pytest
import torch

from trainer.metrics import meters
from trainer.metrics.meters import Meters, find_peak, measure_matmul, peak_memory_gib


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


CPU = torch.device("cpu")


def test_evaluation_and_saving_do_not_count() -> None:
    clock = Clock()
    meter = Meters(10, CPU, started_at=90.0, clock=clock)
    clock.now += 2
    meter.step(1000)
    with meter.pause():
        clock.now += 50
    clock.now += 2
    meter.step(1000)
    figures = meter.read(2)
    assert figures["tokens_per_s"] == pytest.approx(500)
    assert figures["tokens_per_s_overall"] == pytest.approx(500)
    assert figures["seconds"] == pytest.approx(2)
    assert figures["eta_s"] == pytest.approx(8 * 2)
    assert figures["train_time_share"] == pytest.approx(4 / 64)  # 10 s of start, 50 s of saving


def test_an_error_while_paused_still_counts_as_pause() -> None:
    clock = Clock()
    meter = Meters(10, CPU, started_at=100.0, clock=clock)
    with pytest.raises(ValueError, match="disk"), meter.pause():
        clock.now += 5
        raise ValueError("disk")
    clock.now += 1
    meter.step(10)
    assert meter.read(1)["seconds"] == pytest.approx(1)


def test_window_follows_and_overall_remembers() -> None:
    clock = Clock()
    meter = Meters(100, CPU, window_steps=2, started_at=100.0, clock=clock)
    for seconds in (10, 1, 1):
        clock.now += seconds
        meter.step(100)
    figures = meter.read(3)
    assert figures["tokens_per_s"] == pytest.approx(100)
    assert figures["tokens_per_s_overall"] == pytest.approx(25)
    assert figures["eta_s"] == pytest.approx(97)


def test_mfu_is_of_all_ranks_and_absent_without_a_peak() -> None:
    clock = Clock()
    meter = Meters(10, CPU, 1e6, 2e9, world_size=2, started_at=0.0, clock=clock)
    clock.now += 1
    meter.step(1000)
    assert meter.read(1)["mfu"] == pytest.approx(1000 * 1e6 / (2 * 2e9))
    assert "mfu" not in Meters(10, CPU, 1e6, None, clock=clock).read(0)
    assert "tokens_per_s" not in Meters(10, CPU, clock=clock).read(0)


def test_memory_is_the_peak_not_the_present() -> None:
    before = peak_memory_gib(CPU)
    block = torch.ones(int((before + 0.25) * 1024**3 / 4))
    high = peak_memory_gib(CPU)
    del block
    assert high >= before + 0.2
    assert peak_memory_gib(CPU) == pytest.approx(high, abs=0.05)


def test_measured_matmul_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = measure_matmul(CPU, torch.float32, 256, seconds=0.02)
    assert 1e8 < rate < 1e14
    monkeypatch.setattr(meters, "measure_matmul", lambda *_: 5e10)
    peak = find_peak(CPU, torch.bfloat16)
    assert peak.flops_per_s == 5e10
    assert peak.source == "measured matmul 1024³ bf16 on cpu"


def test_known_gpu_uses_the_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(meters, "measure_matmul", lambda *_: 1.0)
    device = torch.device("cuda:0")
    assert find_peak(device, torch.float16).flops_per_s == 125e12
    assert find_peak(device, torch.bfloat16).source.startswith("measured")  # V100 has no bf16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_and_peak() -> None:
    device = torch.device("cuda")
    block = torch.ones(2**28, device=device)
    assert peak_memory_gib(device) >= 1.0
    del block
    assert peak_memory_gib(device) >= 1.0
    peak = find_peak(device, torch.bfloat16)
    # What a large product reaches lies below the peak of the data sheet, but not far below.
    assert 0.3 * peak.flops_per_s < measure_matmul(device, torch.bfloat16, 8192)
    assert measure_matmul(device, torch.bfloat16, 8192) < 1.05 * peak.flops_per_s
