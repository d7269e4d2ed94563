"""Products with the vocabulary matrix, a chunk of tokens at a time, in any precision.

What the losses over it share: a chunk's logits take at most ``CHUNK_BYTES``, whatever the sequence
length and the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 128 * 2**20  # logits that exist at one time
CPU_TILE_BYTES = 16 * 2**20  # fp32 softmax rows of one pass: few barriers, yet near the cache
# Tokens of a chunk are a multiple of this where a CPU multiplies in low precision: it compiles and
# keeps code for every new number of rows, megabytes each.
CPU_CHUNK_UNIT = 64
VOCAB_BLOCK = 4096  # rows of the weight whose gradient is added up at one time


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics over values of ``dtype``: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def storage_scale(dtype: torch.dtype) -> float:
    """Return the factor that probabilities carry while they are stored in ``dtype``.

    Most are near 1 / vocab, where fp16 is subnormal already (below 6e-5). Times 2**15 the largest
    still does not overflow, and the smallest that is kept is 2e-12.
    """
    return 2.0**15 if dtype == torch.float16 else 1.0


def cut_chunks(positions: Tensor, weight: Tensor) -> Iterator[Tensor]:
    """Yield positions ``[n]`` in parts of at most ``CHUNK_BYTES`` of logits, evenly."""
    max_tokens = max(1, CHUNK_BYTES // max(1, len(weight) * weight.itemsize))
    num_chunks = -(-len(positions) // max_tokens)
    yield from positions.tensor_split(num_chunks) if num_chunks else ()


def fill_chunk(index: Tensor, hidden: Tensor) -> Tensor:
    """Return a chunk's positions, its first repeated up to a multiple of ``CPU_CHUNK_UNIT``."""
    if hidden.device.type != "cpu" or hidden.dtype not in (torch.bfloat16, torch.float16):
        return index
    num_missing = -len(index) % CPU_CHUNK_UNIT
    return torch.cat([index, index[:1].expand(num_missing)])


def cut_tiles(logits: Tensor) -> Iterator[slice]:
    """Yield ranges of the rows of ``logits [t, v]``; on a CPU such that passes stay in cache."""
    num_rows = max(1, len(logits))
    if logits.device.type == "cpu":
        itemsize = wide_dtype(logits.dtype).itemsize
        num_rows = max(1, CPU_TILE_BYTES // (logits.shape[1] * itemsize))
    for start in range(0, len(logits), num_rows):
        yield slice(start, min(start + num_rows, len(logits)))


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """Multiply, with an fp32 result where the device can give one to low-precision factors."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:  # its range would not hold the sums
        return left.float() @ right.float()
    return left @ right


def mix_rows(probs: Tensor, weight: Tensor) -> Tensor:
    """Return ``probs [t, v] @ weight [v, d]`` in fp32 (fp64), summed over blocks of v.

    A product that the device rounds to bf16 loses less in blocks than as a whole.
    """
    total = torch.zeros_like(probs[:, :1], dtype=wide_dtype(probs.dtype)).repeat(1, weight.shape[1])
    blocks = zip(probs.split(VOCAB_BLOCK, dim=1), weight.split(VOCAB_BLOCK), strict=True)
    for block_probs, rows in blocks:
        total += multiply(block_probs, rows)
    return total


def add_mixed_rows(weight_grad: Tensor, probs: Tensor, hidden: Tensor) -> None:
    """Add ``probs [t, v].T @ hidden [t, d]`` to the first v rows of ``weight_grad``."""
    real = weight_grad[: probs.shape[1]]
    if real.dtype == hidden.dtype:
        real.addmm_(probs.T, hidden)
        return
    blocks = zip(real.split(VOCAB_BLOCK), probs.split(VOCAB_BLOCK, dim=1), strict=True)
    for rows, block_probs in blocks:
        rows += multiply(block_probs.T, hidden)


def scale_gradient(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return ``grad * factor`` in ``dtype``, block by block so that no second wide copy exists."""
    if grad is None:
        return None
    result = torch.empty_like(grad, dtype=dtype)
    for source, target in zip(grad.split(VOCAB_BLOCK), result.split(VOCAB_BLOCK), strict=True):
        target.copy_(source * factor)
    return result
