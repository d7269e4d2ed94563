"""A step that may still be refused once its gradient norm is known, before anything has moved.

DeepSpeed's optimizers (0.19.8) compute the norm of all gradients inside their step, and throw the
gradients away when it is not finite. Telling them that of a norm which is refused makes them leave
weights, moments and counters as they are, whatever the ZeRO stage, offload and precision. This is
the only place that knows where each of them has its norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trainer.engine.grouping import global_norm
from trainer.engine.precision import load_scaler_state, scaler_state

Judge = Callable[[torch.Tensor], bool]  # gradient norm [], unscaled -> whether to step


class Trial:
    """One optimizer step on trial.

    Attributes:
        norm: the gradient norm [] before clipping; None where DeepSpeed saw a gradient that is not
            finite before it computed a norm, and did not step.
        refused: whether the judge said no.
    """

    def __init__(self, judge: Judge) -> None:
        self.norm: torch.Tensor | None = None
        self.refused = False
        self._judge = judge

    def refuses(self, norm: Any, scale: float = 1.0) -> bool:
        """Ask the judge about a norm that is still multiplied by the loss scale."""
        norm = torch.as_tensor(norm, dtype=torch.float32)
        # DeepSpeed's -1 stands for a norm that is not finite.
        self.norm = torch.where(norm < 0, torch.inf, norm) / scale
        self.refused = not self._judge(self.norm)
        return self.refused


def step_on_trial(
    step: Callable[[], None],
    optimizer: Any,
    judge: Judge,
    norm: torch.Tensor | None,
    *,
    is_fp16: bool,
) -> Trial:
    """Make a step about which ``judge`` decides, on every rank alike.

    Args:
        step: of DeepSpeed's engine.
        optimizer: what ``deepspeed.initialize`` returned as optimizer.
        judge: is asked once, when the norm is known.
        norm: [] where the caller knows it already: DeepSpeed leaves fp32 under ZeRO-0 to torch.
        is_fp16: whether there is a loss scale, which a refused step leaves as it is.

    Returns:
        How it went; in fp16 the norm stays unknown if the scaler skipped the step.
    """
    trial = Trial(judge)
    scaler = scaler_state(optimizer) if is_fp16 else {}
    patched, name = _intercept(optimizer, trial, norm)
    try:
        step()
    finally:
        delattr(patched, name)
    if trial.norm is None and not is_fp16:
        trial.refuses(torch.inf)
    if trial.refused and is_fp16:
        load_scaler_state(optimizer, scaler)
    return trial


def _intercept(optimizer: Any, trial: Trial, norm: torch.Tensor | None) -> tuple[Any, str]:
    """Put the trial where the optimizer has its norm; return the object and attribute."""
    own = vars(optimizer)
    if norm is not None:
        return _whole_step(optimizer, trial, norm)
    if "fp32_partitioned_groups_flat" in own:
        return _zero3(optimizer, trial)
    if "bit16_groups" in own:
        return _zero12(optimizer, trial)
    if "bf16_groups" in own:
        return _bf16_zero1(optimizer, trial)
    return _replicated(optimizer, trial)


def _whole_step(optimizer: Any, trial: Trial, norm: torch.Tensor) -> tuple[Any, str]:
    step = optimizer.step

    def step_unless_refused(*args: Any, **kwargs: Any) -> Any:
        return None if trial.refuses(norm) else step(*args, **kwargs)

    optimizer.step = step_unless_refused
    return optimizer, "step"


def _zero3(optimizer: Any, trial: Trial) -> tuple[Any, str]:
    norms = optimizer._get_norm_groups

    def norms_or_inf() -> list[torch.Tensor]:
        found = norms()
        whole = torch.stack([torch.as_tensor(one, dtype=torch.float32) for one in found])
        total = torch.where((whole < 0).any(), torch.inf, torch.linalg.vector_norm(whole))
        if trial.refuses(total, optimizer.loss_scale):
            return [torch.full_like(one, torch.inf) for one in found]
        return found

    optimizer._get_norm_groups = norms_or_inf
    return optimizer, "_get_norm_groups"


def _zero12(optimizer: Any, trial: Trial) -> tuple[Any, str]:
    norm = optimizer.scaled_global_norm

    def norm_or_inf(*args: Any, **kwargs: Any) -> Any:
        found = norm(*args, **kwargs)
        refused = trial.refuses(found, optimizer.loss_scale)
        return torch.full_like(torch.as_tensor(found), torch.inf) if refused else found

    optimizer.scaled_global_norm = norm_or_inf
    return optimizer, "scaled_global_norm"


def _bf16_zero1(optimizer: Any, trial: Trial) -> tuple[Any, str]:
    gradients = optimizer.get_grads_for_norm

    def gradients_or_inf(for_clipping: bool = False) -> Any:
        found = gradients(for_clipping=for_clipping)
        if for_clipping:
            return found
        whole, _ = found
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in whole]))
        if trial.refuses(norm):
            return [torch.full_like(whole[0], torch.inf)], {}
        return found

    optimizer.get_grads_for_norm = gradients_or_inf
    return optimizer, "get_grads_for_norm"


def _replicated(optimizer: Any, trial: Trial) -> tuple[Any, str]:
    checker, check = optimizer.overflow_checker, optimizer.overflow_checker.check

    def check_or_refuse(*args: Any, **kwargs: Any) -> bool:
        if check(*args, **kwargs) and optimizer.loss_scale_config.use_grad_scaling:
            return True
        params = (param for group in optimizer.fp16_groups for param in group)
        norm = global_norm(params, torch.float32)
        return trial.refuses(norm, optimizer.loss_scale_config.cur_scale)

    checker.check = check_or_refuse
    return checker, "check"
