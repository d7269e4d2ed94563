"""The fused head loss against a hand computation, a float64 reference and plain logits."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.losses import cross_entropy, vocabulary
from trainer.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy_sum,
    linear_cross_entropy,
    linear_nll,
    next_token_targets,
    next_token_weights,
)

NUM_TOKENS, DIM, VOCAB = 37, 8, 23


def make_inputs(
    dtype: torch.dtype = torch.float64, num_tokens: int = NUM_TOKENS, vocab: int = VOCAB
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, DIM, generator=generator, dtype=torch.float64) * 0.5
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor | None = None
) -> Tensor:
    return cross_entropy_sum(hidden @ weight.T, targets, token_weights)


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut everywhere: 5 tokens a chunk (fp64), 1 token a tile, 4 vocabulary rows a block."""
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 5 * VOCAB * 8)
    monkeypatch.setattr(vocabulary, "CPU_TILE_BYTES", 1)
    monkeypatch.setattr(vocabulary, "VOCAB_BLOCK", 4)
    yield


def test_the_shift_happens_once() -> None:
    labels = torch.tensor([[5, 6, 7, 8], [1, IGNORE_INDEX, 3, IGNORE_INDEX]])
    expected = [[6, 7, 8, IGNORE_INDEX], [IGNORE_INDEX, 3, IGNORE_INDEX, IGNORE_INDEX]]
    assert next_token_targets(labels).tolist() == expected
    assert labels.tolist()[0] == [5, 6, 7, 8]


def test_weights_shift_with_their_labels() -> None:
    weights = torch.tensor([[0.5, 1.0, 2.0], [3.0, 0.0, 0.25]])
    assert next_token_weights(weights).tolist() == [[1.0, 2.0, 0.0], [0.0, 0.25, 0.0]]


def test_a_row_of_one_token_has_no_target() -> None:
    labels = torch.tensor([[5]])
    assert next_token_targets(labels).tolist() == [[IGNORE_INDEX]]


def test_equals_a_hand_computed_value() -> None:
    """Logits (ln 1, ln 2, ln 5) give the second class 2/8, the third 5/8."""
    hidden = torch.ones(2, 1)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    assert loss.item() == pytest.approx(math.log(4) + math.log(8 / 5), rel=1e-6)


