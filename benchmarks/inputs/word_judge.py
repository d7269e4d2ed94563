"""What a count of words alone tells about preferences: a reference for reward models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import softplus

MIN_TEXTS = 8  # a word or pair of words must stand in as many training answers
DECAY = 0.03

Pair = tuple[str, str]  # the chosen and the rejected answer


def count_words(text: str) -> Counter[str]:
    """Return how often each word, mark and pair of neighbours stands in a text."""
    words = re.findall(r"[a-z']+|[?!.,]", text.lower())
    return Counter(words) + Counter(map(" ".join, pairwise(words)))


def compare_words(pairs: Sequence[Pair], places: dict[str, int]) -> Tensor:
    """Return chosen minus rejected counts, none above 2. -> [pairs, words]"""
    features = torch.zeros(len(pairs), len(places))
    for row, pair in enumerate(pairs):
        for sign, text in zip((1, -1), pair, strict=True):
            for word, count in count_words(text).items():
                if word in places:
                    features[row, places[word]] += sign * min(count, 2)
    return features


def judge_by_words(train: Sequence[Pair], held_out: Sequence[Pair]) -> int:
    """Return how many held-out pairs a logistic regression over words orders rightly."""
    seen = Counter(word for pair in train for text in pair for word in count_words(text))
    words = sorted(word for word, num in seen.items() if num >= MIN_TEXTS)
    places = {word: place for place, word in enumerate(words)}
    features = compare_words(train, places)
    weights = torch.zeros(len(places), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = softplus(-features @ weights).mean() + DECAY * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return int((compare_words(held_out, places) @ weights.detach() > 0).sum())


def prefer_shorter(pairs: Sequence[Pair]) -> int:
    """Return in how many pairs the chosen answer has fewer characters."""
    return sum(len(chosen) < len(rejected) for chosen, rejected in pairs)
