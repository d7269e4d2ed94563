"""Answers of a model that knows some conversations by heart: alone, in batches, sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chat_fixtures import COUNT, KNOWN, LEARNT, UNKNOWN, WHO, as_messages

from trainer.data.chats.conversation import Message
from trainer.inference.chat_model import ChatModel
from trainer.inference.decoding import Decoding
from trainer.inference.loading import Loading, load_chat_model

GREEDY = Decoding(max_new_tokens=60, temperature=0.0)
SAMPLED = Decoding(max_new_tokens=24, temperature=3.0, top_p=1.0)


@pytest.fixture(scope="module")
def chat_model(chat_folder: Path) -> ChatModel:
    return load_chat_model(chat_folder, Loading(precision="fp32", device="cpu"))


def questions() -> list[list[Message]]:
    """Return every learnt conversation without its last answer."""
    whole = [as_messages(turns)[:-1] for turns in LEARNT]
    return [[Message(m["role"], m["content"]) for m in messages] for messages in whole]  # type: ignore[arg-type]


def prompts(chat_model: ChatModel) -> list[list[int]]:
    return [chat_model.prompt_ids(messages) for messages in questions()]


def test_learnt_answers_come_back(chat_model: ChatModel) -> None:
    answers = chat_model.answer(prompts(chat_model), GREEDY, list("abcd"))
    expected = [turns[-1][1].strip() for turns in LEARNT]
    assert [answer.text.strip() for answer in answers] == expected
    assert {answer.finish_reason for answer in answers} == {"stop"}


@pytest.mark.parametrize("decoding", [GREEDY, SAMPLED, replace(GREEDY, repetition_penalty=1.3)])
def test_batch_answers_as_single_prompts(chat_model: ChatModel, decoding: Decoding) -> None:
    names = list("abcd")
    together = chat_model.answer(prompts(chat_model), decoding, names)
    alone = [
        chat_model.answer([prompt], decoding, [name])[0]
        for prompt, name in zip(prompts(chat_model), names, strict=True)
    ]
    assert together == alone


def test_seed_and_name_decide_what_is_drawn(chat_model: ChatModel) -> None:
    prompt = [chat_model.prompt_ids([Message("user", WHO)])]
    first = chat_model.answer(prompt, SAMPLED, ["a"])
    assert first == chat_model.answer(prompt, SAMPLED, ["a"])
    assert first != chat_model.answer(prompt, SAMPLED, ["b"])
    assert first != chat_model.answer(prompt, replace(SAMPLED, seed=1), ["a"])
    unseeded = replace(SAMPLED, seed=None)
    drawn = {chat_model.answer(prompt, unseeded, ["a"])[0].text for _ in range(4)}
    assert len(drawn) > 1


def test_stop_text_is_found_across_byte_tokens_and_left_out(chat_model: ChatModel) -> None:
    prompt = [chat_model.prompt_ids([Message("user", WHO)])]
    stopped = chat_model.answer(prompt, replace(GREEDY, stop=["知道"]), ["a"])[0]
    assert (stopped.text.strip(), stopped.finish_reason) == ("我不", "stop")


def test_stream_is_the_answer_in_whole_characters(chat_model: ChatModel) -> None:
    pieces: list[str] = []
    prompt = [chat_model.prompt_ids([Message("user", WHO)])]
    answer = chat_model.answer(prompt, GREEDY, ["a"], pieces.append)[0]
    assert "".join(pieces) == answer.text and answer.text.strip() == UNKNOWN.strip()
    assert len(pieces) >= len(UNKNOWN.strip())
    assert answer.num_tokens > 3 * len(UNKNOWN.strip())  # a token a byte: the test is about that


def test_noise_never_shows_replacement_characters(chat_model: ChatModel) -> None:
    wild = replace(SAMPLED, temperature=50.0, max_new_tokens=100)
    texts: list[str] = []
    answers = chat_model.answer(prompts(chat_model), wild, list("abcd"), texts.append)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)
    assert any(answer.text for answer in answers)


def test_padding_rows_are_never_sampled(chat_model: ChatModel) -> None:
    assert chat_model.padding_ids == list(range(400, 448))
    wild = replace(SAMPLED, temperature=1e6, max_new_tokens=100)
    fed: list[int] = []
    decode = chat_model.tokenizer.decode
    assert decode([447]) == ""  # it would pass unnoticed in the text
    generate = chat_model.model.generate

    def watch(*args: object, **options: object) -> object:
        sequences = generate(*args, **options)
        fed.extend(sequences.flatten().tolist())
        return sequences

    chat_model.model.generate = watch  # type: ignore[assignment]
    try:
        chat_model.answer(prompts(chat_model), wild, list("abcd"))
    finally:
        chat_model.model.generate = generate
    assert len(set(fed)) > 100 and max(fed) < 400


def test_beams_find_the_learnt_answer_and_stop(chat_model: ChatModel) -> None:
    beams = replace(GREEDY, num_beams=3)
    answers = chat_model.answer(prompts(chat_model), beams, list("abcd"))
    assert [a.text.strip() for a in answers][1:3] == [KNOWN.strip(), COUNT.strip()]
    stopped = chat_model.answer(prompts(chat_model)[2:3], replace(beams, stop=["three"]), ["a"])[0]
    assert (stopped.text.strip(), stopped.finish_reason) == ("one two", "stop")


def test_max_new_tokens_and_context_end_an_answer(chat_model: ChatModel) -> None:
    prompt = chat_model.prompt_ids([Message("user", "count")])
    cut = chat_model.answer([prompt], replace(GREEDY, max_new_tokens=5), ["a"])[0]
    assert (cut.num_tokens, cut.finish_reason) == (5, "length")
    assert COUNT.strip().startswith(cut.text.strip())
    assert chat_model.context_length == 256
    long = chat_model.prompt_ids([Message("user", "count " * 60)])[:250]
    ended = chat_model.answer([long], GREEDY, ["a"])[0]
    assert ended.num_tokens <= 6
    # Beside a shorter prompt too, which may go on.
    both = chat_model.answer([long, prompt], GREEDY, ["a", "b"])
    assert both[0] == ended and both[1].text.strip() == COUNT.strip()
