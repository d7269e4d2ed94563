"""Rendered conversations, and where in the text each answer stands.

The chat template itself says where an answer begins and ends: what it renders for the messages
before the answer, with the generation prompt, is what a model is given, and what the answer adds
to that is what the model is to write. Templates that rewrite earlier turns break this; there the
answer is found by rendering a mark in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from trainer.data.chats.conversation import Message
from trainer.data.reading.rows import RowError

MARK = "\ue0f0\ue0f1\ue0f2"  # private-use characters that no template and no text holds

Chat = list[dict[str, Any]]  # messages as ``apply_chat_template`` reads them
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Turn:
    """Where one answer stands in the rendered text, in characters.

    Attributes:
        start: first character that the model writes.
        content_end: end of what the answer itself says.
        end: end of what the template adds to close it, such as ``<|im_end|>`` and a newline.
    """

    start: int
    content_end: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """The text of a chat, and where its answers stand.

    Attributes:
        text: as ``apply_chat_template(tokenize=False)`` gives it.
        turns: of the messages asked for; None where the template has rewritten that turn, such as
            by leaving out its thoughts, so that the text does not hold what a model is to write.
    """

    text: str
    turns: dict[int, Turn | None]


def thoughts_in(content: str) -> str:
    """Return the thoughts that an answer begins with, as many data sets write them."""
    opening, _, rest = content.partition("<think>")
    thoughts, end, _ = rest.partition("</think>")
    return thoughts.strip() if end and not opening.strip() else ""


def hides_thoughts(text: str, answers: Iterable[Message]) -> bool:
    """Tell whether a rendered chat leaves out the thoughts of one of its answers."""
    thoughts = (answer.reasoning.strip() or thoughts_in(answer.content) for answer in answers)
    return any(thought not in text for thought in thoughts)


class Renderer:
    """A chat template with the special tokens it may write.

    Args:
        template: Jinja text.
        special_tokens: ``tokenizer.special_tokens_map``.
        control_tokens: texts of the tokenizer's added tokens; one of them closes an answer.
    """

    def __init__(
        self, template: str, special_tokens: Mapping[str, str], control_tokens: Sequence[str]
    ) -> None:
        self.template = template
        self._special_tokens = dict(special_tokens)
        longest_first = sorted(control_tokens, key=len, reverse=True)
        # (?!) matches nowhere.
        self.control_token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, chat: Chat, tools: Tools, *, generate: bool = False) -> str:
        """Return the text of ``chat``, as ``apply_chat_template(tokenize=False)`` does.

        Args:
            chat: the messages.
            tools: function schemas.
            generate: end with what opens an answer.

        Raises:
            RowError: the template refuses these messages.
        """
        try:
            (text,), _ = render_jinja_template(
                [chat],
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=generate,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, KeyError, ValueError, RecursionError) as error:
            raise RowError(f"chat template: {str(error) or type(error).__name__}") from error
        return text

    @cached_property
    def closing(self) -> str:
        """What the template writes after an answer; empty when it cannot be told."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
        try:
            return self.render(chat, None).rpartition(MARK)[2]
        except RowError:
            return ""

    def locate(self, chat: Chat, tools: Tools, wanted: Iterable[int]) -> Rendered:
        """Render ``chat`` and find the answers ``wanted``, by index.

        Raises:
            RowError: the template refuses these messages.
        """
        text = self.render(chat, tools)
        return Rendered(text, {i: self._find(chat, tools, i, text) for i in wanted})

    def _find(self, chat: Chat, tools: Tools, index: int, text: str) -> Turn | None:
        for way in (self._find_by_prefixes, self._find_by_mark):
            try:
                turn = way(chat, tools, index, text)
            except RowError:
                continue  # the template takes the whole chat, but not a part or a mark in it
            if turn is not None:
                return turn
        return None

    def _find_by_prefixes(self, chat: Chat, tools: Tools, index: int, text: str) -> Turn | None:
        if index == 0:
            return None
        before = self.render(chat[:index], tools, generate=True)
        is_last = index == len(chat) - 1
        through = text if is_last else self.render(chat[: index + 1], tools)
        if not (text.startswith(through) and through.startswith(before)) or through == before:
            return None
        return Turn(len(before), self._content_end(through, len(before)), len(through))

    def _content_end(self, text: str, start: int) -> int:
        """Return where the closing of the answer that ends ``text`` begins."""
        closing = self.closing
        if closing and text.endswith(closing) and len(text) - len(closing) >= start:
            return len(text) - len(closing)
        # Another closing than usual, as after a call: the control token that ends the text.
        trimmed = text.rstrip()
        last = max(
            (match.end() for match in self.control_token.finditer(trimmed, start)), default=0
        )
        if last != len(trimmed):
            return len(text)
        return [match.start() for match in self.control_token.finditer(trimmed, start)][-1]

    def _find_by_mark(self, chat: Chat, tools: Tools, index: int, text: str) -> Turn | None:
        message = chat[index]
        if message.get("reasoning_content"):
            return None  # what is found of it would be without its thoughts
        # What stands in the mark's place is the whole answer, its calls among it.
        marked = [*chat[:index], {"role": message["role"], "content": MARK}, *chat[index + 1 :]]
        before, mark, after = self.render(marked, tools).partition(MARK)
        if not mark or not (text.startswith(before) and text.endswith(after)):
            return None
        content_end = len(text) - len(after)
        if content_end < len(before):
            return None
        thoughts = thoughts_in(message.get("content") or "")
        if thoughts not in text[len(before) : content_end] and index < len(chat) - 1:
            return None  # left out here, perhaps not where this answer is the last
        return Turn(len(before), content_end, content_end + self._closing_length(after))

    def _closing_length(self, after: str) -> int:
        """Return how much of what follows an answer closes it."""
        if self.closing and after.startswith(self.closing):
            return len(self.closing)
        blank = len(after) - len(after.lstrip())
        match = self.control_token.match(after, blank)
        return match.end() if match else 0
