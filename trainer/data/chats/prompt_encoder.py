"""Prompts to token ids: a conversation up to its last answer, and what opens that answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec, TooLongError
from trainer.data.chats.conversation import Conversation


@dataclass(frozen=True)
class PromptSpec(ChatSpec):
    """A tokenizer with its chat template, for prompts."""

    def identity(self) -> dict[str, Any]:
        """Return what decides the encoding besides the tokenizer, for the name of a store."""
        return super().identity() | {"content": "prompts"}

    def build(self) -> PromptEncoder:
        """Return what encodes prompts."""
        return PromptEncoder(self)


class PromptEncoder(ChatEncoder):
    """Encode prompts.

    Args:
        spec: what ``PromptSpec.of`` made of a tokenizer and a template.
    """

    def with_system(self, prompt: Conversation) -> Conversation:
        """Return the prompt as the template gets it: with ``data.system`` where it has none."""
        return self._with_system(prompt)

    def encode_prompt(self, prompt: Conversation) -> tuple[NDArray[Any], bool]:
        """Return a prompt's ids, and whether it spells a token such as ``</s>``. -> [tokens]

        Args:
            prompt: ends before the answer.

        Raises:
            TooLongError: it does not fit into ``data.max_length``; nothing is cut.
            RowError: the template refuses it.
        """
        ids = self._backend.encode(self.render_prompt(prompt), add_special_tokens=False).ids
        limit = self._spec.max_length
        if limit is not None and len(ids) > limit:
            raise TooLongError(limit, len(ids))
        return np.array(ids, self.dtype), self._spells_control(prompt)

    def render_prompt(self, prompt: Conversation) -> str:
        """Return the text of a prompt.

        Raises:
            RowError: the template refuses it.
        """
        prompt = self.with_system(prompt)
        return self._renderer.render(prompt.as_chat(), prompt.tool_schemas(), generate=True)
