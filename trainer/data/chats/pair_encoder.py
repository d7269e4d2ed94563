"""Preferences to token ids: one prompt, two answers, and which tokens are theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec, EncodedChat, TooLongError
from trainer.data.chats.chat_parts import Part
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.preferences import EqualAnswersError, Preference
from trainer.data.chats.rendering import hides_thoughts
from trainer.data.reading.raw import RowError


@dataclass(frozen=True)
class PairSpec(ChatSpec):
    """A tokenizer with its chat template, for preferences; ``train_on`` must be last."""

    def identity(self) -> dict[str, Any]:
        """Return what decides the encoding besides the tokenizer, for the name of a store."""
        return super().identity() | {"content": "preferences"}

    def build(self) -> PairEncoder:
        """Return what encodes preferences."""
        return PairEncoder(self)


@dataclass(frozen=True)
class EncodedPair:
    """A preference as tokens.

    Attributes:
        chosen: the prompt with the better answer; None of a lone bad one.
        rejected: the prompt with the worse answer; None of a lone good one.
        num_turns_cut: turns of the prompt that were left out because of ``max_length``.
        num_tokens: of both sides, before any turns were cut.
        spells_control: whether a message spells a token such as ``</s>``, which is read as one.
        hides_thoughts: whether the template leaves out thoughts of an answer.
    """

    chosen: EncodedChat | None
    rejected: EncodedChat | None
    num_turns_cut: int
    num_tokens: int
    spells_control: bool
    hides_thoughts: bool

    @property
    def sides(self) -> list[EncodedChat]:
        """The sequences that are there, the chosen one first."""
        return [side for side in (self.chosen, self.rejected) if side is not None]


class PairEncoder(ChatEncoder):
    """Encode preferences, both sides of a pair cut alike.

    Args:
        spec: what ``PairSpec.of`` made of a tokenizer and a template.
    """

    def encode_pair(self, preference: Preference) -> EncodedPair:
        """Encode both sides, less as many of the prompt's oldest turns as do not fit together.

        Raises:
            TooLongError: the last turn with both answers does not fit.
            RowError: the template refuses them, or the sides do not begin with the same token or
                say the same.
        """
        prompt = self._with_system(preference.prompt)
        answers = [a for a in (preference.chosen, preference.rejected) if a is not None]
        part = Part(list(range(len(prompt.messages))), set(), keep_newest=True)
        limit, num_tokens = self._spec.max_length, 0
        for kept in part.shortened(prompt.messages):
            messages = [prompt.messages[i] for i in kept]
            sides = [self._encode_side(prompt, messages, answer) for answer in answers]
            num_here = sum(len(side.input_ids) for side in sides)
            num_tokens = max(num_tokens, num_here)
            if limit is None or num_here <= limit:
                break
        else:
            raise TooLongError(limit, num_tokens)
        if len(sides) == 2:
            sides = _align(sides)
        chosen = sides[0] if preference.chosen is not None else None
        rejected = sides[-1] if preference.rejected is not None else None
        num_turns = sum(m.role == "user" for m in prompt.messages)
        return EncodedPair(
            chosen,
            rejected,
            num_turns - sum(m.role == "user" for m in messages),
            num_tokens,
            any(self._spells_control(preference.whole(answer)) for answer in answers),
            any(hides_thoughts(side.text, [a]) for side, a in zip(sides, answers, strict=True)),
        )

    def _encode_side(
        self, prompt: Conversation, messages: Sequence[Message], answer: Message
    ) -> EncodedChat:
        whole = Conversation((*messages, answer), prompt.tools)
        last = len(messages)
        rendered = self._render(whole, range(last + 1), {last})
        return self._encode_rendered(rendered, whole.messages, [last])


def _align(sides: list[EncodedChat]) -> list[EncodedChat]:
    """Return two sides whose answers begin after the tokens that both have in common.

    A token may reach from the prompt into one of the answers, or end the prompt otherwise because
    of it; what the sides then do not share of the prompt counts as part of their answers.
    """
    one, other = (side.input_ids for side in sides)
    if np.array_equal(one, other):
        raise EqualAnswersError("the chosen and the rejected answer are equal in tokens")
    firsts = [_first_target(side.weights) for side in sides]
    size = min(*firsts, len(one), len(other))
    differing = np.flatnonzero(one[:size] != other[:size])
    start = int(differing[0]) if len(differing) else size
    if start == 0:
        raise RowError("chosen and rejected have no token in common that their answers follow")
    return [
        side if first == start else replace(side, weights=_learn(side.weights, start, first))
        for side, first in zip(sides, firsts, strict=True)
    ]


def _first_target(weights: NDArray[np.float32]) -> int:
    targets = np.flatnonzero(weights)
    if not len(targets):
        raise RowError("chat template: nothing of the answer is in what it renders")
    return int(targets[0])


def _learn(weights: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    weights = weights.copy()
    weights[start:stop] = 1.0
    return weights
