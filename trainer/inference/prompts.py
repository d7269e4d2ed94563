"""The prompts of a file, in any format that training reads, with the answers it may hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import SourceConfig
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.conversations import walk_conversations
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.layouts import Layout
from trainer.data.chats.prompts import read_prompt
from trainer.data.reading.files import detect_format, list_files
from trainer.data.reading.raw import Row, RowError
from trainer.data.reading.readers import row_text, walk_file
from trainer.data.reading.records import RejectLog, parse_record
from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding


@dataclass(frozen=True)
class Prompt:
    """One prompt and where it came from.

    Attributes:
        index: its place among the prompts, from 0.
        file: the file it is in.
        row: its 1-based line or record there.
        conversation: messages and tools, without an answer.
        reference: the answer that the file gives, None without.
        token_ids: as the chat template writes it.
    """

    index: int
    file: str
    row: int
    conversation: Conversation
    reference: str | None
    token_ids: list[int]


def read_prompts(
    source: SourceConfig,
    system: str | None,
    chat_model: ChatModel,
    decoding: Decoding,
    rejects: RejectLog,
) -> list[Prompt]:
    """Return the prompts of ``source`` in file order; what is none is rejected with its reason.

    Args:
        source: files and how to read them; each line of a text file is a prompt.
        system: put before conversations without a system message.
        chat_model: tokenises, and has the context that prompt and answer must fit into.
        decoding: may ask for more room than a long prompt leaves, but not for any.
        rejects: counts every row; closed at the end.

    Raises:
        DataError: a file is missing, empty, unreadable or not recognised.
    """
    prompts: list[Prompt] = []
    for path in list_files(source):
        for row, layout in _walk(path, source):
            try:
                conversation, reference = _read(row, layout, system)
                token_ids = chat_model.prompt_ids(conversation.messages, conversation.tools)
                _check_room(token_ids, chat_model, decoding)
            except RecursionError:
                rejects.reject_row(row, path, "nested too deeply")
            except RowError as error:
                rejects.reject_row(row, path, str(error))
            else:
                rejects.accept()
                place = len(prompts), str(path), row.number
                prompts.append(Prompt(*place, conversation, reference, token_ids))
    rejects.close()
    return prompts


def hash_prompts(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of all token ids, in order."""
    return hashlib.sha256(json.dumps([p.token_ids for p in prompts]).encode()).hexdigest()


def _walk(path: Path, source: SourceConfig) -> Iterator[tuple[Row, Layout | None]]:
    """Yield the raw rows of a file with its layout; a text file has none."""
    if detect_format(path, source.format, source.encoding) in ("txt", "lines"):
        for row in walk_file(path, dataclasses.replace(source, format="lines")):
            yield row, None
        return
    layout = find_layout(path, source, "prompts")
    for row in walk_conversations(path, source, layout):
        yield row, layout


def _read(row: Row, layout: Layout | None, system: str | None) -> tuple[Conversation, str | None]:
    """Return the conversation of a raw row up to its prompt, and the answer after it.

    Raises:
        RowError: it is none.
    """
    if layout is None:
        conversation, reference = Conversation((Message("user", row_text(row.value, [])),)), None
    else:
        conversation, reference = read_prompt(parse_record(row.value), layout)
    if system is not None and conversation.messages[0].role != "system":
        messages = (Message("system", system), *conversation.messages)
        conversation = dataclasses.replace(conversation, messages=messages)
    return conversation, reference


def _check_room(token_ids: Sequence[int], chat_model: ChatModel, decoding: Decoding) -> None:
    if chat_model.room_after(len(token_ids), decoding) < 1:
        raise RowError(
            f"the prompt has {len(token_ids)} tokens, which leaves no room for an answer in the "
            f"model's context of {chat_model.context_length}"
        )
