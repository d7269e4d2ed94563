"""Bytes of activations, vocabulary tiles and keys and values on a GPU.

Counted from what autograd keeps for the backward pass of a LLaMA layer in transformers, operation
by operation (the method of Korthikanti et al., arXiv:2205.05198, section 4, for other layers);
``benchmarks/planning.py`` compares the counts with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plan.flops import ModelShape

CHUNK_BYTES = 128 * 2**20  # logits that the head holds at one time, in the weights' format
KEPT_BYTES = 64 * 2**20  # logits that preference stages keep for the backward pass, fp32
CACHE_ROOM = 128  # tokens by which a row's keys and values are longer than what is in them


@dataclass(frozen=True)
class Micro:
    """What a rank computes at once.

    Attributes:
        num_tokens: rows times their length.
        element_bytes: of an activation.
        checkpointing: whether layers are computed again in the backward pass.
        has_kernel: whether attention is one kernel over documents of uneven lengths (compute
            capability 8 and half precision); else documents are gathered by length.
    """

    num_tokens: int
    element_bytes: int
    checkpointing: bool
    has_kernel: bool = True


def layer_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what the backward pass of one layer needs of its forward pass."""
    size, hidden = micro.element_bytes, shape.hidden_size
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    # A norm keeps its input in fp32, the normalised input and, for the matrices, its output.
    norms = 2 * (4 * hidden + 2 * size * hidden + 4)
    # Rotated queries and keys, values, the output, and a logarithm a head; the output once more
    # where documents are put back in their places.
    outputs = 1 if micro.has_kernel else 2
    keys = key if micro.has_kernel else query
    attention = size * ((1 + outputs) * query + 2 * keys) + 4 * shape.num_attention_heads
    return micro.num_tokens * (norms + attention + size * _mlp_width(shape))


def _mlp_width(shape: ModelShape) -> float:
    """Return the features that an average layer's MLP keeps of a token."""
    # With a gate: gate, its activation, up and their product; else a matrix' output and activation.
    kept = 4 if shape.num_mlp_matrices == 3 else 2
    layers = shape.num_hidden_layers
    expert = shape.num_experts_per_tok * (shape.expert_size + shape.hidden_size)
    expert += shape.shared_expert_size
    dense = shape.dense_layers * shape.intermediate_size
    return kept * (dense + (layers - shape.dense_layers) * expert) / layers


def working_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what exists while one layer computes backwards: gradients of its widest parts."""
    width = _mlp_width(shape) / (4 if shape.num_mlp_matrices == 3 else 2)
    return micro.num_tokens * micro.element_bytes * (3 * width + 2 * shape.hidden_size)


def activation_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return the largest size of one model's activations in a forward and backward pass.

    With checkpointing each layer keeps its input, and one layer at a time all it needs.
    """
    layers, layer = shape.num_hidden_layers, layer_bytes(shape, micro)
    inputs = micro.num_tokens * micro.element_bytes * shape.hidden_size
    last_norm = micro.num_tokens * (4 + 2 * micro.element_bytes) * shape.hidden_size
    kept = layers * inputs + layer if micro.checkpointing else layers * layer
    return kept + last_norm + working_bytes(shape, micro)


def forward_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what a forward pass without gradients holds at once: one layer's widest part."""
    width = _mlp_width(shape) / (4 if shape.num_mlp_matrices == 3 else 2)
    return micro.num_tokens * micro.element_bytes * (3 * width + 3 * shape.hidden_size)


def loss_bytes(shape: ModelShape, micro: Micro, *, head_trained: bool) -> float:
    """Return what the fused head and loss hold: gradients in fp32, one tile of logits."""
    size, hidden = micro.element_bytes, micro.num_tokens * shape.hidden_size
    rows = shape.vocab_size * shape.hidden_size * head_trained
    gradients = 4 * (hidden + rows)
    return gradients + max(tile_bytes(shape, micro), size * (hidden + rows))


def tile_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return the largest size of the logits of a tile, in fp32, and their probabilities."""
    tokens = min(micro.num_tokens, CHUNK_BYTES // (shape.vocab_size * micro.element_bytes))
    element = 4 if micro.element_bytes == 4 else 4 + micro.element_bytes
    return float(max(1, tokens) * shape.vocab_size * element)


def logps_bytes(shape: ModelShape, micro: Micro, *, head_trained: bool) -> float:
    """Return what log-probabilities with gradients hold: as a loss does, and the logits kept."""
    tokens = min(micro.num_tokens, CHUNK_BYTES // (shape.vocab_size * micro.element_bytes))
    kept = 4.0 * max(1, tokens) * shape.vocab_size
    kept = kept * (KEPT_BYTES // kept)
    chosen = micro.num_tokens * shape.hidden_size * micro.element_bytes
    return loss_bytes(shape, micro, head_trained=head_trained) + kept + chosen


def cache_bytes(
    shape: ModelShape, cached_tokens: int, row_tokens: int, element_bytes: int
) -> float:
    """Return keys and values of responses in writing.

    Args:
        shape: of the policy.
        cached_tokens: ``stage.sampling.cached_tokens``.
        row_tokens: longest prompt and response together.
        element_bytes: of a number.
    """
    rows = max(1, cached_tokens // row_tokens)
    token = 2 * shape.num_key_value_heads * shape.head_dim * element_bytes
    whole = rows * (row_tokens + CACHE_ROOM) * token
    # While one layer's buffer grows the old one is still there.
    return float(whole * (shape.num_hidden_layers + 1))
