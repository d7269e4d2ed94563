"""Answers of the model in training: many prompts at once, under any ZeRO stage.

The loop is our own around transformers' models and caches: a batch loses its finished rows, equal
prompts are read once, and every token has a random number of its own, so that an answer depends on
nothing but its prompt, its number and the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer import heartbeat
from trainer.data.batches.collate import WIDTH_UNIT
from trainer.engine.engine import Engine
from trainer.errors import DataError
from trainer.models.context import context_length
from trainer.models.language_model import LanguageModel
from trainer.rollout.cache import make_cache
from trainer.rollout.sampling import Sampling, choose_tokens

# A batch is cut down once a quarter of its rows has ended: a row costs its attention and, on a CPU,
# every new width costs memory for its compiled code, so not for each single row.
KEPT_SHARE = 0.75


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        ids: its tokens, the one that ended it among them.
        stopped: whether a stop token ended it, not the limit.
    """

    ids: list[int]
    stopped: bool


@contextmanager
def rollout_model(engine: Engine, part: LanguageModel) -> Iterator[LanguageModel]:
    """Make a part of the engine's module ready for many forwards; training goes on afterwards.

    Inside, it is in evaluation mode and, under ZeRO-3, whole on every rank. Every rank enters and
    leaves together; how many forwards each computes inside is its own affair.

    Args:
        engine: the run's engine.
        part: its module, or one in it.

    Yields:
        ``part``.
    """
    modes = [(module, module.training) for module in part.modules()]
    part.eval()
    try:
        with engine.gathered(part), torch.no_grad():
            yield part
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()  # not inference_mode: what a model keeps (rotary tables) is used in training
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    uniforms: Tensor,
) -> list[Response]:
    """Answer prompts, those of like length together.

    Padding rows of the vocabulary are never chosen.

    Args:
        model: from ``rollout_model``.
        prompts: token ids of each; equal ones are read once.
        sampling: temperature and limits.
        stop_ids: tokens that end an answer.
        uniforms: ``[prompts, max_new_tokens]`` float64 in [0, 1), see ``draw_uniforms``.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        DataError: a prompt leaves no position for an answer, or is empty.
    """
    rooms = [_room(model, number, len(prompt), sampling) for number, prompt in enumerate(prompts)]
    forward = Forward(model)
    answers: dict[int, Response] = {}
    for numbers in plan_batches(prompts, rooms, sampling.cached_tokens):
        batch = Batch(
            prompts=[tuple(prompts[number]) for number in numbers],
            rooms=torch.tensor([rooms[number] for number in numbers], device=forward.device),
            uniforms=uniforms[numbers].to(forward.device),
        )
        found = _answer_batch(forward, batch, sampling, stop_ids)
        answers.update(zip(numbers, found, strict=True))
    return [answers[number] for number in range(len(prompts))]


def plan_batches(
    prompts: Sequence[Sequence[int]], rooms: Sequence[int], cached_tokens: int
) -> list[list[int]]:
    """Return the prompts' numbers by batch, the longest first, equal prompts side by side.

    Args:
        prompts: token ids of each.
        rooms: the longest answer of each.
        cached_tokens: rows of a batch times its longest row's tokens, at most; one row may be more.
    """
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), tuple(prompts[n]), n))
    batches: list[list[int]] = []
    longest = 0
    for number in order:
        size = len(prompts[number]) + rooms[number]
        if batches and (len(batches[-1]) + 1) * max(longest, size) <= cached_tokens:
            batches[-1].append(number)
            longest = max(longest, size)
        else:
            batches.append([number])
            longest = size
    return batches


def _room(model: LanguageModel, number: int, num_tokens: int, sampling: Sampling) -> int:
    """Return how many tokens the answer to a prompt may have."""
    limit = context_length(model.decoder.config)
    room = sampling.max_new_tokens if limit is None else limit - num_tokens
    if room < 1 or not num_tokens:
        raise DataError(
            f"prompt {number} of the rollout has {num_tokens} tokens, the model {limit} positions: "
            "there is no room for an answer; leave out prompts that are empty or longer than "
            "data.max_length, and set that below the model's positions"
        )
    return min(room, sampling.max_new_tokens)


@dataclass(frozen=True)
class Batch:
    """Prompts answered together.

    Attributes:
        prompts: token ids of each.
        rooms: ``[rows]`` int64, the longest answer of each.
        uniforms: ``[rows, tokens]`` float64.
    """

    prompts: list[tuple[int, ...]]
    rooms: Tensor
    uniforms: Tensor


