"""Device-side sums: values, ranks, gradients, and ranks that disagree."""

import math
import multiprocessing
import os
import tempfile
from pathlib import Path
from queue import Queue

import pytest
import torch
import torch.distributed as dist

from trainer.metrics.bag import MetricBag


def test_means_ratios_and_sums() -> None:
    bag = MetricBag()
    bag.add("accuracy", torch.tensor(0.5), weight=1)
    bag.add("accuracy", torch.tensor(1.0), weight=3)
    bag.add_ratio("loss", torch.tensor(12.0), 4)
    bag.add_ratio("loss", 3.0, torch.tensor(1))
    bag.add_sum("num_tokens", 5)
    bag.add_sum("num_tokens", torch.tensor(7))
    assert bag.drain(lambda flat: flat) == {
        "accuracy": (0.5 + 3.0) / 4,
        "loss": 15 / 5,
        "num_tokens": 12.0,
    }


def test_drain_empties_and_zero_count_is_nan() -> None:
    bag = MetricBag()
    assert bag.drain(lambda flat: flat) == {}
    bag.add_ratio("loss", 0.0, 0)
    assert math.isnan(bag.drain(lambda flat: flat)["loss"])
    bag.add_sum("tokens", 1)
    assert bag.drain(lambda flat: flat) == {"tokens": 1.0}


def test_sums_hold_no_graph_and_keep_float64() -> None:
    bag = MetricBag()
    value = torch.tensor(1.0, requires_grad=True)
    bag.add("loss", value * 2)
    flats = []
    bag.add_sum("large", torch.tensor(2.0**53 - 1, dtype=torch.float64))
    drained = bag.drain(lambda flat: flats.append(flat) or flat)
    assert drained["large"] == 2.0**53 - 1
    assert flats[0].dtype == torch.float64 and not flats[0].requires_grad
    assert len(flats) == 1 and flats[0].dim() == 1  # one reduction for everything


def test_nothing_is_read_before_drain() -> None:
    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func not in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__)
            return super().__torch_function__(func, types, args, kwargs or {})

    bag = MetricBag()
    for _ in range(3):
        bag.add("loss", torch.tensor(2.0).as_subclass(Unreadable), weight=2)


def test_ranks_with_other_names_are_refused() -> None:
    other = MetricBag()
    other.add_sum("tokens", 1)
    flats: list[torch.Tensor] = []
    other.drain(lambda flat: flats.append(flat) or flat)
    bag = MetricBag()
    bag.add_sum("docs", 1)
    with pytest.raises(RuntimeError, match="different metrics; this rank has docs"):
        bag.drain(lambda flat: flat + flats[0])


def _rank(rank: int, folder: str, results: "Queue[dict[str, float]]") -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    bag = MetricBag()
    bag.add_ratio("loss", torch.tensor(10.0 * (rank + 1)), 2 + 6 * rank)
    bag.add_sum("tokens", rank + 1)

    def reduce(flat: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(flat)
        return flat

    results.put(bag.drain(reduce))
    dist.destroy_process_group()


def test_two_ranks_weigh_by_count() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(r, folder, results)) for r in range(2)]
        for process in ranks:
            process.start()
        drained = [results.get(timeout=60) for _ in ranks]
        for process in ranks:
            process.join(timeout=60)
        assert Path(folder).exists()
    # 30 over 10 targets, not the mean of 10/2 and 20/8.
    assert drained == [{"loss": 3.0, "tokens": 3.0}] * 2
