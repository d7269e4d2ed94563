"""From a run's configuration to what planning counts, read without torch."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from launch.plan_models import make_model
from trainer.config import ModelConfig, PeftConfig, RunConfig
from trainer.config.cluster import host_gb_per_gpu, job_gpu, partition_limits, time_limit_s
from trainer.models.architecture import read_architecture
from trainer.plan.flops import device_peak
from trainer.plan.memory import EnginePlan, Model
from trainer.plan.speed import Pass
from trainer.plan.work import Machine, Price, Rollout, Work

Precision = Literal["fp32", "bf16", "fp16"]
WITHOUT_REFERENCE = ("orpo", "simpo")  # losses that compare with no reference


def read_engine(config: RunConfig) -> tuple[EnginePlan, list[str]]:
    """Return how the models are held, and what had to be assumed."""
    engine = config.engine
    precision, remarks = _precision(config)
    plan = EnginePlan(
        zero_stage=engine.zero_stage,
        precision=precision,
        offload_optimizer=engine.offload_optimizer,
        offload_params=engine.offload_params,
        activation_checkpointing=engine.activation_checkpointing,
    )
    return plan, remarks


def _precision(config: RunConfig) -> tuple[Precision, list[str]]:
    """Return what ``auto`` will choose on the machine's GPUs."""
    asked, site = config.engine.precision, config.cluster.site
    if asked != "auto":
        return asked, []
    name = job_gpu(config.cluster)[0]
    peak = device_peak(name) if name else None
    if peak is not None:
        return ("fp16", []) if peak.bf16 is None else ("bf16", [])
    if site.precisions:
        return ("bf16", []) if "bf16" in site.precisions else ("fp16", [])
    return "fp32", ["engine.precision=auto on an unknown device: planned as fp32, the largest"]


def read_machine(config: RunConfig) -> Machine:
    """Return the facts of the profile that planning needs."""
    cluster, site = config.cluster, config.cluster.site
    gpu, memory = job_gpu(cluster)
    seconds, limits = time_limit_s(cluster), partition_limits(cluster)
    return Machine(
        name=site.name,
        nodes=cluster.nodes,
        gpus_per_node=cluster.gpus_per_node,
        gpu=gpu,
        gpu_memory_gb=memory,
        memory_gb_per_gpu=host_gb_per_gpu(site),
        cpus_per_gpu=site.cpus_per_gpu,
        whole_node_gpus=site.gpus_per_node,
        intra_gb_per_s=site.intra_node_gb_per_s,
        inter_gb_per_s=site.inter_node_gb_per_s,
        quota_gb=site.quota_gb,
        limit_hours=None if seconds is None else seconds / 3600,
        min_gpus=limits.min_gpus,
        max_gpus=limits.max_gpus,
        max_lives=cluster.max_lives if site.scheduler == "slurm" else None,
        prices=tuple(
            Price(p.who, p.currency, p.per_gpu_hour, p.source, p.date) for p in site.prices
        ),
    )


def read_work(config: RunConfig) -> Work | None:
    """Return what a run does; None for a stage without GPUs.

    Raises:
        ConfigError: the model's sizes cannot be read.
    """
    makers = {"reward": _reward_work, "dpo": _preference_work, "ppo": _ppo_work}
    stage = str(config.stage["name"])
    if stage == "vocab":
        return None
    return makers.get(stage, _language_work)(config)


def _work(config: RunConfig, models: list[Model], passes: list[Pass], **more: Any) -> Work:
    loop = config.loop
    given = {
        "stage": str(config.stage["name"]),
        "models": tuple(models),
        "passes": tuple(passes),
        "row_length": config.data.max_length,
        "micro_batch_size": loop.micro_batch_size,
        "is_packed": config.data.packing,
        "num_steps": loop.max_steps or None,
        "tokens_per_step": loop.global_batch_tokens,
        "keep_last": loop.keep_last,
        "keep_every": loop.keep_every,
        "keep_gb": loop.keep_gb,
    }
    return Work(**{**given, **more})


def _language_work(config: RunConfig) -> Work:
    policy = make_model(config, "policy")
    tokens, length = config.loop.global_batch_tokens, config.data.max_length
    return _work(config, [policy], [Pass(policy, tokens, length, trains=True)])


def _reward_work(config: RunConfig) -> Work:
    model = make_model(config, "reward model", scalar=True)
    tokens, length = config.loop.global_batch_tokens, config.data.max_length
    return _work(config, [model], [Pass(model, tokens, length, trains=True)])


def adapters_suffice(peft: PeftConfig) -> bool:
    """Return whether the start model can be had from the trained one by switching adapters."""
    return peft.mode in ("lora", "qlora") and not peft.train_embeddings


