"""What an HTTP request asks for, checked: OpenAI's fields to a prompt and decoding parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from trainer.config import build, nearest
from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.layouts import Layout
from trainer.data.reading.raw import RowError
from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding

LAYOUT = Layout("messages", (("messages", "messages"), ("tools", "tools")), prompts=True)
RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
# Fields without an effect on the answer.
HARMLESS = {
    *("model", "messages", "prompt", "tools", "stream", "stream_options", "user", "store"),
    *("metadata", "service_tier", "parallel_tool_calls", "chat_template_kwargs"),
    *("safety_identifier", "prompt_cache_key"),
}
# Fields whose one value asks for nothing; with another value they would be ignored in silence.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "suffix": ("",),
}


class RequestError(ValueError):
    """A request that cannot be answered as it stands; the message says why."""


def read_decoding(body: Mapping[str, Any], defaults: Decoding) -> Decoding:
    """Return the decoding parameters of a request: what it sets over the server's.

    Beside OpenAI's fields those of ``Decoding`` are read under their own names.

    Raises:
        RequestError: an unknown field, a value that makes no sense, or one that is not supported.
    """
    own = {f.name for f in dataclasses.fields(Decoding)}
    known = own | HARMLESS | NEUTRAL.keys() | RENAMED.keys()
    asked: dict[str, Any] = {}
    for key, value in body.items():
        if key not in known:
            raise RequestError(f"{key} is not a known field{nearest(key, known)}")
        if value is None or key in HARMLESS:
            continue
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                raise RequestError(f"{key}={value!r} is not supported by this server; leave it out")
            continue
        asked[RENAMED.get(key, key)] = value
    if isinstance(asked.get("stop"), str):
        asked["stop"] = [asked["stop"]]
    problems: list[str] = []
    decoding = build(Decoding, {**dataclasses.asdict(defaults), **asked}, "", problems)
    problems += decoding.problems() if decoding is not None else []
    if problems or decoding is None:
        raise RequestError("; ".join(problems))
    return decoding


def check_messages(body: Mapping[str, Any], chat_model: ChatModel) -> None:
    """Raise RequestError unless the request holds a conversation that can be answered."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages: expected a list with at least one message")
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") == "assistant":
        raise RequestError("the last message is the assistant's; there is nothing to answer")
    record = {"messages": messages, "tools": body.get("tools")}
    try:
        conversation = read_conversation(record, LAYOUT)
        token_ids = chat_model.prompt_ids(conversation.messages, conversation.tools)
    except RowError as error:
        raise RequestError(str(error)) from error
    check_room(len(token_ids), chat_model)


def check_prompt(body: Mapping[str, Any], chat_model: ChatModel) -> None:
    """Raise RequestError unless the request holds a text that can be continued."""
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt: expected a text of at least one character")
    check_room(len(chat_model.tokenizer(prompt).input_ids), chat_model)


def check_room(num_tokens: int, chat_model: ChatModel) -> None:
    """Raise RequestError when a prompt fills the context."""
    if chat_model.room_after(num_tokens, Decoding(max_new_tokens=1)) < 1:
        raise RequestError(
            f"the prompt has {num_tokens} tokens, which leaves no room for an answer in the "
            f"model's context of {chat_model.context_length}"
        )
