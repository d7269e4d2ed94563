"""How answers are decoded: the keys of ``conf/decode.yaml``, checked together."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Decoding:
    """Decoding parameters.

    Attributes:
        max_new_tokens: longest answer; the model's context may end it sooner.
        num_beams: beam search above 1; deterministic, so it needs ``temperature=0``.
        temperature: divides the logits; 0 = greedy.
        top_k: sample from this many likeliest tokens; 0 = all.
        top_p: sample from the likeliest tokens of this joint probability (arXiv:1904.09751);
            1 = all.
        min_p: leave out tokens below this share of the likeliest one's probability
            (arXiv:2407.01082); 0 = none.
        repetition_penalty: divides the scores of tokens that occurred (arXiv:1909.05858); 1 = off.
        seed: of sampling; None draws other answers each time.
        stop: texts that end an answer and are left out of it.
    """

    max_new_tokens: int = 512
    num_beams: int = 1
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stop: list[str] = field(default_factory=list)

    @property
    def samples(self) -> bool:
        """Return whether answers are drawn at random."""
        return self.temperature > 0

    def problems(self) -> list[str]:
        """Return values that make no sense, alone or together."""
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "1 or more"),
            (self.num_beams >= 1, "num_beams", "1 or more"),
            (self.temperature >= 0, "temperature", "0 (greedy) or more"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (0 < self.top_p <= 1, "top_p", "more than 0, at most 1 (off)"),
            (0 <= self.min_p <= 1, "min_p", "0 (off) to 1"),
            (self.repetition_penalty > 0, "repetition_penalty", "more than 0; 1 is off"),
            (all(self.stop), "stop", "texts of at least one character"),
        ]
        found = [
            f"{key}={vars(self)[key]!r}: expected {expected}"
            for good, key, expected in rules
            if not good
        ]
        if self.num_beams > 1 and self.samples:
            found.append(
                f"num_beams={self.num_beams} with temperature={self.temperature:g}: beam search "
                "is deterministic; set temperature=0, or num_beams=1 to sample"
            )
        return found
