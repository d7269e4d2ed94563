"""Engine group → DeepSpeed's JSON, as a pure function.

DeepSpeed ignores a misspelt top-level key without a word, so the keys are written here once and a
test compares them with the keys DeepSpeed's own config class reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config import EngineConfig

# Elements of one gradient bucket. DeepSpeed's default of 5e8 allocates 2 GB per rank up front.
MAX_BUCKET_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class ModelSize:
    """What the buffers are sized by."""

    num_params: int
    largest_param: int  # elements


def make_ds_config(
    engine: EngineConfig,
    *,
    precision: str,
    micro_batch_size: int,
    grad_accum_steps: int,
    grad_clip: float,
    size: ModelSize,
    world_size: int,
    on_cuda: bool,
) -> dict[str, Any]:
    """Return the DeepSpeed config for one engine.

    Args:
        engine: the engine group.
        precision: ``fp32``, ``bf16`` or ``fp16`` (``auto`` already decided).
        micro_batch_size: rows per rank and forward.
        grad_accum_steps: forwards per optimizer step.
        grad_clip: largest gradient norm, 0 = off.
        size: parameter counts, for buffer sizes.
        world_size: number of ranks.
        on_cuda: whether buffers can be pinned and communication overlapped.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "train_batch_size": micro_batch_size * grad_accum_steps * world_size,
        "gradient_clipping": grad_clip,
        "steps_per_print": 10**9,  # the loop reports
        "zero_optimization": _zero(engine, size, world_size, on_cuda),
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
        if world_size > 1:  # a rank alone would only convert there and back
            config["communication_data_type"] = "fp32"  # 8 bits do not survive many ranks
    if precision == "fp16":
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # dynamic
            "initial_scale_power": engine.initial_loss_scale_power,
            "loss_scale_window": engine.loss_scale_window,
            "hysteresis": 1,
            "min_loss_scale": engine.min_loss_scale,
        }
    if precision != "fp32" and engine.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "nvme" in (engine.offload_optimizer, engine.offload_params):
        config["aio"] = {"block_size": 1 << 20, "queue_depth": 8, "overlap_events": True}
    return config


def _zero(engine: EngineConfig, size: ModelSize, world_size: int, on_cuda: bool) -> dict[str, Any]:
    """Return the ``zero_optimization`` block."""
    elements = max(1, min(MAX_BUCKET_ELEMENTS, size.num_params))
    bucket = elements + elements % 2  # ZeRO-1 and 2 refuse an odd one
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": on_cuda,
        "contiguous_gradients": True,
    }
    if engine.zero_stage in (1, 2):
        # What DeepSpeed calls scatter here is an all-reduce as well, with three copies around it.
        zero["reduce_scatter"] = False
    if engine.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 10**9}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = _device(engine, engine.offload_optimizer, on_cuda)
        if engine.offload_optimizer == "nvme":
            # Weight, gradient, two moments, and one spare.
            zero["offload_optimizer"]["buffer_count"] = 5
    if engine.offload_params != "none":
        zero["offload_param"] = _device(engine, engine.offload_params, on_cuda)
        if engine.offload_params == "nvme":
            share = -(-size.largest_param // world_size)
            aligned = -(-share // 4096) * 4096
            zero["offload_param"] |= {"buffer_size": aligned, "buffer_count": 6}
            zero["offload_param"]["max_in_cpu"] = 0
    return zero


def _device(engine: EngineConfig, device: str, on_cuda: bool) -> dict[str, Any]:
    """Return an offload block for ``cpu`` or ``nvme``."""
    block: dict[str, Any] = {"device": device, "pin_memory": on_cuda}
    if device == "nvme":
        block["nvme_path"] = engine.nvme_path
    return block
