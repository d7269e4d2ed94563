"""The only door to DeepSpeed: one trained model and its optimizer.

The engine undoes DeepSpeed's own averaging over ranks and accumulation steps, so a caller passes
the summed loss divided by the global number of targets and gets exactly its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers.integrations.deepspeed import HfDeepSpeedConfig, prevent_arange_dtype_change

from trainer import heartbeat
from trainer.config import EngineConfig, OptimConfig
from trainer.engine.committed import Reader
from trainer.engine.fragments import (
    Fragment,
    basic_optimizer,
    iterate_fragments,
    reset_cpu_adam,
    set_adam_step,
)
from trainer.engine.grouping import global_norm, group_parameters
from trainer.engine.hooks import hooks_off
from trainer.engine.judged import Judge, step_on_trial
from trainer.engine.notices import quiet_deepspeed
from trainer.engine.ops import build_ops, needed_ops
from trainer.engine.precision import LossScale, native_precision
from trainer.errors import ConfigError

BUILDERS = {"cpu_adam": "CPUAdamBuilder", "async_io": "AsyncIOBuilder"}


def init_distributed(local_rank: int, timeout_s: int) -> torch.device:
    """Join the process group named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Returns:
        The device of this rank.
    """
    quiet_deepspeed()
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    # An op for inference only; building it costs a start of a new machine minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # auto_mpi_discovery would import mpi4py and guess addresses.
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return device


def choose_precision(asked: str) -> str:
    """Return ``fp32``, ``bf16`` or ``fp16``; ``auto`` takes bf16 where it is computed natively."""
    if asked != "auto":
        if asked == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError(
                "engine.precision=fp16 is not supported on this device; use fp32, or bf16 where "
                "the CPU or GPU computes it"
            )
        return asked
    return native_precision()


def prepare_ops(engine: EngineConfig, local_rank: int) -> None:
    """Compile what offload needs once per node, before the ranks need it."""

    def load(op: str) -> None:
        get_accelerator().create_op_builder(BUILDERS[op]).load(verbose=False)

    build_ops(needed_ops(engine), local_rank, load)


@dataclass(frozen=True)
class Partitioning:
    """How ZeRO-3 creates and fills parameters that no rank ever holds whole."""

    ds_config: dict[str, Any]

    @contextmanager
    def construction(self) -> Iterator[None]:
        """Split every parameter over the ranks as soon as its module is constructed."""
        with prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=self.ds_config):
            yield

    @contextmanager
    def transformers_loading(self) -> Iterator[None]:
        """Let ``from_pretrained`` split what it loads (it may hold a whole copy on the way)."""
        registration = HfDeepSpeedConfig(self.ds_config)  # transformers refers to it weakly
        try:
            yield
        finally:
            del registration

    @staticmethod
    def fill(param: torch.nn.Parameter, read: Callable[[], torch.Tensor]) -> None:
        """Set one split parameter from its full value, which rank 0 alone reads."""
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0), torch.no_grad():
            if dist.get_rank() == 0:
                param.data.copy_(read().view(param.shape))


def partitioning(ds_config: dict[str, Any]) -> Partitioning | None:
    """Return how models are loaded under ZeRO-3, None for the other stages."""
    return Partitioning(ds_config) if ds_config["zero_optimization"]["stage"] == 3 else None


class Engine:
    """One model trained by DeepSpeed.

    Args:
        model: module whose forward returns a summed loss; its trainable parameters are those with
            ``requires_grad``.
        engine: ZeRO stage, offload.
        optim: AdamW's hyperparameters.
        ds_config: from ``make_ds_config``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        name_of: from a parameter's name in the module to that in checkpoints.
        lr_factors: factors of the learning rate by a part of the parameters' names.
        grouped_apart: parts of names whose parameters ``step`` can hold still.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        ds_config: dict[str, Any],
        precision: str,
        name_of: Callable[[str], str] = str,
        lr_factors: Mapping[str, float] = MappingProxyType({}),
        grouped_apart: Sequence[str] = (),
    ) -> None:
        self.config = engine
        self._name_of = name_of
        self.precision = precision
        self.grad_accum_steps: int = ds_config["gradient_accumulation_steps"]
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        optimizer = make_optimizer(model, engine, optim, lr_factors, grouped_apart)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        # Some of DeepSpeed's optimizers begin with a step on zero gradients: the learning rate of 0
        # left the weights as they were, and Adam's bias correction must not count it.
        set_adam_step(self.optimizer, 0)
        if self.world_size == 1 and engine.zero_stage == 0:
            self.engine.enable_backward_allreduce = False  # copies all gradients twice, for nothing
        self.device = self.engine.device
        self.names = {id(param): name for name, param in self.trainable().items()}
        self._grad_norm: torch.Tensor | None = None
        self._was_refused = False
        self._is_fp16 = precision == "fp16"
        self._scale = LossScale(self.optimizer, engine.min_loss_scale) if self._is_fp16 else None
        self._plain_fp32 = engine.zero_stage == 0 and precision == "fp32"
        self._cpu_adam = engine.offload_optimizer != "none"
        if engine.compile:
            self.engine.compile()

    @property
    def module(self) -> torch.nn.Module:
        """Return the module inside."""
        return self.engine.module

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Run the model's forward."""
        heartbeat.beat()
        return self.engine(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool | None = None) -> None:
        """Accumulate the gradient of ``loss`` (already divided by the global target count).

        DeepSpeed averages over ranks; multiplying by their number turns that into the sum. Under
        ZeRO-0 it divides fp16 gradients by the loss scale without having multiplied the loss by it.

        Args:
            loss: [].
            is_last: whether the window ends with this micro-batch, equal on all ranks; None counts
                to ``grad_accum_steps``. A run does either always or never.
        """
        if is_last is not None:
            self.engine.set_gradient_accumulation_boundary(is_last)
        factor = self.world_size * (self.loss_scale() if self.config.zero_stage == 0 else 1.0)
        self.engine.backward(loss * factor, scale_wrt_gas=False)

    def step(self, lr: float, held: str | None = None, judge: Judge | None = None) -> None:
        """Update the weights on a window's last micro-batch; before that, only count.

        Args:
            lr: the learning rate.
            held: one of ``grouped_apart``, whose parameters this step leaves as they are; one with
                several of these parts in its name belongs to the last.
            judge: is asked, on every rank alike, whether a gradient of that norm may move anything;
                no: weights, moments and counters stay. fp16 steps that overflow do not get to it.
        """
        if not self.engine.is_gradient_accumulation_boundary():
            return self.engine.step()
        for group in basic_optimizer(self.optimizer).param_groups:
            group["lr"] = 0.0 if held in group["parts"][-1:] else lr * group["lr_factor"]
        self._grad_norm, self._was_refused, scale = None, False, self.loss_scale()
        if self._plain_fp32:
            self._grad_norm = global_norm(self.engine.module.parameters())
        if self._cpu_adam:
            reset_cpu_adam(self.optimizer)
        step = self._scale.stepping(self.engine.step) if self._scale else self.engine.step
        if judge is None:
            step()
        else:
            known = (step, self.optimizer, judge, self._grad_norm)
            trial = step_on_trial(*known, is_fp16=self._is_fp16)
            self._grad_norm, self._was_refused = trial.norm, trial.refused
        if self._scale:
            if self.config.zero_stage == 0 and self._grad_norm is None:
                self._grad_norm = self._deepspeed_norm() / scale  # it leaves the scale in
            self._scale.end_step(self.overflowed(), self.loss_scale())

    def grad_norm(self) -> torch.Tensor:
        """Return the gradient norm of the last step, before clipping: [] on its device."""
        return self._deepspeed_norm() if self._grad_norm is None else self._grad_norm

    def _deepspeed_norm(self) -> torch.Tensor:
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float("nan") if norm is None else norm)

    def overflowed(self) -> bool:
        """Return whether the last fp16 step was skipped because a gradient overflowed."""
        return self._is_fp16 and not self._was_refused and bool(self.optimizer.overflow)

    def loss_scale(self) -> float:
        """Return the current loss scale (1 without fp16)."""
        return float(self.optimizer.loss_scale) if self._is_fp16 else 1.0

    @contextmanager
    def gathered(self, module: torch.nn.Module) -> Iterator[None]:
        """Hold the parameters of ``module`` whole on every rank, for many forwards without ranks.

        Under ZeRO-3 they are gathered once, and DeepSpeed's hooks, which would do so in every
        forward, are off; below it there is nothing to do. For between steps, not within one.
        """
        if self.config.zero_stage < 3:
            return (yield)
        split = self.optimizer.parameter_offload
        split.partition_all_parameters()  # also those still held or on their way since the last use
        hooks = [*split.forward_hooks, *split.backward_hooks]
        with deepspeed.zero.GatheredParameters(module.parameters()), hooks_off(module, hooks):
            yield

    def fragments(self, *, write: bool = False) -> Iterator[Fragment]:
        """Yield this rank's share of masters and moments (see ``fragments.py``)."""
        return iterate_fragments(
            self.optimizer, self.names, self.rank, self.world_size, write=write
        )

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return trainable parameters by name."""
        named = self.engine.module.named_parameters()
        return {self._name_of(n): p for n, p in named if p.requires_grad}

    @torch.no_grad()
    def set_low_precision(self, param: torch.nn.Parameter, name: str, reader: Reader) -> None:
        """Set the model's own copy of ``param`` from the fp32 value saved by that name."""
        if "ds_id" in vars(param):
            Partitioning.fill(param, partial(reader.read_whole, name))
        else:
            reader.read_into(param.data.view(-1), name)


def make_optimizer(
    model: torch.nn.Module,
    engine: EngineConfig,
    optim: OptimConfig,
    lr_factors: Mapping[str, float],
    grouped_apart: Sequence[str] = (),
) -> torch.optim.Optimizer:
    """Return AdamW (arXiv:1711.05101), in C++ on the host when its states are offloaded.

    Its learning rate is 0 until ``Engine.step`` sets one.
    """
    groups = group_parameters(model, optim.weight_decay, lr_factors, grouped_apart)
    settings: dict[str, Any] = {"lr": 0.0, "betas": tuple(optim.betas), "eps": optim.eps}
    if engine.offload_optimizer != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # builds on import of its op only

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)
