"""One conversation that grows, and its newest part that fits the model's context."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainer.data.chats.conversation import Message
from trainer.data.reading.rows import RowError
from trainer.errors import DataError
from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding


@dataclass
class Dialogue:
    """Questions and answers.

    Attributes:
        system: the system prompt, if any.
        turns: all questions with their answers.
        num_left_out: oldest turns that the model no longer sees.
    """

    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)
    num_left_out: int = 0

    def messages(self, question: str | None = None, start: int = 0) -> list[Message]:
        """Return the system prompt, the turns from ``start`` on, and the question."""
        messages = [Message("system", self.system)] if self.system else []
        for asked, answered in self.turns[start:]:
            messages += [Message("user", asked), Message("assistant", answered)]
        if question is not None:
            messages.append(Message("user", question))
        return messages

    def prompt(self, chat_model: ChatModel, question: str, decoding: Decoding) -> list[int]:
        """Return the token ids of a prompt that leaves room for an answer.

        Turns are left out from the oldest on until the answer may have ``max_new_tokens``, or half
        of the context where that is less.

        Raises:
            DataError: the question alone is too long, or the template refuses it.
        """
        wanted = decoding.max_new_tokens
        if chat_model.context_length is not None:
            wanted = min(wanted, chat_model.context_length // 2)
        for start in range(self.num_left_out, len(self.turns) + 1):
            try:
                prompt = chat_model.prompt_ids(self.messages(question, start))
            except RowError as error:
                raise DataError(str(error)) from error
            room = chat_model.room_after(len(prompt), decoding)
            if room >= wanted or (start == len(self.turns) and room >= 1):
                self.num_left_out = start
                return prompt
        raise DataError(
            f"the question takes {len(prompt)} tokens with what the template adds, and the model's "
            f"context is {chat_model.context_length}; shorten it"
        )

    def reset(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()
        self.num_left_out = 0
