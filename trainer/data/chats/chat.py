"""Chats for a tokenizer: its template, conversations as ids, prompts, and where answers end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec, EncodedChat, EncodedRow, TrainOn
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.rendering import MARK
from trainer.data.chats.templates import resolve_template
from trainer.data.reading.rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "ChatEncoder",
    "ChatSpec",
    "EncodedChat",
    "EncodedRow",
    "appended_ids",
    "closing_ids",
    "encode_conversation",
    "prompt_ids",
    "prompt_text",
    "resolve_template",
    "stop_token_ids",
]

PROBE = Conversation((Message("user", "?"), Message("assistant", ".")))


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    conversation: Conversation,
    *,
    template: str | None = None,
    train_on: TrainOn = "assistant",
    system: str | None = None,
    max_length: int | None = None,
) -> EncodedRow:
    """Encode one conversation with a loaded tokenizer; see ``ChatEncoder`` for many.

    Args:
        tokenizer: with a chat template, unless ``template`` gives one.
        conversation: the messages.
        template: Jinja text.
        train_on: learn every answer, the last one, or everything.
        system: put before a conversation without a system message.
        max_length: tokens; None = no limit.

    Raises:
        RowError: it cannot be encoded; the message says why.
    """
    text = template or str(tokenizer.get_chat_template())
    spec = ChatSpec.of(tokenizer, text, train_on=train_on, system=system, max_length=max_length)
    return ChatEncoder(spec).encode(conversation)


def stop_token_ids(tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> list[int]:
    """Return the ids that end an answer, the tokenizer's end token among them.

    Args:
        tokenizer: with a chat template, unless ``template`` gives one.
        template: Jinja text.
    """
    text = template or str(tokenizer.get_chat_template())
    encoder = ChatEncoder(ChatSpec.of(tokenizer, text))
    question, answer = Message("user", "?"), Message("assistant", MARK)
    call = Message("assistant", "", ({"name": "f", "arguments": {}},))
    tool = ({"name": "f", "description": "f", "parameters": {"type": "object", "properties": {}}},)
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for conversation in (
        Conversation((question, answer, question, answer)),
        Conversation((question, call, Message("tool", "1"), answer), tool),
    ):
        try:
            row = encoder.encode(conversation)
        except RowError:
            continue  # a template without calls: its answers end as the others do
        for chat in row.chats:
            targets = chat.weights > 0
            ends = np.flatnonzero(targets & ~np.append(targets[1:], False))
            found += [int(i) for i in chat.input_ids[ends] if int(i) in encoder.control_ids]
    return list(dict.fromkeys(found))


def closing_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return what a chat ends with behind the token that ends its last answer, as token ids.

    Templates such as ChatML's put a line break there, which no model writes.
    """
    ids, weights = _encode_probe(tokenizer)
    return [int(i) for i in ids[int(np.flatnonzero(weights)[-1]) + 1 :]]


def appended_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return what training appends to a rendered chat: the end token, if the template has none."""
    rendered = tokenizer.apply_chat_template(PROBE.as_chat(), return_dict=False)
    ids, _ = _encode_probe(tokenizer)
    return [int(i) for i in ids[len(rendered) :]]


def _encode_probe(tokenizer: PreTrainedTokenizerFast) -> tuple[NDArray[Any], NDArray[np.float32]]:
    chat = encode_conversation(tokenizer, PROBE).chats[-1]
    return chat.input_ids, chat.weights


def prompt_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return what a model is given to answer ``messages``, as text.

    Raises:
        RowError: the template refuses these messages.
    """
    return _apply(tokenizer, messages, tools, tokenize=False)


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Return what a model is given to answer ``messages``, as token ids.

    Raises:
        RowError: the template refuses these messages.
    """
    return list(_apply(tokenizer, messages, tools, tokenize=True, return_dict=False))


def _apply(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    **options: Any,
) -> Any:
    conversation = Conversation(tuple(messages), tuple(map(dict, tools)))
    try:
        return tokenizer.apply_chat_template(
            conversation.as_chat(),
            tools=conversation.tool_schemas(),
            add_generation_prompt=True,
            **options,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        raise RowError(f"chat template: {error or type(error).__name__}") from error
