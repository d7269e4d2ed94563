"""How a token is drawn: one uniform number each, so that nothing else in a batch has a say."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

# top_p alone: so many likeliest tokens are looked at before the whole vocabulary is sorted. They
# hold the wanted share nearly always, and finding them costs a CPU a tenth of a sort.
NUCLEUS = 512
BLOCK = 256  # places whose probabilities are summed first


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn during training.

    Attributes:
        max_new_tokens: longest answer; the model's positions may end it sooner.
        temperature: divides the logits; 0 = greedy.
        top_k: sample from this many likeliest tokens; 0 = all.
        top_p: sample from the likeliest tokens of this joint probability (arXiv:1904.09751);
            1 = all.
        cached_tokens: tokens whose keys and values a rank holds at once, prompts and answers; so
            many prompts are answered together.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    cached_tokens: int = 32768

    def problems(self) -> list[str]:
        """Return values that make no sense."""
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "1 or more"),
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (0 < self.top_p <= 1, "top_p", "more than 0, at most 1 (off)"),
            (self.cached_tokens >= 1, "cached_tokens", "1 or more"),
        ]
        return [
            f"{key}={vars(self)[key]!r}: expected {expected}"
            for good, key, expected in rules
            if not good
        ]


def draw_uniforms(seed: int, step: int, samples: Sequence[int], num_tokens: int) -> Tensor:
    """Return the random numbers of answers, each a function of its own key alone.

    Philox counts under a key, so equal keys give equal numbers on every machine, and a longer
    answer begins with the numbers of a shorter one.

    Args:
        seed: of the run.
        step: of the rollout.
        samples: the answers' numbers among all of the step, over all ranks.
        num_tokens: of the longest answer.

    Returns:
        ``[len(samples), num_tokens]`` float64 in [0, 1), on the CPU.
    """
    rows = np.empty((len(samples), num_tokens), np.float64)
    for row, sample in zip(rows, samples, strict=True):
        key = hashlib.blake2b(f"{seed}/{step}/{sample}".encode(), digest_size=16).digest()
        numbers = np.random.Philox(key=int.from_bytes(key, "big")).random_raw(num_tokens)
        # 32 bits: times a total, no number rounds up to the total itself.
        row[:] = (numbers >> np.uint64(32)) / 2.0**32
    return torch.from_numpy(rows)


def choose_tokens(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Return each row's token by inversion: the first whose cumulative probability exceeds.

    Args:
        logits: ``[rows, vocab]``, of real tokens only.
        numbers: ``[rows]`` float64, uniform in [0, 1).
        sampling: temperature, top_k, top_p.

    Returns:
        ``[rows]`` int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if not sampling.top_k and sampling.top_p == 1:
        return _invert(logits.softmax(-1), numbers)
    probs, tokens = _likeliest(logits, sampling)
    # What stands before a token already has the whole share: the token is not needed for it.
    before = probs.cumsum(-1, dtype=torch.float64) - probs
    kept = probs.masked_fill(before >= sampling.top_p, 0.0)
    return tokens.gather(-1, _invert(kept, numbers).unsqueeze(-1)).squeeze(-1)


def _likeliest(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens, best first, and their probabilities; both [rows, kept]."""
    vocab = logits.shape[-1]
    if sampling.top_k:
        values, tokens = logits.topk(min(sampling.top_k, vocab))
        return values.softmax(-1), tokens
    total = logits.logsumexp(-1, keepdim=True)
    values, tokens = logits.topk(min(NUCLEUS, vocab))
    probs = (values - total).exp()
    if bool((probs.sum(-1) < sampling.top_p).any()):
        values, tokens = logits.sort(descending=True)
        probs = (values - total).exp()
    return probs, tokens


def _invert(probs: Tensor, numbers: Tensor) -> Tensor:
    """Return the first place whose cumulative value exceeds the number's share of the total.

    First the block it is in is found, then the place: to sum blocks up is a fraction of the work of
    summing up to every place.

    Args:
        probs: ``[rows, places]``, not all 0 in a row.
        numbers: ``[rows]`` float64 in [0, 1).
    """
    blocks = pad(probs, (0, -probs.shape[1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    wanted = numbers.unsqueeze(-1) * ends[:, -1:]
    # right: of places with probability 0, which repeat a cumulative value, none is taken.
    block = torch.searchsorted(ends, wanted, right=True)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1)
    cumulative = inside.cumsum(-1, dtype=torch.float64)
    rest = wanted - (ends - sums).gather(-1, block)
    # Sums of other order round otherwise: what is left must stay below all of the block.
    total = cumulative[:, -1:]
    rest = torch.minimum(rest, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(cumulative, rest, right=True)
    return (block * BLOCK + place).squeeze(-1)