def test_weighted_loss_equals_a_hand_computed_value() -> None:
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    token_weights = torch.tensor([0.5, 3.0, 0.0])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 0]), None, token_weights)
    assert loss.item() == pytest.approx(0.5 * math.log(4) + 3 * math.log(8 / 5), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    """exp(200) is infinite in fp32; the loss of logits (200, 0) for the second class is 200."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[200.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(200)
    assert weight.grad.flatten().tolist() == pytest.approx([1, -1])


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    hidden, weight, targets = make_inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    with torch.no_grad():
        after_hidden = linear_cross_entropy(hidden - 0.01 * hidden.grad, weight, targets)
        after_weight = linear_cross_entropy(hidden, weight - 0.01 * weight.grad, targets)
    assert after_hidden < loss and after_weight < loss


def test_the_target_row_is_pulled_towards_the_hidden_state() -> None:
    hidden = torch.ones(1, DIM)
    weight = torch.zeros(VOCAB, DIM, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([3])).backward()
    assert torch.allclose(weight.grad[3], torch.full((DIM,), 1 / VOCAB - 1))
    others = weight.grad[torch.arange(VOCAB) != 3]
    assert torch.allclose(others, torch.full_like(others, 1 / VOCAB))


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 6, 37])
def test_gradcheck_across_chunk_boundaries(num_tokens: int) -> None:
    hidden, weight, targets = make_inputs(num_tokens=num_tokens)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets), (hidden, weight)
    )


@pytest.mark.usefixtures("tiny_chunks")
def test_gradients_equal_plain_logits_in_float64() -> None:
    hidden, weight, targets = make_inputs()
    targets[::3] = IGNORE_INDEX
    expected = torch.autograd.grad(plain(hidden, weight, targets) / 7, (hidden, weight))
    actual = torch.autograd.grad(
        linear_cross_entropy(hidden, weight, targets) / 7, (hidden, weight)
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("tiny_chunks")
def test_weighted_gradients_equal_plain_logits_in_float64() -> None:
    hidden, weight, targets = make_inputs()
    token_weights = torch.arange(NUM_TOKENS, dtype=torch.float64) % 5 / 2
    targets[::3] = IGNORE_INDEX
    by_hand = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    expected = torch.autograd.grad(by_hand @ token_weights / 7, (hidden, weight))
    for compute in (
        lambda h, w: linear_cross_entropy(h, w, targets, None, token_weights),
        lambda h, w: cross_entropy_sum(h @ w.T, targets, token_weights),
    ):
        loss = compute(hidden, weight)
        assert loss.item() == pytest.approx((by_hand @ token_weights).item(), rel=1e-12)
        actual = torch.autograd.grad(loss / 7, (hidden, weight))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_weight_of_zero_is_a_masked_position() -> None:
    hidden, weight, targets = make_inputs()
    token_weights = torch.ones(NUM_TOKENS, dtype=torch.float64)
    token_weights[4] = 0
    weighted = linear_cross_entropy(hidden, weight, targets, None, token_weights)
    grads = torch.autograd.grad(weighted, (hidden, weight))
    assert torch.all(grads[0][4] == 0)
    targets[4] = IGNORE_INDEX
    masked = linear_cross_entropy(hidden, weight, targets)
    assert weighted.item() == pytest.approx(masked.item(), rel=1e-14)
    for one, other in zip(grads, torch.autograd.grad(masked, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_weights_of_one_change_no_bit() -> None:
    hidden, weight, targets = make_inputs(torch.float32)
    plainly = linear_cross_entropy(hidden, weight, targets)
    weighted = linear_cross_entropy(hidden, weight, targets, None, torch.ones(NUM_TOKENS))
    assert plainly.item() == weighted.item()
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (plainly, weighted)]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_evaluation_weights_alike() -> None:
    hidden, weight, targets = make_inputs()
    token_weights = torch.arange(NUM_TOKENS) / 4
    trained = linear_cross_entropy(hidden, weight, targets, None, token_weights)
    with torch.no_grad():
        measured = linear_cross_entropy(hidden, weight, targets, None, token_weights)
    assert measured.item() == pytest.approx(trained.item(), rel=1e-12)


@pytest.mark.parametrize("token_weight", [1e-6, 8.0])
def test_heavy_and_light_weights_lose_nothing_in_fp16(token_weight: float) -> None:
    """Stored probabilities are near the ends of fp16's range; the weight must not push them out."""
    hidden = torch.ones(2, 1, dtype=torch.float16)
    weight = torch.tensor([[0.0], [12.0]], dtype=torch.float16, requires_grad=True)
    token_weights = torch.full((2,), token_weight)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0]), None, token_weights)
    (loss / token_weight).backward()  # the target has next to no probability: 2 × (p - 1)
    assert weight.grad.flatten().tolist() == pytest.approx([-2, 2], rel=2e-3)


def test_a_masked_position_gives_and_gets_nothing() -> None:
    hidden, weight, targets = make_inputs()
    targets[4] = IGNORE_INDEX
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert torch.all(hidden.grad[4] == 0) and torch.any(hidden.grad[5] != 0)
    changed = hidden.detach().clone()
    changed[4] += 100
    assert linear_cross_entropy(changed, weight, targets).item() == loss.item()


@pytest.mark.parametrize("num_tokens", [0, 6])
def test_without_targets_loss_and_gradients_are_zero(num_tokens: int) -> None:
    hidden, weight, targets = make_inputs(num_tokens=num_tokens)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad.shape == hidden.shape and not hidden.grad.any()
    assert weight.grad.shape == weight.shape and not weight.grad.any()


def test_padded_rows_take_no_probability_and_no_gradient() -> None:
    hidden, weight, targets = make_inputs()
    targets %= 20
    with torch.no_grad():
        weight[20:] = 50  # would win every softmax it takes part in
    loss = linear_cross_entropy(hidden, weight, targets, num_real_rows=20)
    loss.backward()
    assert loss.item() == pytest.approx(plain(hidden, weight[:20], targets).item(), rel=1e-12)
    assert torch.all(weight.grad[20:] == 0) and torch.all(weight.grad[:20] != 0)


@pytest.mark.parametrize("target", [20, VOCAB, -1])
def test_a_target_that_is_no_real_row_is_refused(target: int) -> None:
    hidden, weight, targets = make_inputs()
    targets %= 20
    targets[3] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(hidden, weight, targets, num_real_rows=20)


def test_only_asked_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make_inputs()
    for name, frozen in (("add_mixed_rows", weight), ("mix_rows", hidden)):
        with monkeypatch.context() as patch:
            patch.setattr(cross_entropy, name, lambda *args: pytest.fail("computed in vain"))
            frozen.requires_grad_(False)
            linear_cross_entropy(hidden, weight, targets).backward()
            frozen.requires_grad_(True)
        assert frozen.grad is None
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets).backward()
        assert frozen.grad is not None
        hidden.grad = weight.grad = None


