"""What a step collects over all ranks: responses, and what each model says of them.

Work is dealt to the ranks, results are summed into zeros: every rank ends with all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.engine.collectives import sum_tensor
from trainer.engine.engine import Engine
from trainer.metrics.rank_times import RankTimes
from trainer.models.language_model import LanguageModel
from trainer.rollout.answer_rows import AnswerBatch, Layout, Sample, deal
from trainer.rollout.experience import Figures
from trainer.rollout.generate import Response, generate, rollout_model
from trainer.rollout.prompts import Prompt
from trainer.rollout.sampling import Sampling, draw_uniforms


@dataclass(frozen=True)
class Rollout:
    """What was written in a step, over all ranks.

    Attributes:
        prompts: one for each response.
        responses: a prompt's one after the other.
    """

    prompts: list[Prompt]
    responses: list[Response]

    @property
    def samples(self) -> list[Sample]:
        """Prompts with their responses, as token ids."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return [Sample(prompt.ids, response.ids) for prompt, response in pairs]

    @property
    def stopped(self) -> Tensor:
        """Whether each response ended by itself: ``[samples]`` bool."""
        return torch.tensor([response.stopped for response in self.responses])

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and responses."""
        return sum(map(len, self.samples))


def roll_out(
    engine: Engine,
    actor: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    stop_ids: Sequence[int],
    *,
    group_size: int,
    key: tuple[int, int],
    times: RankTimes,
) -> Rollout:
    """Return responses to all prompts, ``group_size`` to each.

    Args:
        engine: the run's.
        actor: the part of its module that writes.
        prompts: the same on every rank.
        sampling: how tokens are drawn.
        stop_ids: tokens that end a response.
        group_size: responses to a prompt.
        key: seed and step of the random numbers.
        times: where it is counted how long this rank writes.
    """
    # By length, in turn: every rank has long prompts and short ones. A group stays together, since
    # its prompt is read once.
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].ids))
    dealt = order[engine.rank :: engine.world_size]
    mine = [number * group_size + nth for number in dealt for nth in range(group_size)]
    asked = [prompt for prompt in prompts for _ in range(group_size)]
    found: list[Response] = []
    with rollout_model(engine, actor) as model:
        if mine:
            uniforms = draw_uniforms(*key, mine, sampling.max_new_tokens)
            own = [asked[number].ids for number in mine]
            with times.timed("compute"):
                found = generate(model, own, sampling, stop_ids, uniforms)
    return Rollout(asked, _share(dict(zip(mine, found, strict=True)), len(asked), sampling))


def _share(own: dict[int, Response], num_samples: int, sampling: Sampling) -> list[Response]:
    """Return the responses of all ranks, in the order of their numbers."""
    table = torch.zeros(num_samples, sampling.max_new_tokens + 2, dtype=torch.int64)
    for number, response in own.items():
        table[number, 0], table[number, 1] = len(response.ids), response.stopped
        table[number, 2 : 2 + len(response.ids)] = torch.tensor(response.ids)
    rows = sum_tensor(table).tolist()
    return [Response(row[2 : 2 + row[0]], bool(row[1])) for row in rows]


class Collector:
    """Runs a step's samples through the parts of the engine's module, without gradients.

    Args:
        engine: the run's.
        samples: of the step, the same on every rank.
        layout: of the rows they are packed in.
    """

    def __init__(self, engine: Engine, samples: Sequence[Sample], layout: Layout) -> None:
        self.engine, self.samples, self.layout = engine, samples, layout
        self.lengths = torch.tensor([len(sample.response) for sample in samples])
        self._starts = (self.lengths.cumsum(0) - self.lengths).tolist()
        self._batches = list(deal(samples, range(len(samples)), layout))

    @torch.no_grad()
    def figures(self, temperature: float, *, with_critic: bool) -> Figures:
        """Return what actor, reference and critic say of every response token."""
        num = int(self.lengths.sum())
        own = torch.zeros(4, num, dtype=torch.float64)
        for batch, places in self._placed():
            logps, entropies = run_policy(
                self.engine, "actor", batch, temperature, with_entropy=True
            )
            self._keep(own, batch, places, {0: logps, 1: entropies})
        for batch, places in self._placed():
            logps = run_policy(self.engine, "reference", batch, temperature)
            self._keep(own, batch, places, {2: logps})
        for batch, places in self._placed() if with_critic else ():
            values = run_scalar(self.engine, "critic", batch, batch.before)
            self._keep(own, batch, places, {3: values})
        old, entropies, reference, values = sum_tensor(own).float()
        return Figures(self.lengths, old, reference, values if with_critic else None, entropies)

    @torch.no_grad()
    def scores(self, part: str) -> Tensor:
        """Return a reward model's scores of all samples, by token ids: ``[samples]`` float64."""
        own = torch.zeros(len(self.samples), dtype=torch.float64)
        for batch in self._batches:
            found = run_scalar(self.engine, part, batch, batch.last)
            if batch.samples:
                own[batch.samples] = found.double().cpu()
        return sum_tensor(own)

    def _placed(self) -> Iterator[tuple[AnswerBatch, Tensor]]:
        """Yield this rank's batches, and where their targets are among all tokens."""
        for batch in self._batches:
            spans = [
                torch.arange(self._starts[number], self._starts[number] + int(self.lengths[number]))
                for number in batch.samples
            ]
            yield batch, torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    @staticmethod
    def _keep(own: Tensor, batch: AnswerBatch, places: Tensor, found: dict[int, Tensor]) -> None:
        for row, values in found.items() if batch.samples else ():
            own[row, places] = values.double().cpu()


