"""What is in the memory of a GPU and of a node at a run's largest moment, by part."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.plan.activations import (
    Micro,
    activation_bytes,
    cache_bytes,
    forward_bytes,
    logps_bytes,
    loss_bytes,
    tile_bytes,
)
from trainer.plan.memory import EnginePlan, Model, bucket_bytes, state_bytes
from trainer.plan.work import Machine, Rollout, Work

LIVE_PARAMETERS = 10**9  # that ZeRO-3 keeps gathered, at most: stage3_max_live_parameters
LOADING = "models while they are loaded"


def gpu_memory(work: Work, engine: EnginePlan, world: int) -> tuple[dict[str, float], float]:
    """Return the parts of a GPU's memory, and the largest sum that exists at one time."""
    states = state_bytes(work.models, engine, world)
    parts = dict(states.gpu)
    counts = [model.counts for model in work.models]
    trained = sum(c.trained for c in counts)
    standing = sum(parts.values())
    buckets = bucket_bytes(engine, trained, world)
    parts["buckets"] = buckets
    if engine.zero_stage == 3:
        live = min(LIVE_PARAMETERS, sum(c.plain for c in counts))
        parts["gathered weights"] = live * engine.element_bytes * (world > 1)
    parts["activations"], parts["logits"] = _training_bytes(work, engine)
    training = parts["activations"] + parts["logits"] + buckets + parts.get("gathered weights", 0)
    peak = standing + max(training, states.step)
    if work.rollout is not None:
        writing = _rollout_bytes(work.rollout, engine, world)
        parts |= writing
        peak = max(peak, standing + sum(writing.values()))
    return parts, peak


def _micro(work: Work, engine: EnginePlan) -> Micro:
    return Micro(
        work.micro_batch_size * work.row_length,
        engine.element_bytes,
        engine.activation_checkpointing,
        has_kernel=engine.precision == "bf16",
    )


def _training_bytes(work: Work, engine: EnginePlan) -> tuple[float, float]:
    """Return activations and logits of the largest micro-batch."""
    micro = _micro(work, engine)
    activations, logits = 0.0, 0.0
    for one in {id(p.model): p for p in work.passes if p.trains}.values():
        activations += activation_bytes(one.model.shape, micro)
        if not one.model.scalar:
            size = logps_bytes if work.wants_logps else loss_bytes
            head_trained = _trains_head(one.model)
            logits = max(logits, size(one.model.shape, micro, head_trained=head_trained))
    frozen = [p.model for p in work.passes if not p.trains]
    quiet = max(
        (forward_bytes(m.shape, micro) + tile_bytes(m.shape, micro) for m in frozen), default=0.0
    )
    return max(activations, quiet - logits), logits


def _trains_head(model: Model) -> bool:
    counted = model.counts
    tied = (
        model.shape.tie_word_embeddings and model.tuning is not None and model.tuning.mode == "full"
    )
    return bool(counted.trained_head) or tied


def _rollout_bytes(rollout: Rollout, engine: EnginePlan, world: int) -> dict[str, float]:
    """Return what writing responses holds: keys and values, logits, the policy made whole."""
    shape, row = rollout.policy.shape, rollout.row_tokens
    rows = rollout.rows_together(world)
    cache = cache_bytes(shape, rows * row, row, engine.element_bytes)
    logits = rows * shape.vocab_size * (4 + engine.element_bytes)
    prompts = Micro(rows * rollout.max_prompt, engine.element_bytes, False)
    found = {"rollout: keys and values": cache}
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
