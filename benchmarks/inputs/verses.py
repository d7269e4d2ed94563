"""Measures of Chinese verse: form, characters shared with the true poem, rhyme.

Rhyme is judged by the poems themselves. Two characters that end even clauses of one poem rhyme,
and two that rhyme with the same others rhyme too; so each character is the vector of how often it
shares a poem with every other, and two rhyme if the cosine of their vectors is above a threshold.
This needs no dictionary, and unlike modern Mandarin readings it is the rhyme of the time.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

MARKS = re.compile(r"[，。？！；、：,.?!;:\s]+")
RHYMING_COSINE = 0.1
ONE_RHYME = (4, 8)  # clauses of the forms that keep one rhyme throughout
VARIANTS = str.maketrans("爲裏疎劒", "為里疏劍")  # spellings that differ between the files


def clauses(text: str) -> list[str]:
    """Return what stands between punctuation marks or white space, in one spelling.

    >>> clauses("秦川雄帝宅，函谷壯皇居。")
    ['秦川雄帝宅', '函谷壯皇居']
    """
    return [clause for clause in MARKS.split(text.translate(VARIANTS)) if clause]


def couplets(poem: Sequence[str]) -> set[str]:
    """Return the pairs of clauses that a poem is made of, each joined."""
    return {poem[i] + poem[i + 1] for i in range(0, len(poem) - 1, 2)}


@dataclass(frozen=True)
class Form:
    """Which demands of form an answer meets.

    Attributes:
        length: all clauses are as long as those of the given couplet, and there is one.
        count: there are as many clauses as in the true poem.
        regular: lengths are right and the poem has 4 or 8 clauses in all (絕句 or 律詩), which is
            all that a couplet alone tells.
    """

    length: bool
    count: bool
    regular: bool

    @property
    def whole(self) -> bool:
        """Say whether lengths and count are both right."""
        return self.length and self.count


def form(couplet: str, answer: str, truth: str) -> Form:
    """Judge the form of ``answer``, the clauses that continue ``couplet``."""
    given, own = clauses(couplet), clauses(answer)
    length = bool(own) and all(len(clause) == len(given[0]) for clause in own)
    regular = length and len(given) + len(own) in ONE_RHYME
    return Form(length, len(own) == len(clauses(truth)), regular)


def overlap(answer: str, truth: str) -> float:
    """Return the F1 of the two texts' characters, as multisets, without punctuation.

    >>> overlap("明月光", "明月明")
    0.6666666666666666
    """
    own, true = Counter("".join(clauses(answer))), Counter("".join(clauses(truth)))
    shared = (own & true).total()
    return 2 * shared / (own.total() + true.total()) if shared else 0.0


def rhyme_characters(poem: Sequence[str]) -> list[str]:
    """Return the last characters of the even clauses."""
    return [clause[-1] for clause in poem[1::2]]


class Rhymes:
    """Which characters rhyme, learnt from poems."""

    def __init__(self, poems: Iterable[Sequence[str]]) -> None:
        """Learn from the regular ones of ``poems`` (lists of clauses)."""
        self._shared: dict[str, Counter[str]] = defaultdict(Counter)
        for poem in poems:
            if len(poem) in ONE_RHYME and len({len(clause) for clause in poem}) == 1:
                ends = sorted(set(rhyme_characters(poem)))
                for a in ends:
                    self._shared[a].update(ends)

    def __len__(self) -> int:
        """Return the number of characters known."""
        return len(self._shared)

    def rhyme(self, a: str, b: str) -> bool:
        """Say whether two characters rhyme; one that was never seen rhymes only with itself."""
        if a == b:
            return True
        first, second = self._shared.get(a), self._shared.get(b)
        if first is None or second is None:
            return False
        product = sum(count * second[other] for other, count in first.items())
        return product > RHYMING_COSINE * _norm(first) * _norm(second)

    def agreement(self, couplet: str, answer: str) -> float | None:
        """Return the share of the answer's even clauses that rhyme with the couplet's end.

        A character that only repeats the couplet's last one counts as no rhyme. None if the answer
        has no even clause.
        """
        end = clauses(couplet)[-1][-1]
        ends = rhyme_characters(clauses(answer))
        if not ends:
            return None
        return sum(other != end and self.rhyme(end, other) for other in ends) / len(ends)


def _norm(counts: Counter[str]) -> float:
    return math.sqrt(sum(count * count for count in counts.values()))


def same_rhymes(rhymes: Rhymes, ends: Sequence[str]) -> float:
    """Return the share of pairs of ``ends`` that rhyme; what a measure gives to true poems."""
    pairs = list(combinations(ends, 2))
    return sum(rhymes.rhyme(a, b) for a, b in pairs) / len(pairs)
