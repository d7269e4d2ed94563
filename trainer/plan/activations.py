"""Bytes of activations, vocabulary tiles and keys and values on a GPU.

Counted from what autograd keeps for the backward pass of a LLaMA layer in transformers, operation
by operation (the method of Korthikanti et al., arXiv:2205.05198, section 4, for other layers);
``benchmarks/planning.py`` compares the counts with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.plan.flops import ModelShape

CHUNK_BYTES = 128 * 2**20  # logits that the head holds at one time, in the weights' format
CPU_TILE_BYTES = 16 * 2**20  # of them in fp32 at one time, on a CPU
KEPT_BYTES = 64 * 2**20  # logits that preference stages keep for the backward pass, fp32
CACHE_ROOM = 128  # tokens by which a row's keys and values are longer than what is in them


@dataclass(frozen=True)
class Micro:
    """What a rank computes at once.

    Attributes:
        num_tokens: rows times their length.
        element_bytes: of an activation.
        checkpointing: whether layers are computed again in the backward pass.
        on_gpu: whether the device is a GPU.
        has_kernel: whether it has the attention kernel for documents of uneven lengths (compute
            capability 8, half precision).
        is_packed: whether a row holds several documents.
    """

    num_tokens: int
    element_bytes: int
    checkpointing: bool = False
    on_gpu: bool = False
    has_kernel: bool = False
    is_packed: bool = False


def layer_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what the backward pass of one layer needs of its forward pass."""
    size, hidden = micro.element_bytes, shape.hidden_size
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    if micro.on_gpu and not micro.has_kernel:
        key = query  # repeated for all query heads
    # A norm keeps its input in fp32, the normalised input and, for the matrices, its output.
    norms = 2 * (4 * hidden + 2 * size * hidden + 4)
    # Rotated queries and keys, values, the output, and a logarithm a head; the output once more
    # where documents are gathered by length and put back in their places.
    outputs = 1 + (micro.is_packed and not micro.has_kernel)
    attention = size * ((1 + outputs) * query + 2 * key) + 4 * shape.num_attention_heads
    return micro.num_tokens * (norms + attention + size * _mlp_width(shape))


def _mlp_width(shape: ModelShape) -> float:
    """Return the features that an average layer's MLP keeps of a token."""
    layers = shape.num_hidden_layers
    expert = shape.num_experts_per_tok * (shape.expert_size + shape.hidden_size)
    expert += shape.shared_expert_size
    dense = shape.dense_layers * shape.intermediate_size
    return _kept_matrices(shape) * (dense + (layers - shape.dense_layers) * expert) / layers


def _kept_matrices(shape: ModelShape) -> int:
    """Return how often an MLP keeps its width: gate, its activation, up, product; or but two."""
    return 4 if shape.num_mlp_matrices == 3 else 2


def kept_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what all layers keep for the backward pass; with checkpointing only their inputs."""
    if not micro.checkpointing:
        return shape.num_hidden_layers * layer_bytes(shape, micro)
    return float(shape.num_hidden_layers * _input_bytes(shape, micro))


def _input_bytes(shape: ModelShape, micro: Micro) -> int:
    return micro.num_tokens * micro.element_bytes * shape.hidden_size


def backward_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what exists beside what is kept while one layer is computed backwards.

    Two gradients as wide as its MLP and one as wide as the layer; with checkpointing also what the
    layer needs, computed again.
    """
    width = _mlp_width(shape) / _kept_matrices(shape)
    working = micro.num_tokens * micro.element_bytes * (2 * width + shape.hidden_size)
    if not micro.checkpointing:
        return working
    # In fp32 the first norm's input is the layer's.
    shared = _input_bytes(shape, micro) if micro.element_bytes == 4 else 0
    return working + layer_bytes(shape, micro) - shared


def last_norm_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what the norm before the head keeps."""
    return float(micro.num_tokens * (4 + 2 * micro.element_bytes) * shape.hidden_size)


def forward_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what a forward pass without gradients holds at once: one layer's widest part."""
    width = _mlp_width(shape) / _kept_matrices(shape)
    return micro.num_tokens * micro.element_bytes * (3 * width + 3 * shape.hidden_size)


def loss_bytes(shape: ModelShape, micro: Micro, *, head_trained: bool) -> float:
    """Return what the fused head and loss hold: gradients in fp32, one tile of logits."""
    size, hidden = micro.element_bytes, micro.num_tokens * shape.hidden_size
    rows = shape.vocab_size * shape.hidden_size * head_trained
    gradients = 4 * (hidden + rows)
    return gradients + max(tile_bytes(shape, micro), size * (hidden + rows))


def tile_bytes(shape: ModelShape, micro: Micro) -> float:
    """Return what the logits of a chunk of tokens take, and their probabilities."""
    logits = _chunk_tokens(shape, micro) * shape.vocab_size
    if micro.element_bytes == 4:
        return 4.0 * logits
    if micro.on_gpu:  # the products in fp32, the probabilities in the weights' format
        return float((4 + micro.element_bytes) * logits)
    # A CPU multiplies in the weights' format and widens tiles: one while the next is made.
    return float(micro.element_bytes * logits + min(2 * CPU_TILE_BYTES, 4 * logits))


def _chunk_tokens(shape: ModelShape, micro: Micro) -> int:
    most = CHUNK_BYTES // (shape.vocab_size * micro.element_bytes)
    return max(1, min(micro.num_tokens, most))


def logps_bytes(shape: ModelShape, micro: Micro, *, head_trained: bool) -> float:
    """Return what log-probabilities with gradients hold: as a loss does, and the logits kept."""
    kept = 4.0 * _chunk_tokens(shape, micro) * shape.vocab_size
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
