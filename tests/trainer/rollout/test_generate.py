"""Answers in training: equal to transformers' own, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
import torch
from family_models import TINY, VOCAB, tiny_model
from peft import LoraConfig, get_peft_model

from trainer.errors import DataError
from trainer.models.language_model import LanguageModel
from trainer.rollout.generate import Forward, Response, generate, plan_batches
from trainer.rollout.sampling import Sampling, draw_uniforms

FAMILIES = [
    "llama",
    "qwen3",
    "mistral",
    "gemma3_text",
    "mixtral",
    "bloom",
    "falcon",
    "falcon-alibi",
]
REAL = VOCAB - 6  # rows of the vocabulary that are tokens
NUM_NEW = 20


def make_prompts(num: int, seed: int = 0) -> list[list[int]]:
    """Return prompts of 1 to 15 tokens."""
    random = Random(seed)
    return [[random.randrange(3, REAL) for _ in range(random.randint(1, 15))] for _ in range(num)]


def answer(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    stop_ids: Sequence[int] = (2,),
    **changes: Any,
) -> list[Response]:
    """Answer prompts numbered in their order."""
    sampling = Sampling(**{"max_new_tokens": NUM_NEW, "temperature": 0.0, **changes})
    uniforms = draw_uniforms(0, 0, range(len(prompts)), sampling.max_new_tokens)
    return generate(model, prompts, sampling, stop_ids, uniforms)


def answer_by_transformers(
    model: LanguageModel, prompt: list[int], stop_ids: Sequence[int], num_new: int
) -> list[int]:
    """Return transformers' greedy answer to a prompt alone."""
    ids = model.decoder.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        suppress_tokens=list(range(model.num_tokens, VOCAB)),
    )
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return LanguageModel(tiny_model("llama"), REAL)


@pytest.mark.slow
@pytest.mark.parametrize("variant", TINY)
def test_every_family_answers_as_in_transformers(variant: str) -> None:
    model = LanguageModel(tiny_model(variant), REAL).eval()
    prompts = make_prompts(9)
    wanted = [answer_by_transformers(model, prompt, (), NUM_NEW) for prompt in prompts]
    assert [response.ids for response in answer(model, prompts, ())] == wanted


@pytest.mark.parametrize("variant", FAMILIES)
def test_greedy_answers_are_those_of_transformers(variant: str) -> None:
    model = LanguageModel(tiny_model(variant), REAL).eval()
    prompts = make_prompts(9)
    wanted = [answer_by_transformers(model, prompt, (), NUM_NEW) for prompt in prompts]
    stop_ids = sorted({answer[5] for answer in wanted[:3]})  # so that some end, at various places
    wanted = [answer_by_transformers(model, prompt, stop_ids, NUM_NEW) for prompt in prompts]
    found = answer(model, prompts, stop_ids)
    assert [response.ids for response in found] == wanted
    assert [response.stopped for response in found] == [ids[-1] in stop_ids for ids in wanted]
    assert len({response.stopped for response in found}) == 2


def test_sampled_answers_do_not_hang_on_what_is_in_the_batch(llama: LanguageModel) -> None:
    prompts = make_prompts(12)
    prompts[7] = prompts[3]  # two answers to one prompt
    options = {"stop_ids": range(20), "temperature": 1.3, "top_p": 0.97}
    together = answer(llama, prompts, **options)
    assert together == answer(llama, prompts, **options, cached_tokens=60)
    sampling = Sampling(NUM_NEW, 1.3, top_p=0.97)
    for number, prompt in enumerate(prompts):
        uniforms = draw_uniforms(0, 0, [number], NUM_NEW)
        assert generate(llama, [prompt], sampling, range(20), uniforms) == [together[number]]
    lengths = {len(response.ids) for response in together}
    assert len(lengths) > 4  # so that batches did lose rows on the way
    assert together[3].ids != together[7].ids


