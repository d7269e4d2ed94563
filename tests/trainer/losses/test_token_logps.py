"""Log-probabilities of targets against a hand computation and float64 logits."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from trainer.losses import token_logps, vocabulary
from trainer.losses.token_logps import linear_logps, logps_from_logits

NUM_TOKENS, DIM, VOCAB, REAL = 37, 8, 23, 20


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, DIM, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64) * 0.5
    targets = torch.randint(0, REAL, (NUM_TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> list[Tensor]:
    """Return logps and entropies the long way, without padding rows."""
    every = (hidden @ weight[:REAL].T / temperature).log_softmax(1)
    return [every[torch.arange(len(targets)), targets], -(every.exp() * every).sum(1)]


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cut everywhere: 5 tokens a chunk (fp64), 1 token a tile, 4 vocabulary rows a block."""
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 5 * VOCAB * 8)
    monkeypatch.setattr(vocabulary, "CPU_TILE_BYTES", 1)
    monkeypatch.setattr(vocabulary, "VOCAB_BLOCK", 4)
    yield


def test_equals_a_hand_computed_value() -> None:
    """Logits (ln 1, ln 2, ln 5): probabilities 1/8, 2/8, 5/8; at temperature 1/2 1, 4, 25 / 30."""
    hidden = torch.ones(2, 1)
    weight = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    targets = torch.tensor([1, 2])
    logps, entropies = linear_logps(hidden, weight, targets, with_entropy=True)
    assert logps.tolist() == pytest.approx([math.log(2 / 8), math.log(5 / 8)])
    by_hand = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    assert entropies.tolist() == pytest.approx([by_hand] * 2)
    sharper = linear_logps(hidden, weight, targets, temperature=0.5)
    assert sharper.tolist() == pytest.approx([math.log(4 / 30), math.log(25 / 30)])


def test_a_step_along_the_gradient_makes_targets_likelier() -> None:
    hidden, weight, targets = make_inputs()
    before = linear_logps(hidden, weight, targets).sum()
    before.backward()
    with torch.no_grad():
        after = linear_logps(hidden + 0.01 * hidden.grad, weight, targets).sum()
    assert after > before


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.usefixtures("tiny_chunks")
def test_values_and_gradients_equal_plain_ones(
    fused: bool, temperature: float, with_entropy: bool
) -> None:
    hidden, weight, targets = make_inputs()
    factors = torch.linspace(-2, 3, NUM_TOKENS, dtype=torch.float64)
    expected = plain(hidden, weight, targets, temperature)[: 1 + with_entropy]
    if fused:
        found = linear_logps(hidden, weight, targets, REAL, temperature, with_entropy)
    else:
        found = logps_from_logits(hidden @ weight.T, targets, REAL, temperature, with_entropy)
    found = list(found) if with_entropy else [found]
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-12, atol=1e-12)

    def grads(values: list[Tensor]) -> tuple[Tensor, ...]:
        total = values[0] @ factors + sum(0.3 * v @ factors.flip(0) for v in values[1:])
        return torch.autograd.grad(total, (hidden, weight))

    own = grads(found)
    for mine, truth in zip(own, grads(expected), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-12)
    assert not torch.any(own[1][REAL:])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_error_is_no_larger_than_that_of_plain_logits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_entropy: bool
) -> None:
    num_tokens, dim, vocab = 600, 64, 3000
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, dim, generator=generator) * 0.1).to(dtype)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    hidden = torch.randn(num_tokens, dim, generator=generator).to(dtype)
    factors = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 200 * vocab * dtype.itemsize)
    monkeypatch.setattr(token_logps, "KEPT_BYTES", 300 * vocab * dtype.itemsize)  # one chunk

    def run(compute: Callable[..., Tensor], run_dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(run_dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        out = compute(*inputs)
        out = list(out) if with_entropy else [out]
        total = sum(values @ factors.to(values.dtype) for values in out)
        return [*(values.detach() for values in out), *torch.autograd.grad(total, inputs)]

    def by_logits(h: Tensor, w: Tensor) -> Tensor:
        return logps_from_logits(h @ w.T, targets, None, 0.9, with_entropy)

    exact, usual = run(by_logits, torch.float64), run(by_logits, dtype)
    mine = run(lambda h, w: linear_logps(h, w, targets, None, 0.9, with_entropy), dtype)
    for found, theirs, truth in zip(mine, usual, exact, strict=True):
        if dtype == torch.float32:
            assert relative_error(found, truth) < 1e-6
        else:
            assert relative_error(found, truth) <= 1.05 * relative_error(theirs, truth) + 1e-7


def test_fp16_keeps_small_gradients_under_a_loss_scale() -> None:
    """A row of probability 2e-8, below fp16's smallest number, still gets its gradient."""
    hidden = torch.ones(1, 1, dtype=torch.float16)
    weight = torch.tensor([[0.0], [-17.7]], dtype=torch.float16, requires_grad=True)
    loss_scale = 2.0**16
    (-linear_logps(hidden, weight, torch.tensor([0])).sum() * loss_scale).backward()
    expected = loss_scale / (1 + math.exp(-weight[1].item()))
    assert weight.grad[1].item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kept", [0, 12, 100])
def test_logits_beyond_a_constant_are_made_again_for_backward(
    monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", 4 * VOCAB * 5)
    monkeypatch.setattr(token_logps, "KEPT_BYTES", kept * 4 * VOCAB)
    multiply, num_tokens = token_logps.multiply, []

    def record(left: Tensor, right: Tensor) -> Tensor:
        num_tokens.append(len(left))
        return multiply(left, right)

    monkeypatch.setattr(token_logps, "multiply", record)
    hidden, weight, targets = make_inputs(torch.float32)
    logps = linear_logps(hidden, weight, targets)
    assert sum(num_tokens) == NUM_TOKENS and max(num_tokens) <= 5
    logps.sum().backward(retain_graph=True)
    known = {0: 0, 12: 10, 100: NUM_TOKENS}[kept]  # whole chunks of at most 5 tokens
    assert sum(num_tokens) == 2 * NUM_TOKENS - known and max(num_tokens) <= 5
    once = weight.grad.clone()
    logps.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    with torch.no_grad():
        again = linear_logps(hidden, weight, targets)
    assert torch.equal(again, logps)


def test_only_asked_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = make_inputs()
    monkeypatch.setattr(token_logps, "add_mixed_rows", lambda *args: pytest.fail("in vain"))
    linear_logps(hidden, weight.detach(), targets).sum().backward()
    assert hidden.grad is not None


def test_no_target_gives_nothing() -> None:
    hidden, weight, targets = make_inputs()
    logps, entropies = linear_logps(hidden[:0], weight, targets[:0], with_entropy=True)
    assert logps.shape == entropies.shape == (0,)
    (logps.sum() + entropies.sum()).backward()
    assert not torch.any(weight.grad)


def test_a_target_that_is_no_real_row_is_refused() -> None:
    hidden, weight, targets = make_inputs()
    targets[3] = REAL
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_logps(hidden, weight, targets, REAL)
