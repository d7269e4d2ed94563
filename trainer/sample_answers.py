"""Answers that a chat model gives while it is trained, for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from trainer import heartbeat
from trainer.config import RunConfig
from trainer.data.chats.chat import prompt_ids, stop_token_ids
from trainer.data.chats.conversation import Message
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.engine.collectives import any_over_ranks
from trainer.engine.engine import Engine
from trainer.metrics.sinks import Sinks
from trainer.models.language_model import LanguageModel
from trainer.rollout.generate import rollout_model

HELD_OUT_SAMPLES = 2  # questions taken from each source when no prompts are given
ROOM_SHARE = 0.8  # of a GPU's free memory that a gathered model may take; the cache needs some


@contextmanager
def answering_model(engine: Engine, part: LanguageModel) -> Iterator[LanguageModel]:
    """Make a part of the engine's module ready to write answers; every rank calls this.

    Under ZeRO-3 it is gathered once for all tokens of all answers, if every GPU has room for the
    whole of it; else layer by layer at every token, as in training, which is slow.
    """
    if engine.config.zero_stage < 3 or not any_over_ranks(not has_room(engine.device, part)):
        with rollout_model(engine, part) as model:
            yield model
    else:
        yield part


def has_room(device: torch.device, part: torch.nn.Module) -> bool:
    """Return whether a device has room for all parameters of ``part``, with some to spare."""
    if device.type != "cuda":
        return True
    whole = [vars(p).get("ds_numel", p.numel()) * p.element_size() for p in part.parameters()]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return sum(whole) <= ROOM_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)


def write_answers(
    sinks: Sinks,
    step: int,
    engine: Engine,
    part: LanguageModel,
    tokenizer: Any,
    questions: Iterator[tuple[str, list[int]]],
    max_new_tokens: int,
) -> None:
    """Record the model's answers, greedily decoded; every rank takes part.

    Args:
        sinks: where they go.
        step: the step they are of.
        engine: the run's.
        part: the language model in it; under ZeRO-3 it is gathered once for all answers.
        tokenizer: with the chat template of the run.
        questions: what is shown and what the model is given, from ``choose_questions``.
        max_new_tokens: of each answer; 0 gives none.
    """
    if not max_new_tokens:
        return
    stop_ids = stop_token_ids(tokenizer)
    with answering_model(engine, part) as model:
        for shown, ids in questions:
            heartbeat.beat()
            prompt = torch.tensor([ids], device=engine.device)
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
