"""The parameters of a decoder by name and shape, and which of them a run trains."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.errors import ConfigError
from trainer.plan.architectures import find_architecture
from trainer.plan.flops import ModelShape

Kind = Literal["embedding", "matrix", "head", "small", "adapter"]
# Names of LLaMA's linear layers; those of other families stand for theirs.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
VOCABULARY = ("embedding", "head")


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model.

    Attributes:
        name: as LLaMA calls it.
        shape: its sizes.
        kind: vocabulary matrices, other matrices, vectors, or low-rank matrices.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Tuning:
    """Which parameters are trained; names as in the peft group.

    Attributes:
        targets: last names of the linear layers that LoRA adapts; None = all of the layers.
    """

    mode: Literal["full", "freeze", "lora", "qlora"] = "full"
    trainable: str | None = None
    trainable_layers: int = 0
    rank: int = 16
    dora: bool = False
    targets: Sequence[str] | None = None
    train_embeddings: bool = False
    quantization: Literal["nf4", "int8"] = "nf4"

    @property
    def adapts(self) -> bool:
        """Whether low-rank adapters are trained."""
        return self.mode in ("lora", "qlora")


def list_parameters(config: Mapping[str, Any], *, scalar: bool = False) -> list[Parameter]:
    """Return every parameter of a decoder.

    Sizes are exact for LLaMA-like families; what others have beside LLaMA's matrices and norms is
    one entry with the right count.

    Args:
        config: a transformers configuration as a mapping.
        scalar: whether the head is one output (a reward model, a critic), not the vocabulary.

    Raises:
        ConfigError: when a size is missing.
    """
    shape = ModelShape.from_config(config)
    found = [
        Parameter("model.embed_tokens.weight", (shape.vocab_size, shape.hidden_size), "embedding")
    ]
    for number in range(shape.num_hidden_layers):
        found += _layer(config, shape, number)
    found.append(Parameter("model.norm.weight", (shape.hidden_size,), "small"))
    head = () if shape.tie_word_embeddings else _head(shape)
    missing = shape.num_params - sum(p.numel for p in (*found, *_head(shape)[: len(head)]))
    if missing > 0:
        found.append(Parameter("others", (missing,), "small"))
    if scalar:
        return [*found, Parameter("score.weight", (1, shape.hidden_size), "small")]
    return [*found, *head]


def _head(shape: ModelShape) -> list[Parameter]:
    return [Parameter("lm_head.weight", (shape.vocab_size, shape.hidden_size), "head")]


def _layer(config: Mapping[str, Any], shape: ModelShape, number: int) -> Iterator[Parameter]:
    prefix = f"model.layers.{number}."
    for name, sizes in (*_attention(shape), *_mlp(shape, number)):
        yield Parameter(f"{prefix}{name}.weight", sizes, "matrix")
    kind = find_architecture(config)
    if kind.norm_vectors:
        names = (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward",
            "post_feedforward",
        )
        for name in names[: kind.norms]:
            yield Parameter(f"{prefix}{name}.weight", (shape.hidden_size,), "small")


def _attention(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    hidden, head_dim = shape.hidden_size, shape.head_dim
    if shape.latent_attention:
        return [("self_attn.projections", (shape.attention_params,))]
    query, key = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    sizes = ((query, hidden), (key, hidden), (key, hidden), (hidden, query))
    return [(f"self_attn.{name}", size) for name, size in zip(ATTENTION, sizes, strict=True)]


def _mlp(shape: ModelShape, number: int) -> list[tuple[str, tuple[int, ...]]]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    # Which layers are the plain ones does not change any sum: the first ones here.
    if number < shape.dense_layers:
        names = GATED[3 - shape.num_mlp_matrices :]
        sizes = [(width, hidden)] * (len(names) - 1) + [(hidden, width)]
        return [(f"mlp.{name}", size) for name, size in zip(names, sizes, strict=True)]
    count = shape.num_mlp_matrices * hidden
    experts = [("mlp.experts", (shape.num_experts, count * shape.expert_size))]
    if shape.shared_expert_size:
        experts.append(("mlp.shared_expert", (count, shape.shared_expert_size)))
    return [*experts, ("mlp.gate", (shape.num_experts + shape.shared_gate, hidden))]


def adapted_names(tuning: Tuning, parameters: Sequence[Parameter]) -> set[str]:
    """Return the weights that LoRA adapts: matrices of two dimensions among the targets."""
    linear = [p for p in parameters if p.kind == "matrix" and len(p.shape) == 2]
    linear = [p for p in linear if ".experts" not in p.name and "mlp.gate." not in p.name]
    if tuning.targets is None:
        return {p.name for p in linear}
    return {p.name for p in linear if p.name.split(".")[-2] in tuning.targets}


def adapter_parameters(tuning: Tuning, parameters: Sequence[Parameter]) -> list[Parameter]:
    """Return LoRA's matrices A [rank, in] and B [out, rank], and DoRA's lengths [out]."""
    names, found = adapted_names(tuning, parameters), []
    for parameter in parameters:
        if parameter.name not in names:
            continue
        (rows, columns), stem = parameter.shape, parameter.name.removesuffix("weight")
        found.append(Parameter(f"{stem}lora_A.weight", (tuning.rank, columns), "adapter"))
        found.append(Parameter(f"{stem}lora_B.weight", (rows, tuning.rank), "adapter"))
        if tuning.dora:
            found.append(Parameter(f"{stem}lora_magnitude_vector", (rows,), "adapter"))
    return found


def trained_names(
    tuning: Tuning, parameters: Sequence[Parameter], num_layers: int, *, scalar: bool = False
) -> set[str]:
    """Return the names of a model's own parameters that are trained.

    Raises:
        ConfigError: a regex that cannot be read, or that matches nothing.
    """
    if tuning.mode == "full":
        return {p.name for p in parameters}
    chosen = {"score.weight"} if scalar else set()
    if tuning.mode == "freeze":
        return chosen | _unfrozen(tuning, parameters, num_layers)
    if tuning.train_embeddings:
        chosen |= {p.name for p in parameters if p.kind in VOCABULARY}
    return chosen & {p.name for p in parameters}


def _unfrozen(tuning: Tuning, parameters: Sequence[Parameter], num_layers: int) -> set[str]:
    try:
        regex = re.compile(tuning.trainable) if tuning.trainable else None
    except re.error as error:
        raise ConfigError(
            f"peft.trainable={tuning.trainable!r} is no valid regex: {error}"
        ) from error
    first = num_layers - tuning.trainable_layers
    last = tuple(f"model.layers.{number}." for number in range(max(0, first), num_layers))
    names = {
        p.name for p in parameters if (regex and regex.search(p.name)) or p.name.startswith(last)
    }
    if not names:
        raise ConfigError(
            f"peft.trainable={tuning.trainable!r} matches no parameter; names look like "
            f"{parameters[0].name}, {parameters[1].name}"
        )
    return names
