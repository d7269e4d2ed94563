"""What is in the memory of a GPU and of a node at a run's largest moment, by part."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.plan.activations import (
    Micro,
    backward_bytes,
    cache_bytes,
    forward_bytes,
    kept_bytes,
    last_norm_bytes,
    logps_bytes,
    loss_bytes,
    tile_bytes,
)
from trainer.plan.flops import device_peak
from trainer.plan.memory import EnginePlan, Model, bucket_bytes, state_bytes
from trainer.plan.work import Machine, Rollout, Work

LIVE_PARAMETERS = 10**9  # that ZeRO-3 keeps gathered, at most: stage3_max_live_parameters
KEYS_AND_VALUES = "rollout: keys and values"
LOADING = "models while they are loaded"


def gpu_memory(work: Work, engine: EnginePlan, machine: Machine) -> dict[str, float]:
    """Return what is on a GPU at the moment when most is, by part."""
    world = machine.num_gpus
    states = state_bytes(work.models, engine, world)
    transit = {"communication buffers": bucket_bytes(engine, _trained(work), world)}
    if engine.zero_stage == 3 and world > 1:
        live = min(LIVE_PARAMETERS, sum(model.counts.plain for model in work.models))
        transit["gathered weights"] = float(live * engine.element_bytes)
    micro = make_micro(work, engine, machine)
    moments = [transit | moment for moment in _training_moments(work, micro)]
    moments.append({"optimizer step": states.step})
    if work.rollout is not None:
        moments.append(_rollout_parts(work.rollout, engine, world))
    largest = max(moments, key=lambda moment: sum(moment.values()))
    return dict(states.gpu) | largest


def _trained(work: Work) -> int:
    return sum(model.counts.trained for model in work.models)


def make_micro(work: Work, engine: EnginePlan, machine: Machine) -> Micro:
    """Return what a rank computes at once, and by which attention."""
    peak = device_peak(machine.gpu) if machine.gpu else None
    has_kernel = peak is not None and peak.bf16 is not None and engine.precision != "fp32"
    return Micro(
        work.micro_batch_size * work.row_length,
        engine.element_bytes,
        engine.activation_checkpointing,
        on_gpu=peak is not None,
        has_kernel=has_kernel,
        is_packed=work.is_packed,
    )


def _training_moments(work: Work, micro: Micro) -> list[dict[str, float]]:
    """Return what there is beside the states while the loss, and while a layer is computed."""
    trained = {id(p.model): p.model for p in work.passes if p.trains}.values()
    kept = sum(kept_bytes(model.shape, micro) for model in trained)
    loss, backward = {"activations": kept}, {"activations": kept}
    for model in trained:
        backward["activations"] = max(
            backward["activations"], kept + backward_bytes(model.shape, micro)
        )
        if not model.scalar:
            loss["activations"] += last_norm_bytes(model.shape, micro)
            size = logps_bytes if work.wants_logps else loss_bytes
            loss["logits and loss"] = size(model.shape, micro, head_trained=_trains_head(model))
    frozen = [p.model for p in work.passes if not p.trains]
    quiet = [forward_bytes(m.shape, micro) + tile_bytes(m.shape, micro) for m in frozen]
    return [loss, backward, {"forward without gradients": max(quiet, default=0.0)}]


def _trains_head(model: Model) -> bool:
    is_full = model.tuning is not None and model.tuning.mode == "full"
    return bool(model.counts.trained_head) or (model.shape.tie_word_embeddings and is_full)


def _rollout_parts(rollout: Rollout, engine: EnginePlan, world: int) -> dict[str, float]:
    """Return what writing responses holds: keys and values, logits, the policy made whole."""
    shape, row = rollout.policy.shape, rollout.row_tokens
    rows = rollout.rows_together(world)
    cache = cache_bytes(shape, rows * row, row, engine.element_bytes)
    logits = rows * shape.vocab_size * (4 + engine.element_bytes)
    prompts = Micro(rows * rollout.max_prompt, engine.element_bytes, on_gpu=True)
    found = {KEYS_AND_VALUES: cache}
    found["rollout: forward"] = logits + forward_bytes(shape, prompts)
    if engine.zero_stage == 3:
        counted = rollout.policy.counts
        found["rollout: gathered policy"] = (
            counted.plain * engine.element_bytes + counted.packed_bytes
        )
    return found


def host_memory(work: Work, engine: EnginePlan, machine: Machine) -> tuple[dict[str, float], float]:
    """Return one node's host memory by part, and its disk: all ranks of the node together."""
    states = state_bytes(work.models, engine, machine.num_gpus)
    host = {part: size * machine.gpus_per_node for part, size in states.host.items()}
    if engine.zero_stage < 3:
        # Every rank reads the whole model before it goes to its GPU.
        whole = sum(c.plain for c in (m.counts for m in work.models)) * engine.element_bytes
        host[LOADING] = whole * machine.gpus_per_node
    return host, states.nvme * machine.gpus_per_node


def host_peak(host: Mapping[str, float]) -> float:
    """Return the largest moment: loading, or training with what is offloaded."""
    loading = host.get(LOADING, 0.0)
    return max(loading, sum(host.values()) - loading)
