"""Attention to packed documents against each document alone, through plain softmax."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from family_models import TINY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.masking_utils import create_causal_mask

from trainer.models import attention
from trainer.models.attention import (
    DOCUMENTS,
    attend_to_documents,
    isolated_documents,
    use_document_attention,
)
from trainer.models.documents import DocumentMask, Documents
from trainer.models.language_model import LanguageModel


def positions(*rows: tuple[int, ...]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def make_states(
    position_ids: Tensor, heads: int, kv_heads: int, dtype: torch.dtype, d: int = 8, d_v: int = 8
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, seq = position_ids.shape
    shapes = ((heads, d), (kv_heads, d), (kv_heads, d_v))
    return [
        torch.randn(rows, seq, *shape, generator=generator, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def attend_alone(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, window: int | None = None
) -> Tensor:
    """Attend to every document by itself with a written-out softmax; [batch, seq, heads, d]."""
    repeats = query.shape[1] // key.shape[1]
    rows = []
    for row, begins in enumerate(position_ids == 0):
        bounds = [*begins.nonzero().flatten().tolist(), query.shape[2]]
        pieces = []
        for start, end in pairwise(bounds):
            q = query[row, :, start:end]
            k, v = (x[row, :, start:end].repeat_interleave(repeats, 0) for x in (key, value))
            at = torch.arange(end - start)
            seen = at <= at[:, None]
            if window is not None:
                seen &= at > at[:, None] - window
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
            pieces.append(scores.softmax(-1) @ v)
        rows.append(torch.cat(pieces, dim=1))
    return torch.stack(rows).transpose(1, 2)


def attend(states: list[Tensor], position_ids: Tensor, window: int | None = None, **kw: Any) -> Any:
    mask = DocumentMask(Documents.find(position_ids), window)
    return attend_to_documents(nn.Identity(), *states, mask, **kw)[0]


ROWS = {
    "packed": positions((5, 1, 9, 2), (3, 4, 8, 2)),
    "even": positions((4, 4, 4), (4, 4, 4)),
    "single": positions((13,), (13,)),
    "right-padded": positions((7, 6), (13,)),
    "one-token": positions((1,), (1,)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("window", [None, 3, 8])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rows", ROWS)
def test_output_and_gradients_equal_each_document_alone(
    rows: str, kv_heads: int, window: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    position_ids = ROWS[rows]
    states = make_states(position_ids, 4, kv_heads, dtype)
    out = attend(states, position_ids, window)
    expected = attend_alone(*states, position_ids, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    upstream = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(out, states, upstream)
    for grad, other in zip(grads, torch.autograd.grad(expected, states, upstream), strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=4 * tolerance)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    window=st.none() | st.integers(1, 20),
)
def test_any_lengths(lengths: list[int], window: int | None) -> None:
    position_ids = positions(tuple(lengths))
    states = make_states(position_ids, 2, 1, torch.float64)
    out = attend(states, position_ids, window)
    expected = attend_alone(*states, position_ids, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_one_document_changes_no_other_bit() -> None:
    position_ids = ROWS["packed"]
    states = [s.detach() for s in make_states(position_ids, 4, 2, torch.float32)]
    changed = [s.clone() for s in states]
    for state in changed:
        state[0, :, 6:15] += 1  # the third document of the first row
    different = (attend(states, position_ids) != attend(changed, position_ids)).any(-1).any(-1)
    assert different[0, 6:15].all()
    assert different.sum() == 9


def test_groups_hold_little_filler_and_every_token_once() -> None:
    position_ids = positions((300, 280, 20, 31, 7, 90, 272))
    documents = Documents.find(position_ids)
    tokens = torch.cat([group.flatten() for group in documents.groups])
    assert torch.equal(tokens[documents.places], torch.arange(1000))
    assert len(tokens) <= 1.25 * 1000
    assert documents.bounds.tolist() == [0, 300, 580, 600, 631, 638, 728, 1000]


def test_scaling_and_dropout_reach_the_attention() -> None:
    position_ids = ROWS["packed"]
    states = make_states(position_ids, 4, 4, torch.float64)
    scaled = [states[0] * 3, *states[1:]]
    expected = attend_alone(*scaled, position_ids)
    out = attend(states, position_ids, scaling=3 / math.sqrt(8))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    ones = [*states[:2], torch.ones_like(states[2])]
    torch.manual_seed(0)
    dropped = attend(ones, position_ids, dropout=0.5)
    assert set(dropped[0, 0, :, 0].tolist()) <= {0.0, 2.0}  # its only key, kept or dropped
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.2)


def test_values_may_be_narrower_than_keys() -> None:
    position_ids = ROWS["packed"]
    states = make_states(position_ids, 4, 4, torch.float64, d=12, d_v=6)
    expected = attend_alone(*states, position_ids)
    torch.testing.assert_close(attend(states, position_ids), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_it_does_not_compute_is_refused(name: str) -> None:
    states = make_states(ROWS["single"], 4, 4, torch.float32)
    with pytest.raises(ValueError, match=name):
        attend(states, ROWS["single"], **{name: 50.0})


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernel_for_uneven_lengths_gets_the_documents(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch documents of ``varlen_attn``, computed here in its place, on any device."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        lengths = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(lengths) and window_size[1] == 0 and scale is None
        assert enable_gqa == (query.shape[1] != key.shape[1])
        heads = [x.transpose(0, 1)[None] for x in (query, key, value)]
        seen = None if window_size[0] < 0 else window_size[0] + 1
        return attend_alone(*heads, positions(tuple(lengths)), seen)[0]

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    position_ids = ROWS["packed"]
    states = make_states(position_ids, 4, 2, torch.float64)
    expected = attend_alone(*states, position_ids, window)
    torch.testing.assert_close(attend(states, position_ids, window), expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(dtype: torch.dtype, window: int | None) -> None:
    position_ids = positions((300, 280, 20, 31, 7, 90, 296), (1024,)).cuda()
    states = [
        s.detach().cuda().to(dtype).requires_grad_()
        for s in make_states(position_ids.cpu(), 8, 2, torch.float32, 64, 64)
    ]
    wide = [s.detach().double().cpu().requires_grad_() for s in states]
    out = attend(states, position_ids, window)
    expected = attend_alone(*wide, position_ids.cpu(), window)
    tolerance = 2e-2 if dtype != torch.float32 else 2e-5
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    grads = torch.autograd.grad(out.square().sum(), states)
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), wide), strict=True):
        torch.testing.assert_close(grad.double().cpu(), other, rtol=tolerance, atol=8 * tolerance)


def make_llama(implementation: str | None = None, **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def loss_and_grads(model: LanguageModel, position_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(0, 64, position_ids.shape, generator=torch.Generator().manual_seed(2))
    loss = model(input_ids=ids, position_ids=position_ids, labels=ids)
    return loss, list(torch.autograd.grad(loss, list(model.parameters())))


def test_a_model_gives_the_gradients_of_a_whole_mask() -> None:
    """Ours against transformers' own mask from position ids, also through recomputed layers."""
    position_ids = positions((9, 3, 12), (20, 4))
    plain = LanguageModel(make_llama("eager"), 64).train()
    plain.decoder.set_attn_implementation("eager")
    expected, expected_grads = loss_and_grads(plain, position_ids)
    for recomputed in (False, True):
        model = LanguageModel(make_llama(), 64).train()
        assert model.decoder.config._attn_implementation == DOCUMENTS
        if recomputed:
            model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        loss, grads = loss_and_grads(model, position_ids)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        for grad, other in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_no_mask_of_a_row_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise AssertionError("a mask of length x length was asked for")

    monkeypatch.setattr(attention, "sdpa_mask", refuse)
    model = LanguageModel(tiny_model("mistral"), 96)
    position_ids = positions((9, 3, 12))
    ids = torch.ones_like(position_ids)
    model(input_ids=ids, position_ids=position_ids, labels=ids)
    with pytest.raises(AssertionError, match="asked for"):
        model.decoder(input_ids=ids, position_ids=position_ids, use_cache=False)


