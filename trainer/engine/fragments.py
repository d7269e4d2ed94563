"""Where each rank keeps its share of a trainable parameter, for every ZeRO stage and offload.

A fragment is one contiguous piece of one flattened parameter with its fp32 master weight and its
Adam moments, as writable views. This is the only place that knows DeepSpeed's internal layouts
(0.19.8); checkpoints are written and read in terms of fragments alone, which is why they do not
depend on ZeRO stage, offload or world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + numel) of parameter ``name``, flattened; fp32 views."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int
    numel: int
    master: torch.Tensor  # [numel]
    exp_avg: torch.Tensor  # [numel]
    exp_avg_sq: torch.Tensor  # [numel]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the three views by kind."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


def iterate_fragments(
    optimizer: Any, names: dict[int, str], rank: int, world_size: int, *, write: bool
) -> Iterator[Fragment]:
    """Yield this rank's fragments of all trainable parameters.

    Args:
        optimizer: what ``deepspeed.initialize`` returned as optimizer.
        names: ``id(parameter)`` → checkpoint name, for trainable parameters.
        rank: this rank.
        world_size: number of ranks.
        write: whether the views are going to be changed (NVMe buffers are then written back).
    """
    if "fp32_partitioned_groups_flat" in vars(optimizer):
        return _zero3(optimizer, names, write)
    if {"bit16_groups", "bf16_groups"} & vars(optimizer).keys():
        return _zero12(optimizer, names)
    return _replicated(optimizer, names, *((0, 1) if write else (rank, world_size)))


def basic_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def get_adam_step(optimizer: Any) -> int:
    """Return how many updates Adam has applied (skipped overflow steps do not count)."""
    steps = {int(s["step"]) for s in basic_optimizer(optimizer).state.values() if "step" in s}
    return max(steps, default=0)


def set_adam_step(optimizer: Any, step: int) -> None:
    """Set Adam's update counter, which scales the bias correction, in every state."""
    for state in basic_optimizer(optimizer).state.values():
        if "step" not in state:
            continue
        if torch.is_tensor(state["step"]):
            state["step"].fill_(step)
        else:
            state["step"] = step


def reset_cpu_adam(optimizer: Any) -> None:
    """Make the C++ Adam's bias correction a function of the step alone.

    It multiplies beta**t up from call to call, so a resumed run (which starts from ``pow(beta,
    t)``) would differ in the last bits. A call on an empty tensor with a far step makes the next
    real call use ``pow`` as well.
    """
    basic: Any = basic_optimizer(optimizer)
    if "ds_opt_adam" in vars(basic):
        empty = torch.zeros(0)
        group = basic.param_groups[0]
        basic.ds_opt_adam.adam_update(
            basic.opt_id, 2**40, 0.0, *group["betas"], group["eps"], 0.0, True,
            empty, empty, empty, empty,
        )  # fmt: skip


def _ensure_state(optimizer: Any, flat: torch.Tensor) -> dict[str, Any]:
    """Return Adam's state of ``flat``, created as zeros where no step was taken yet."""
    basic = basic_optimizer(optimizer)
    state = basic.state[flat]
    if "exp_avg" not in state:
        # torch's Adam keeps the counter as a tensor, DeepSpeed's C++ Adam as an int.
        is_torch = isinstance(basic, torch.optim.AdamW)
        device = flat.device if basic.defaults.get("fused") else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device) if is_torch else 0
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(flat, dtype=torch.float32)
    return state


def _zero12(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    """ZeRO-1 and 2 (and the bf16 optimizer of ZeRO-1): one flat fp32 partition per group."""
    flats = [group["params"][0] for group in optimizer.optimizer.param_groups]
    groups = optimizer.bit16_groups if "bit16_groups" in vars(optimizer) else optimizer.bf16_groups
    for flat, group in zip(flats, groups, strict=True):
        state = _ensure_state(optimizer, flat)
        for param in group:
            mapping = param._hp_mapping
            if mapping is None:  # wholly on other ranks
                continue
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            views = [t.narrow(0, here.start, here.numel) for t in _triple(flat, state)]
            yield Fragment(names[id(param)], tuple(param.shape), there.start, there.numel, *views)


def _zero3(optimizer: Any, names: dict[int, str], write: bool) -> Iterator[Fragment]:
    """ZeRO-3: sub-groups of parameter slices; those on NVMe are swapped in one at a time."""
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        swapped = optimizer._swappable_optimizer_subgroup(index)
        if swapped:
            optimizer._optimizer_states_and_gradient_swap_in(index)
        state = _ensure_state(optimizer, flat)
        for param in optimizer.fp16_groups[index]:
            _, start, numel = optimizer.grad_position[optimizer.get_param_id(param)]
            offset = numel * optimizer._get_param_partition_rank(param)
            real = max(0, min(numel, param.ds_numel - offset))  # the last slice is padded
            if real:
                views = [t.narrow(0, start, real) for t in _triple(flat, state)]
                yield Fragment(names[id(param)], tuple(param.ds_shape), offset, real, *views)
        if swapped and write:
            optimizer._optimizer_states_and_gradient_swap_out(index)
        elif swapped:
            optimizer._release_swap_buffers(index)


def _replicated(
    optimizer: Any, names: dict[int, str], rank: int, world_size: int
) -> Iterator[Fragment]:
    """ZeRO-0: every rank holds everything; rank r answers for the r-th slice of each parameter
    (when written to, for all of it).

    fp32 has no separate masters; fp16 and bf16 keep one fp32 copy per parameter.
    """
    if "fp16_groups" in vars(optimizer):
        low = [p for group in optimizer.fp16_groups for p in group]
        masters = [p for group in optimizer.fp32_groups for p in group]
    else:
        low = masters = [p for group in optimizer.param_groups for p in group["params"]]
    for param, master in zip(low, masters, strict=True):
        state = _ensure_state(optimizer, master)
        share = -(-param.numel() // world_size)
        offset = min(rank * share, param.numel())
        numel = min(share, param.numel() - offset)
        if numel:
            views = [t.view(-1).narrow(0, offset, numel) for t in _triple(master, state)]
            yield Fragment(names[id(param)], tuple(param.shape), offset, numel, *views)


def _triple(master: torch.Tensor, state: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    return master.data, state["exp_avg"], state["exp_avg_sq"]