def test_another_step_gives_other_answers(llama: LanguageModel) -> None:
    prompts = make_prompts(3)
    answers = [
        generate(llama, prompts, Sampling(8), (), draw_uniforms(seed, step, range(3), 8))
        for seed, step in [(0, 0), (0, 1), (1, 0)]
    ]
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_a_token_that_also_pads_ends_the_answer_and_is_part_of_it(llama: LanguageModel) -> None:
    # Padding is made of token 0; here 0 is the end as well.
    prompts = make_prompts(24)
    for response in answer(llama, prompts, (0,), temperature=2.0, max_new_tokens=60):
        assert response.stopped == (response.ids[-1] == 0)
        assert 0 not in response.ids[:-1]
        assert response.stopped or len(response.ids) == 60


def test_padding_rows_of_the_vocabulary_are_never_chosen() -> None:
    model = LanguageModel(tiny_model("llama"), REAL)
    with torch.no_grad():
        model.decoder.lm_head.weight[REAL:] *= 50.0
    for temperature in (0.0, 1.0):
        for response in answer(model, make_prompts(20), (), temperature=temperature):
            assert max(response.ids) < REAL


def test_rows_that_have_ended_are_not_computed(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, rows = make_prompts(16), []
    call = Forward.__call__

    def count(self: Forward, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        rows.append(len(input_ids))
        return call(self, input_ids, *args)

    monkeypatch.setattr(Forward, "__call__", count)
    found = answer(llama, prompts, range(30), temperature=1.5)
    needed = sum(len(response.ids) - 1 for response in found)
    assert rows[0] == 16
    assert needed <= sum(rows[1:]) <= needed / 0.75
    assert len(rows) == max(len(response.ids) for response in found)


def test_equal_prompts_are_read_once(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read, call = [], Forward.__call__

    def count(self: Forward, input_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        read.append(tuple(input_ids.shape))
        return call(self, input_ids, *args)

    monkeypatch.setattr(Forward, "__call__", count)
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7]]
    together = answer(llama, prompts, (), temperature=1.0)
    assert read[:2] == [(2, 8), (4, 1)]
    alone = draw_uniforms(0, 0, [2], NUM_NEW)
    assert generate(llama, [prompts[2]], Sampling(NUM_NEW), (), alone) == [together[2]]


@pytest.mark.parametrize("variant", ["gpt2", "llama"])
def test_answers_end_at_the_last_position(variant: str) -> None:
    model = LanguageModel(tiny_model(variant), REAL)  # 128 positions
    prompts = [[3] * 120, [4] * 30, [5] * 127]
    found = answer(model, prompts, (), max_new_tokens=40)
    assert [len(response.ids) for response in found] == [8, 40, 1]
    assert found[0].ids == answer_by_transformers(model, prompts[0], (), 8)
    assert not any(response.stopped for response in found)


@pytest.mark.parametrize("prompt", [[3] * 128, []])
def test_a_prompt_without_room_is_named(llama: LanguageModel, prompt: list[int]) -> None:
    with pytest.raises(DataError, match=f"prompt 1 .* {len(prompt)} tokens, .* 128 positions"):
        answer(llama, [[3], prompt])


def test_batches_hold_like_lengths_within_the_budget() -> None:
    prompts = [[1] * length for length in (3, 9, 4, 9, 1, 200)]
    prompts[3] = [2] * 9
    rooms = [10, 10, 10, 10, 10, 50]
    assert plan_batches(prompts, rooms, 40) == [[5], [1, 3], [2, 0], [4]]
    assert plan_batches(prompts, rooms, 10**9) == [[5, 1, 3, 2, 0, 4]]


def test_training_mode_and_gradients_are_left_alone(llama: LanguageModel) -> None:
    llama.train()
    before = {name: p.clone() for name, p in llama.named_parameters()}
    answer(llama, make_prompts(2), ())
    assert llama.training and all(p.grad is None for p in llama.parameters())
    assert all(torch.equal(before[name], p) for name, p in llama.named_parameters())
    ids = torch.tensor([[3, 4, 5]])
    llama(ids, torch.arange(3)[None], ids).backward()
    llama.zero_grad(set_to_none=True)
    llama.eval()


def test_an_adapter_answers() -> None:
    prompts = make_prompts(5)
    plain = answer(LanguageModel(tiny_model("llama"), REAL), prompts, ())
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    found = answer(LanguageModel(adapted, REAL).eval(), prompts, ())
    merged = LanguageModel(adapted.merge_and_unload(), REAL).eval()
    assert found == answer(merged, prompts, ())
    assert found != plain
