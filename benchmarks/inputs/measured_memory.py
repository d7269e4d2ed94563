"""What engines and activations really take, measured in this process for benchmarks/planning.py."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.inputs.planned_memory import LORA_RANK, SMALL, PeakCase, Sizes, StateCase
from launch.rendezvous import free_port
from trainer.config import EngineConfig, OptimConfig, PeftConfig
from trainer.engine import ds_config
from trainer.engine.engine import Engine, init_distributed, partitioning
from trainer.engine.fragments import basic_optimizer
from trainer.engine.precision import DTYPES
from trainer.models.adapters import apply_peft
from trainer.models.filling import fill_plain
from trainer.models.head import install_fused_head
from trainer.models.language_model import LanguageModel, name_in_decoder

BUCKET = 510  # gradients reduced together: a number by which its buffers are told apart


def join_alone() -> None:
    """Start a process group of one rank."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT=str(free_port()), DS_ACCELERATOR="cpu")
    init_distributed(0, 600)


def make_model(sizes: Sizes, dtype: torch.dtype) -> Any:
    """Return a LLaMA with random weights and the fused head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**sizes))
    if not any("ds_id" in vars(parameter) for parameter in model.parameters()):
        model = model.to(dtype)  # ZeRO-3 has split it in its own precision already
    install_fused_head(model, sizes["vocab_size"])
    return model


def measure_states(case: StateCase) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer of an engine in the middle of a step.

    Weights and optimizer are looked up by what they are; gradients are all other tensors that came
    with the engine and its first backward pass, except the reduction's bucket.
    """
    gc.collect()
    before = {pointer for pointer, _ in _storages(_all_tensors())}
    engine = _make_engine(case)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 32))
    positions = torch.arange(32).expand(2, 32)
    for _ in range(3):  # a step, so that the moments exist, and the first half of the next
        loss = engine(input_ids=ids, position_ids=positions, labels=ids)
        engine.backward(loss / 64)
        engine.step(1e-4)
    del loss, ids, positions
    gc.collect()
    weights = dict(_storages(_weights(engine)))
    optimizer = {k: v for k, v in _storages(_states(engine)) if k not in weights}
    buffers = dict(_storages(engine.module.buffers()))
    known = before | weights.keys() | optimizer.keys() | buffers.keys()
    rest = {k: v for k, v in _storages(_all_tensors()) if k not in known}
    gradients = sum(v for v in rest.values() if v > 64 and v not in (2 * BUCKET, 4 * BUCKET))
    return {
        "weights": sum(weights.values()),
        "gradients": gradients,
        "optimizer": sum(optimizer.values()),
    }


def _make_engine(case: StateCase) -> Engine:
    group = EngineConfig(zero_stage=case.zero_stage, precision=case.precision)  # type: ignore[arg-type]
    described = ds_config.make_ds_config(
        group,
        precision=case.precision,
        micro_batch_size=2,
        grad_accum_steps=2,
        grad_clip=1.0,
        size=ds_config.ModelSize(BUCKET, SMALL["vocab_size"] * SMALL["hidden_size"]),
        world_size=1,
        on_cuda=False,
    )
    split = partitioning(described)
    with split.construction() if split else nullcontext():
        model = make_model(SMALL, DTYPES[case.precision])
    if case.lora:
        peft = PeftConfig(mode="lora", rank=LORA_RANK)
        model = apply_peft(model, peft, None, split.fill if split else fill_plain)
    policy = LanguageModel(model, SMALL["vocab_size"]).train()
    return Engine(policy, group, OptimConfig(), described, case.precision, name_in_decoder)


def _storages(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of the storage of each tensor, each as often as it has tensors."""
    for tensor in tensors:
        storage = tensor.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()


def _all_tensors() -> Iterator[torch.Tensor]:
    """Yield every tensor that Python knows, and their gradients, which only C++ does."""
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad


def _weights(engine: Engine) -> Iterator[torch.Tensor]:
    for parameter in engine.module.parameters():
        yield vars(parameter).get("ds_tensor", parameter.data)


def _states(engine: Engine) -> Iterator[torch.Tensor]:
    """Yield fp32 weights and moments."""
    basic = basic_optimizer(engine.optimizer)
    for state in basic.state.values():
        yield state["exp_avg"]
        yield state["exp_avg_sq"]
    for fragment in engine.fragments():
        yield fragment.master


def measure_peak(case: PeakCase) -> int:
    """Return the most bytes that a forward and backward pass adds to weights and gradients.

    The profiler counts every allocation of torch's on the CPU.
    """
    sizes, rows, length = case.sizes, case.rows, case.length
    model = make_model(sizes, DTYPES[case.precision])
    if case.again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    policy = LanguageModel(model, sizes["vocab_size"]).train()
    ids = torch.randint(0, sizes["vocab_size"], (rows, length))
    positions = torch.arange(length).expand(rows, length)

    def step() -> None:
        policy(input_ids=ids, position_ids=positions, labels=ids).backward()

    step()  # gradients exist from now on
    return _peak_of(step)


def _peak_of(work: Callable[[], None]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure_host_adam(num_parameters: int = 20_000_000, repeats: int = 5) -> float:
    """Return the bytes a second that DeepSpeed's Adam reads and writes on one core of the host."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight = torch.nn.Parameter(torch.zeros(num_parameters))
    weight.grad = torch.full_like(weight, 1e-3)
    adam = DeepSpeedCPUAdam([weight], lr=1e-4)
    adam.step()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        adam.step()
        best = min(best, time.perf_counter() - start)
    return 28 * num_parameters / best  # without the copy in half precision