def test_evaluation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make_inputs()
    expected = linear_cross_entropy(hidden, weight, targets).item()
    monkeypatch.setattr(
        cross_entropy, "add_mixed_rows", lambda *args: pytest.fail("computed in vain")
    )
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(expected)


@pytest.mark.usefixtures("tiny_chunks")
def test_nll_of_each_token_equals_plain_logits() -> None:
    hidden, weight, targets = make_inputs()
    targets[::4] = IGNORE_INDEX
    nll = linear_nll(hidden, weight, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert not nll.requires_grad and torch.all(nll[::4] == 0)


def test_backward_can_run_again_on_a_retained_graph() -> None:
    hidden, weight, targets = make_inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("confident", [False, True], ids=["uniform", "confident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_no_larger_than_that_of_plain_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, confident: bool, weighted: bool
) -> None:
    """Loss to 1e-3 of float64, gradients at most 1 % worse than plain logits in ``dtype``."""
    num_tokens, dim, vocab = 1024, 64, 5000
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, dim, generator=generator) * 0.1
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator) ** 2 // vocab
    hidden = torch.randn(num_tokens, dim, generator=generator)
    if confident:
        hidden += 25 * weight[targets] * torch.rand(num_tokens, 1, generator=generator)
    weight, hidden = weight.to(dtype), hidden.to(dtype)
    token_weights = torch.rand(num_tokens, generator=generator) * 3 if weighted else None
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 200 * vocab * dtype.itemsize)

    def run(compute, run_dtype):
        inputs = [x.to(run_dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = compute(*inputs, targets, token_weights=token_weights)
        grads = torch.autograd.grad(loss / num_tokens * 3, inputs)
        return loss.item(), grads

    exact_loss, exact = run(plain, torch.float64)
    _, usual = run(plain, dtype)
    loss, fused = run(linear_cross_entropy, dtype)
    assert loss == pytest.approx(exact_loss, rel=1e-6 if dtype == torch.float32 else 1e-3)
    for mine, theirs, truth in zip(fused, usual, exact, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, truth) <= 1.01 * relative_error(theirs, truth)


def test_fp16_keeps_small_gradients_under_a_loss_scale() -> None:
    """A row of probability 2e-8, below fp16's smallest number, still gets its gradient."""
    hidden = torch.ones(1, 1, dtype=torch.float16)
    weight = torch.tensor([[0.0], [-17.7]], dtype=torch.float16, requires_grad=True)
    loss_scale = 2.0**16
    (linear_cross_entropy(hidden, weight, torch.tensor([0])) * loss_scale).backward()
    expected = loss_scale / (1 + math.exp(-weight[1].item()))
    assert weight.grad[1].item() == pytest.approx(expected, rel=2e-3)


def test_fp16_overflow_under_too_large_a_loss_scale_shows() -> None:
    """Dynamic loss scaling relies on it: an infinite gradient, not a clamped one."""
    hidden = torch.full((4, 1), 10.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    (linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long)) * 2.0**16).backward()
    assert not weight.grad.isfinite().all()


def test_extra_memory_does_not_grow_with_the_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest logits made stay within the budget for 64 and for 4,096 tokens."""
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 2**16)
    multiply, sizes = cross_entropy.multiply, []

    def record(left: Tensor, right: Tensor) -> Tensor:
        result = multiply(left, right)
        sizes.append(result.numel() * result.itemsize)
        return result

    monkeypatch.setattr(cross_entropy, "multiply", record)
    for num_tokens in (64, 4096):
        hidden, weight, targets = make_inputs(torch.float32, num_tokens, vocab=500)
        linear_cross_entropy(hidden, weight, targets).backward()
        assert max(sizes) <= 2**16
        sizes.clear()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 64), (torch.float32, 1)])
def test_chunks_of_a_cpu_in_low_precision_have_few_shapes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, unit: int
) -> None:
    seen = []
    softmax = cross_entropy._softmax

    def record(hidden: Tensor, *rest: Any) -> Any:
        seen.append(len(hidden))
        return softmax(hidden, *rest)

    monkeypatch.setattr(cross_entropy, "_softmax", record)
    weight = torch.randn(40, 8, dtype=dtype, requires_grad=True)
    for num_targets in (1, 63, 64, 65, 100):
        hidden = torch.randn(100, 8, dtype=dtype, requires_grad=True)
        targets = torch.arange(100) % 40
        targets[num_targets:] = IGNORE_INDEX
        linear_cross_entropy(hidden, weight, targets).backward()
        assert hidden.grad is not None and not hidden.grad[num_targets:].any()
        assert hidden.grad[:num_targets].any(1).all()
    assert seen == [-(-n // unit) * unit for n in (1, 63, 64, 65, 100)]
