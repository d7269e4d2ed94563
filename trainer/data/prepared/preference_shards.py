"""Preferences and prompts of a row, encoded into the draft of its chunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.data.chats.chat_encoder import TooLongError
from trainer.data.chats.conversation import Conversation
from trainer.data.chats.layouts import Layout
from trainer.data.chats.pair_encoder import EncodedPair, PairEncoder
from trainer.data.chats.preferences import EqualAnswersError, Preference, read_preferences
from trainer.data.chats.prompt_encoder import PromptEncoder
from trainer.data.chats.prompts import read_prompt
from trainer.data.prepared.drafts import WEIGHTS, Draft
from trainer.data.prepared.store import hash_text
from trainer.data.reading.raw import RowError
from trainer.data.reading.remarks import Remarks

LeaveOut = Callable[[str], None]  # names a part of a good row that is no document


def add_preferences(
    draft: Draft,
    record: dict[str, Any],
    layout: Layout,
    encoder: PairEncoder,
    remarks: Remarks,
    leave_out: LeaveOut,
) -> int:
    """Add the pairs of one record; return how many there are.

    A document is the prompt with the chosen answer, then the prompt with the rejected one.

    Raises:
        RowError: there is no pair in the record.
    """
    try:
        preferences, reasons = read_preferences(record, layout, remarks)
    except EqualAnswersError:
        draft.chats["equal"] += 1
        raise
    num_added = num_long = 0
    for preference in preferences:
        try:
            pair = encoder.encode_pair(preference)
        except TooLongError as error:
            num_long += 1
            leave_out(str(error))
            draft.add(row_lengths=error.num_tokens, row_hashes=_hash_pair(preference))
        except RowError as error:
            reasons.append(error)
        else:
            num_added += 1
            _add_pair(draft, preference, pair)
    draft.chats["long"] += num_long
    draft.chats["equal"] += sum(isinstance(reason, EqualAnswersError) for reason in reasons)
    if reasons and not num_added + num_long:
        raise reasons[0]
    for reason in reasons:
        draft.chats["unlike"] += 1
        leave_out(str(reason))
    return num_added


def _add_pair(draft: Draft, preference: Preference, pair: EncodedPair) -> None:
    num_tokens = sum(len(side.input_ids) for side in pair.sides)
    for side in pair.sides:
        draft.tokens.append(side.input_ids.tobytes())
        draft.weights.append(side.weights.astype(WEIGHTS).tobytes())
        draft.chats["trained_tokens"] += int(np.count_nonzero(side.weights))
    draft.add(
        num_tokens=num_tokens,
        num_chars=sum(side.num_chars for side in pair.sides),
        num_bytes=sum(side.num_bytes for side in pair.sides),
        text_hashes=hash_question(preference.prompt),
        first_lengths=0 if pair.chosen is None else len(pair.chosen.input_ids),
        margins=preference.margin,
        row_lengths=pair.num_tokens,
        row_hashes=_hash_pair(preference),
    )
    kind = "kept" if len(pair.sides) == 2 else "desirable" if pair.chosen else "undesirable"
    draft.chats[kind] += 1
    draft.chats["turns_cut"] += pair.num_turns_cut
    draft.chats["cut"] += pair.num_turns_cut > 0
    draft.chats["spells_control"] += pair.spells_control
    draft.chats["hides_thoughts"] += pair.hides_thoughts


def add_prompt(
    draft: Draft,
    record: dict[str, Any],
    layout: Layout,
    encoder: PromptEncoder,
    remarks: Remarks,
    leave_out: LeaveOut,
) -> int:
    """Add the prompt of one record, with the answer that the file gives; return 1, or 0: too long.

    Raises:
        RowError: there is no prompt in the record.
    """
    prompt, answer = read_prompt(record, layout, remarks)
    try:
        ids, spells_control = encoder.encode_prompt(prompt)
    except TooLongError as error:
        leave_out(str(error))
        draft.add(row_lengths=error.num_tokens, row_hashes=hash_chat(prompt))
        draft.chats["long"] += 1
        return 0
    said = "".join(message.content for message in prompt.messages)
    answer_bytes = (answer or "").encode()
    draft.tokens.append(ids.tobytes())
    draft.answers.append(answer_bytes)
    whole = encoder.with_system(prompt)
    chat = {"messages": whole.as_chat(), "tools": whole.tool_schemas()}
    chat_bytes = json.dumps(chat, ensure_ascii=False).encode()
    draft.prompts.append(chat_bytes)
    draft.add(
        num_tokens=len(ids),
        num_chars=len(said),
        num_bytes=len(said.encode()),
        text_hashes=hash_question(prompt),
        answer_lengths=len(answer_bytes),
        chat_lengths=len(chat_bytes),
        row_lengths=len(ids),
        row_hashes=hash_chat(prompt),
    )
    draft.chats["kept"] += 1
    draft.chats["answered"] += bool(answer_bytes)
    draft.chats["spells_control"] += spells_control
    return 1


def hash_question(conversation: Conversation) -> int:
    """Return the hash of the first question: the same one is never trained on and held out."""
    asked = next((m.content for m in conversation.messages if m.role == "user"), "")
    return hash_text(asked.encode())


def hash_chat(conversation: Conversation, *more: object) -> int:
    """Return the hash of all of a conversation, to find it again."""
    content = json.dumps([conversation.as_chat(), conversation.tools, *more], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little")


def _hash_pair(preference: Preference) -> int:
    sides = [vars(side) if side else None for side in (preference.chosen, preference.rejected)]
    return hash_chat(preference.prompt, sides)
