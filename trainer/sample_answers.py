"""Answers that a chat model gives while it is trained, for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer.config import RunConfig
from trainer.data.chats.chat import prompt_ids, stop_token_ids
from trainer.data.chats.conversation import Message
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.metrics.sinks import Sinks

HELD_OUT_SAMPLES = 2  # questions taken from each source when no prompts are given


def write_answers(
    sinks: Sinks,
    step: int,
    model: Any,
    device: torch.device,
    tokenizer: Any,
    questions: Iterator[tuple[str, list[int]]],
    max_new_tokens: int,
) -> None:
    """Record the model's answers, greedily decoded; every rank takes part.

    Args:
        sinks: where they go.
        step: the step they are of.
        model: a ``LanguageModel`` in its engine.
        device: the engine's.
        tokenizer: with the chat template of the run.
        questions: what is shown and what the model is given, from ``choose_questions``.
        max_new_tokens: of each answer; 0 gives none.
    """
    if not max_new_tokens:
        return
    stop_ids = stop_token_ids(tokenizer)
    for shown, ids in questions:
        prompt = torch.tensor([ids], device=device)
        out = model.continue_text(prompt, max_new_tokens, stop_ids)
        answer = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        sinks.sample(step, f"{shown.rstrip()}\n", answer)


def choose_questions(
    config: RunConfig, tokenizer: Any, store: TokenStore, prompts: list[str]
) -> Iterator[tuple[str, list[int]]]:
    """Yield what is shown and what the model is given, for each sampled question.

    Args:
        config: with ``data.system``.
        tokenizer: with the chat template of the run.
        store: of conversations or preferences; its held-out questions are asked without prompts.
        prompts: questions.
    """
    system = config.data.system
    head = [] if system is None else [Message("system", system)]
    for prompt in prompts:
        yield prompt, prompt_ids(tokenizer, [*head, Message("user", prompt)])
    if not prompts:
        for source in store.sources.values():
            for ids in held_out_questions(source):
                yield tokenizer.decode(ids, skip_special_tokens=True), ids


def held_out_questions(source: SourceStore) -> list[list[int]]:
    """Return what stands before the first trained token of some held-out documents."""
    documents = source.document_ids(held_out=True)
    documents = documents[np.argsort(source.text_hashes[documents], kind="stable")]
    questions: list[list[int]] = []
    for document in documents.tolist():
        weights = source.document_weights(document)
        assert weights is not None
        first = int(np.argmax(weights > 0))
        ids = source.document(document)[:first].tolist()
        # With train_on=everything no question stands apart.
        if first > 1 and ids not in questions:
            questions.append(ids)
        if len(questions) == HELD_OUT_SAMPLES:
            break
    return questions