class Outputs(NamedTuple):
    """What the trained parts say of a batch's n targets, with gradients.

    Attributes:
        logps: ``[n]`` fp32 log-probabilities.
        entropies: ``[n]``; None where not asked for.
        values: ``[n]`` fp32 before each target; None without a critic.
    """

    logps: Tensor
    entropies: Tensor | None
    values: Tensor | None


def run_update(
    engine: Engine, batch: AnswerBatch, temperature: float, *, with_entropy: bool, with_critic: bool
) -> Outputs:
    """Return what actor and critic say of a batch, in one forward of the engine."""
    inputs = _policy_inputs(engine, batch, temperature, with_entropy)
    if with_critic:
        selected = batch.before.to(engine.device)
        found, values = engine(part="both", selected=selected, **inputs)
    else:
        found, values = engine(part="actor", **inputs), None
    logps, entropies = found if with_entropy else (found, None)
    return Outputs(logps, entropies, values)


def run_policy(
    engine: Engine, part: str, batch: AnswerBatch, temperature: float, *, with_entropy: bool = False
) -> Any:
    """Return what ``actor`` or ``reference`` says of a batch's n targets.

    Args:
        engine: the run's.
        part: of its module.
        batch: of this rank.
        temperature: of sampling.
        with_entropy: also return the entropies.

    Returns:
        fp32 log-probabilities ``[n]``; or these and ``[n]`` entropies.
    """
    return engine(part=part, **_policy_inputs(engine, batch, temperature, with_entropy))


def _policy_inputs(
    engine: Engine, batch: AnswerBatch, temperature: float, with_entropy: bool
) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids.to(engine.device),
        "position_ids": batch.position_ids.to(engine.device),
        "labels": batch.labels.to(engine.device),
        "output": "logps",
        "temperature": temperature,
        "with_entropy": with_entropy,
    }


def run_scalar(engine: Engine, part: str, batch: AnswerBatch, selected: Tensor) -> Tensor:
    """Return what ``part`` says at flat places ``selected`` ``[n]`` of a batch: fp32 ``[n]``."""
    device = engine.device
    return engine(
        part=part,
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        selected=selected.to(device),
    )
