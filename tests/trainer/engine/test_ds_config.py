"""The DeepSpeed config holds keys that DeepSpeed reads, and sizes its buffers by the model."""

from __future__ import annotations

from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from trainer.config import EngineConfig
from trainer.engine.ds_config import MAX_BUCKET_ELEMENTS, ModelSize, make_ds_config


class Recorder(dict):
    """A dict that remembers which keys somebody asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def make(engine: EngineConfig, precision: str = "fp32", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "micro_batch_size": 2,
        "grad_accum_steps": 4,
        "grad_clip": 1.0,
        "size": ModelSize(num_params=1000, largest_param=301),
        "world_size": 1,
        "on_cuda": False,
    }
    return make_ds_config(engine, precision=precision, **{**settings, **changes})


ENGINES = [
    EngineConfig(zero_stage=0),
    EngineConfig(zero_stage=1),
    EngineConfig(zero_stage=2, offload_optimizer="cpu"),
    EngineConfig(zero_stage=3, offload_optimizer="cpu", offload_params="cpu"),
    EngineConfig(zero_stage=3, offload_optimizer="nvme", offload_params="nvme", nvme_path="/local"),
]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_reads_every_top_level_key(engine: EngineConfig, precision: str) -> None:
    """DeepSpeed ignores a top-level key it does not know without a word."""
    recorder = Recorder(make(engine, precision))
    DeepSpeedConfig(recorder)
    assert set(recorder) <= recorder.asked, set(recorder) - recorder.asked
    misspelt = Recorder({**make(engine, precision), "gradient_cliping": 1.0})
    DeepSpeedConfig(misspelt)
    assert "gradient_cliping" not in misspelt.asked  # so the test above can fail


def test_batch_sizes_multiply() -> None:
    config = make(ENGINES[0], world_size=3)
    assert config["train_batch_size"] == 2 * 4 * 3


def test_buckets_are_no_larger_than_the_model() -> None:
    assert make(ENGINES[1])["zero_optimization"]["reduce_bucket_size"] == 1000
    large = make(ENGINES[1], size=ModelSize(10**10, 10**8))
    assert large["zero_optimization"]["reduce_bucket_size"] == MAX_BUCKET_ELEMENTS
    odd = make(ENGINES[1], size=ModelSize(1001, 301))["zero_optimization"]
    assert odd["allgather_bucket_size"] == 1002  # DeepSpeed refuses an odd one


def test_nvme_buffers_hold_the_largest_share() -> None:
    block = make(ENGINES[4], world_size=2)["zero_optimization"]["offload_param"]
    assert block["buffer_size"] >= 151 and block["buffer_size"] % 4096 == 0
    assert block["nvme_path"] == "/local"


def test_fp16_scales_dynamically_from_the_configured_power() -> None:
    engine = EngineConfig(initial_loss_scale_power=8, loss_scale_window=7, min_loss_scale=4)
    block = make(engine, "fp16")["fp16"]
    assert block["loss_scale"] == 0 and block["initial_scale_power"] == 8
    assert block["loss_scale_window"] == 7 and block["min_loss_scale"] == 4