class Forward:
    """Calls a causal language model token by token, with its cache.

    Args:
        model: whose decoder is called; an adapter stays active.
    """

    def __init__(self, model: LanguageModel) -> None:
        decoder = model.decoder
        plain = decoder if isinstance(decoder, PreTrainedModel) else decoder.get_base_model()
        accepted = inspect.signature(plain.forward).parameters
        self._model, self.num_tokens = plain, model.num_tokens
        self._takes_positions = "position_ids" in accepted
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._options["logits_to_keep"] = 1
        self._last_position = (context_length(plain.config) or torch.iinfo(torch.int64).max) - 1
        self.device = plain.get_input_embeddings().weight.device

    def new_cache(self) -> DynamicCache:
        """Return an empty cache, of windows where the model attends to windows."""
        return make_cache(self._model.config)

    def __call__(
        self, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Return the logits of the tokens to come.

        Args:
            input_ids: ``[rows, seq]``, padded on the left.
            mask: ``[rows, cached + seq]`` int64, 0 at padding.
            positions: ``[rows, seq]``; those of rows that have ended may lie beyond the last.
            cache: of what came before; it grows.

        Returns:
            ``[rows, vocab]`` of real tokens.
        """
        heartbeat.beat()
        inputs = {"input_ids": input_ids, "attention_mask": mask, "past_key_values": cache}
        if self._takes_positions:
            inputs["position_ids"] = positions.clamp(0, self._last_position)
        logits = self._model(**inputs, **self._options).logits
        return logits[:, -1, : self.num_tokens]


def _answer_batch(
    forward: Forward, batch: Batch, sampling: Sampling, stop_ids: Sequence[int]
) -> list[Response]:
    """Answer the prompts of one batch; see ``generate``."""
    num_rows, num_steps = len(batch.prompts), int(batch.rooms.max())
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=forward.device)
    state = LiveRows.begin(forward, batch.prompts, num_steps)
    ids = torch.zeros(num_rows, num_steps, dtype=torch.int64, device=forward.device)
    lengths = torch.zeros_like(batch.rooms)
    stopped = torch.zeros(num_rows, dtype=torch.bool, device=forward.device)
    for step in range(num_steps):
        rows = state.rows
        chosen = choose_tokens(state.logits, batch.uniforms[rows, step], sampling)
        ids[rows, step] = chosen
        alive = lengths[rows] == 0
        is_stop = torch.isin(chosen, stops)
        ends = alive & (is_stop | (batch.rooms[rows] == step + 1))
        lengths[rows] += ends * (step + 1)
        stopped[rows] |= ends & is_stop
        alive &= ~ends
        num_alive = int(alive.sum())
        if not num_alive:
            break
        if num_alive <= KEPT_SHARE * len(rows):
            kept = alive.nonzero().squeeze(-1)
            state.keep(kept)
            chosen = chosen[kept]
        state.advance(chosen)
    return [
        Response(row[:length], ended)
        for row, length, ended in zip(ids.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
    ]


class LiveRows:
    """The rows of a batch that are being decoded.

    Attributes:
        rows: ``[alive]`` int64, which of the batch's rows they are.
        logits: ``[alive, vocab]`` of the tokens to come.
    """

    def __init__(
        self, forward: Forward, rows: Tensor, logits: Tensor, mask: Tensor, cache: DynamicCache
    ) -> None:
        self.rows, self.logits = rows, logits
        self._forward, self._mask, self._cache = forward, mask, cache
        self._width = cache.get_seq_length()

    @classmethod
    def begin(
        cls, forward: Forward, prompts: Sequence[tuple[int, ...]], num_steps: int
    ) -> LiveRows:
        """Read the prompts, each different one once."""
        different = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        input_ids, mask = pad_left(list(different), forward.device)
        cache = forward.new_cache()
        logits = forward(input_ids, mask, mask.cumsum(-1) - 1, cache)
        places = torch.tensor([different[prompt] for prompt in prompts], device=forward.device)
        if len(different) < len(prompts):
            cache.batch_select_indices(places)
            logits, mask = logits[places], mask[places]
        mask = torch.cat([mask, mask.new_ones(len(prompts), num_steps)], dim=-1)
        rows = torch.arange(len(prompts), device=forward.device)
        return cls(forward, rows, logits, mask, cache)

    def keep(self, places: Tensor) -> None:
        """Go on with some of the rows only; places ``[kept]`` among them."""
        self._cache.batch_select_indices(places)
        self.rows, self._mask = self.rows[places], self._mask[places]

    def advance(self, tokens: Tensor) -> None:
        """Append a token to each row: tokens ``[alive]``."""
        self._width += 1
        mask = self._mask[:, : self._width]
        positions = mask.sum(-1, keepdim=True) - 1
        self.logits = self._forward(tokens.unsqueeze(-1), mask, positions, self._cache)


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return input_ids and mask, both int64 ``[rows, width]``; the mask is 0 at padding.

    The width is the longest prompt's, rounded up as that of training batches and for their reason.
    """
    width = -(-max(map(len, prompts)) // WIDTH_UNIT) * WIDTH_UNIT
    rows = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    masks = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device)