def test_documents_end_with_the_forward() -> None:
    """An error inside, or a later call without documents, sees none of an earlier batch."""
    model = tiny_model("llama")
    ids = torch.randint(0, 96, (1, 12))
    expected = model(ids, use_cache=False).logits
    with pytest.raises(ZeroDivisionError), isolated_documents(model, positions((5, 7))):
        raise ZeroDivisionError
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_generation_equals_plain_attention() -> None:
    """Left-padded prompts and the cache go transformers' own way."""
    model, plain = make_llama().eval(), make_llama("sdpa").eval()
    use_document_attention(model)
    ids = torch.randint(3, 64, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("variant", ["gemma2", "bloom", "falcon", "gpt_oss"])
def test_other_attention_maths_keep_their_implementation(variant: str) -> None:
    assert variant in TINY
    assert tiny_model(variant).config._attn_implementation != DOCUMENTS


def test_a_family_s_own_pattern_keeps_documents_apart() -> None:
    """Where a model changes what is seen, only a mask can say so; documents still bound it."""
    model = tiny_model("llama")
    position_ids = positions((3, 5))
    with isolated_documents(model, position_ids):
        mask = create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(1, 8, 32),
            attention_mask=None,
            past_key_values=None,
            position_ids=position_ids,
            or_mask_function=lambda row, head, query, key: key == query + 1,
        )
    at = torch.arange(8)
    document = (at >= 3).long()
    expected = (at <= at[:, None] + 1) & (document == document[:, None])
    assert torch.equal(mask[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_single_query_attends_in_full_precision(dtype: torch.dtype) -> None:
    """A step of generation on a CPU: grouped heads, a mask of padding on the left."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 1, 8, generator=draw).to(dtype)
    key, value = (torch.randn(3, 2, 9, 8, generator=draw).to(dtype) for _ in range(2))
    mask = (torch.arange(9) >= torch.tensor([0, 4, 8])[:, None])[:, None, None]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    out, _ = attend_to_documents(module, query, key, value, mask, scaling=0.5)
    wide = [states.double().repeat_interleave(2, dim=1) for states in (key, value)]
    scores = (query.double() @ wide[0].transpose(-1, -2) * 0.5).masked_fill(~mask, -torch.inf)
    wanted = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted.to(dtype), atol=0, rtol=2**-8)
