"""Attention of rows that hold several documents, each of which sees itself alone.

Transformers' own way is a mask of length x length for every row, of which most is zeros. Here the
documents' lengths reach the attention in the place of the mask. It cuts the rows into documents and
attends to each: with the kernel for uneven lengths where the device has one (compute capability 8,
half precision), else through ordinary causal attention over groups of documents of about the same
length. No mask of a row is ever made.

The function is registered under ``DOCUMENTS`` in transformers' table of attention functions, and
models are switched to that implementation. Without known documents (generation) it is
transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, and_masks, sdpa_mask

from trainer.models.documents import DocumentMask, Documents
from trainer.models.families import find_family

DOCUMENTS = "documents"  # the implementation's name in transformers' tables
KERNEL_HEAD_DIM = 256  # largest of the kernel for uneven lengths

_DOCUMENTS: ContextVar[Documents | None] = ContextVar("documents of the batch", default=None)


@contextmanager
def isolated_documents(model: PreTrainedModel, position_ids: Tensor) -> Iterator[Tensor | None]:
    """Keep the documents of a batch apart in the forward inside, as the model's family needs.

    Args:
        model: a causal language model, or one wrapped by peft.
        position_ids: ``[batch, seq]``, starting at 0 with each document.

    Yields:
        The attention mask to call the model with: ``[batch, 1, seq, seq]`` for a family that finds
        no documents by itself, else None.
    """
    config = model.config
    family = find_family(config.to_dict())
    if family is not None and family.isolation == "mask":
        documents = Documents.find(position_ids)
        yield documents.mask(model.dtype) if documents.packed else None
        return
    uses_documents = config._attn_implementation == DOCUMENTS
    token = _DOCUMENTS.set(Documents.find(position_ids) if uses_documents else None)
    try:
        yield None
    finally:
        _DOCUMENTS.reset(token)


def use_document_attention(model: PreTrainedModel) -> None:
    """Switch a model to the implementation ``DOCUMENTS`` if its family can use it.

    Args:
        model: a causal language model, or one wrapped by peft; changed in place.
    """
    family = find_family(model.config.to_dict())
    if family is not None and family.isolation == "kernel":
        AttentionInterface.register(DOCUMENTS, attend_to_documents)
        AttentionMaskInterface.register(DOCUMENTS, _document_mask)
        model.set_attn_implementation(DOCUMENTS)


def _document_mask(
    *,
    mask_function: Callable[..., Tensor],
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> DocumentMask | Tensor | None:
    """Stand for transformers' mask of a batch whose documents are known."""
    documents = _DOCUMENTS.get()
    inputs = kwargs | {"local_size": local_size, "use_vmap": use_vmap}
    if documents is None:
        return sdpa_mask(mask_function=mask_function, **inputs)
    if use_vmap:  # the family changes what is seen: only a mask can say how
        alone = and_masks(mask_function, lambda row, _, q, k: documents.same(row, q, k))
        return sdpa_mask(mask_function=alone, **inputs | {"allow_is_causal_skip": False})
    longest = max(documents.lengths)
    return DocumentMask(documents, local_size if local_size and local_size < longest else None)


def attend_to_documents(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: DocumentMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each document (an attention function of transformers).

    Args:
        module: the attention layer.
        query: ``[batch, heads, seq, d]``.
        key: ``[batch, kv_heads, seq, d]``; kv_heads divides heads.
        value: ``[batch, kv_heads, seq, d_v]``.
        attention_mask: the documents, else as for sdpa.
        dropout: of attention weights.
        scaling: of the scores; None is 1/sqrt(d).
        kwargs: further arguments of transformers' attention functions.

    Returns:
        ``[batch, seq, heads, d_v]``, and None for the weights, which are never whole.

    Raises:
        ValueError: on soft caps and sinks, which this attention does not compute.
    """
    unknown = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} wants {unknown[0]}, which attention implementation "
            f"{DOCUMENTS!r} does not compute; build the model with another one"
        )
    if not isinstance(attention_mask, DocumentMask):
        states = (query, key, value)
        if query.shape[2] == 1 and query.device.type == "cpu":
            # For a single token's query torch's kernel for half precision repacks all keys: fp32 is
            # 4 times as fast, the conversion of keys and values included.
            states = (query.float(), key.float(), value.float())
        out, _ = sdpa_attention_forward(module, *states, attention_mask, dropout, scaling, **kwargs)
        return out.to(query.dtype), None
    if _has_kernel(query, value, dropout):
        return _attend_with_kernel(query, key, value, attention_mask, scaling), None
    options = {"dropout_p": dropout, "scale": scaling}
    return _attend_by_groups(query, key, value, attention_mask, options), None


def _has_kernel(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Return whether the device's kernel for uneven lengths computes this attention."""
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= KERNEL_HEAD_DIM
        and query.shape[-1] % 8 == 0
        and not dropout
    )


def _attend_with_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, scaling: float | None
) -> Tensor:
    """Attend in one call for all documents; shapes as in ``attend_to_documents``."""
    documents = mask.documents
    longest = max(documents.lengths)
    out = varlen_attn(
        *(states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)),
        documents.bounds,
        documents.bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if mask.window is None else mask.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unflatten(0, (len(query), -1))


def _attend_by_groups(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, options: dict[str, Any]
) -> Tensor:
    """Attend in one call for documents of about one length; shapes as above."""
    documents = mask.documents
    if not documents.packed:
        return _attend(query, key, value, mask.window, options).transpose(1, 2).contiguous()
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    outputs = []
    for index in documents.groups:
        q, k, v = (
            x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
            for x in flat
        )
        out = _attend(q, k, v, mask.window, options)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outputs).index_select(0, documents.places)
    return out.unflatten(0, (len(query), -1))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, options: dict[str, Any]
) -> Tensor:
    """Attend causally, to the last ``window`` tokens; all ``[documents, heads, seq, d]``."""
    repeats = query.shape[1] // key.shape[1]
    if query.is_cuda and repeats > 1:
        # The kernels of older GPUs and of fp32 want as many key heads as query heads.
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        repeats = 1
    options = options | {"enable_gqa": repeats > 1}
    seq = query.shape[2]
    if window is None or seq <= window:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    blocks = []
    # Blocks of ``window`` queries see at most twice as many keys, so the masks stay small.
    for start in range(0, seq, window):
        end, first = min(start + window, seq), max(0, start - window + 1)
        at_query = torch.arange(start, end, device=query.device)[:, None]
        at_key = torch.arange(first, end, device=query.device)
        seen = (at_key <= at_query) & (at_key > at_query - window)
        block = query[:, :, start:end], key[:, :, first:end], value[:, :, first:end]
        blocks.append(scaled_dot_product_attention(*block, attn_mask=seen, **options))
    return torch.cat(blocks, dim=2)