def _preference_work(config: RunConfig) -> Work:
    """DPO and its relatives: the policy, and its reference by one of three ways."""
    tokens, length = config.loop.global_batch_tokens, config.data.max_length
    asked = config.stage.get("reference", "auto")
    if asked == "auto":
        asked = "adapter_off" if adapters_suffice(config.peft) else "cached"
    if config.stage.get("objective", {}).get("name") in WITHOUT_REFERENCE:
        asked = "none"
    policy = make_model(config, "policy", frozen_adapters=_frozen_adapters(config, asked))
    models, passes = [policy], [Pass(policy, tokens, length, trains=True)]
    once: tuple[Pass, ...] = ()
    if asked == "streaming" and not adapters_suffice(config.peft):
        models.append(_frozen_copy(config))
    if asked in ("streaming", "adapter_off"):
        passes.append(Pass(models[-1], tokens, length))
    if asked == "cached" and config.loop.max_steps:
        epochs = config.loop.epochs or 1.0
        once = (Pass(policy, tokens * config.loop.max_steps / epochs, length),)
    return _work(config, models, passes, once=once, wants_logps=True)


def _frozen_adapters(config: RunConfig, reference: str) -> int:
    """Return copies of a continued adapter that stay as they were, for the reference."""
    computed = reference in ("streaming", "adapter_off")
    return int(bool(config.peft.adapter) and computed and adapters_suffice(config.peft))


def _frozen_copy(config: RunConfig) -> Model:
    """Return the start model, held beside the policy."""
    model = make_model(config, "reference")
    return dataclasses.replace(model, tuning=None)


def _ppo_work(config: RunConfig) -> Work:
    stage, loop = config.stage, config.loop
    prompt, new = config.data.max_length, int(stage["sampling"]["max_new_tokens"])
    row = prompt + new
    num_samples = int(stage["rollouts_per_step"]) * int(stage["responses_per_prompt"])
    tokens = num_samples * row
    shared = stage["models"] == "shared"
    with_critic = stage["advantage"] == "gae"
    policy = make_model(
        config,
        "policy",
        num_adapters=1 + (shared and with_critic),
        frozen_adapters=int(bool(config.peft.adapter) and adapters_suffice(config.peft)),
    )
    models, update = [policy], int(stage["update"]["epochs"]) * tokens
    passes = [Pass(policy, update, row, trains=True), Pass(policy, tokens, row)]
    passes.append(Pass(policy, num_samples * prompt, prompt))  # reading prompts to answer them
    reference = policy if adapters_suffice(config.peft) else _frozen_copy(config)
    passes.append(Pass(reference, tokens, row))
    if reference is not policy:
        models.append(reference)
    if with_critic:
        critic = _critic(config)
        passes += [Pass(critic, update, row, trains=True), Pass(critic, tokens, row)]
        models += [] if shared else [critic]
    for judge in _judges(config):
        models.append(judge)
        passes.append(Pass(judge, tokens, row))
    num_updates = int(stage["update"]["epochs"]) * int(stage["update"]["num_minibatches"])
    sampling = int(stage["sampling"]["cached_tokens"])
    return _work(
        config,
        models,
        passes,
        row_length=row,
        tokens_per_step=tokens,
        optimizer_steps=num_updates,
        num_steps=loop.max_steps or None,
        wants_logps=True,
        rollout=Rollout(policy, num_samples, prompt, new, sampling),
    )


def _critic(config: RunConfig) -> Model:
    """Return the critic: the folder it starts from, else a copy of the policy."""
    folder = config.stage["critic"]
    if folder is None:
        return make_model(config, "critic", scalar=True)
    start = dataclasses.replace(
        config,
        model=ModelConfig(name="critic", path=folder),
        peft=dataclasses.replace(config.peft, adapter=None),
    )
    return make_model(start, "critic", scalar=True)


def _judges(config: RunConfig) -> list[Model]:
    """Return the frozen reward models."""
    judges = []
    for name, settings in config.stage["rewards"].items():
        if settings.get("kind") != "model":
            continue
        folder = ModelConfig(name=name, path=settings["path"])
        quantization = config.peft.quantization if config.peft.mode == "qlora" else None
        judges.append(
            Model(
                f"reward: {name}",
                read_architecture(folder),
                scalar=True,
                quantization=quantization,
            )
        )
    return judges


def divides(config: RunConfig, micro_batch_size: int, world_size: int) -> bool:
    """Return whether the global batch divides over so many ranks and rows."""
    if config.data.content == "prompts":
        return True
    unit = micro_batch_size * config.data.max_length * world_size
    return config.loop.global_batch_tokens % unit == 0
