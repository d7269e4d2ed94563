"""What a step's responses are worth: every reward of the section, each by its own means.

A reward model reads the very tokens of prompt and response when it shares the policy's tokenizer
and chat template; else, if it may, both are rendered anew with its own. Either way a response is
scored where answers were in its training: at the token that ends it, not at what a template puts
behind that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tokenizer.load import fingerprint, load_tokenizer, num_ids
from trainer.data.chats.chat import appended_ids, closing_ids
from trainer.engine.collectives import sum_tensor
from trainer.engine.engine import Engine
from trainer.errors import ConfigError, DataError, NumericsError
from trainer.models.context import context_length
from trainer.models.scalar_model import reward_statistics
from trainer.rollout.answer_rows import Layout, Sample
from trainer.rollout.collection import Collector, Rollout
from trainer.rollout.generate import Response
from trainer.rollout.prompts import Prompt
from trainer.rollout.rewards import ModelReward, Reward, RuleReward, describe


@dataclass(frozen=True)
class Judge:
    """How one reward model reads responses.

    Attributes:
        reward: its entry in the section.
        tokenizer: its own where texts are rendered anew, None where it reads the policy's tokens.
        appended: tokens that end a rendered answer where the template does not.
        num_closing: tokens that the template puts behind the end of a rendered answer.
        num_positions: its longest input; None = no limit.
        mean: taken off its scores.
        std: what they are divided by.
    """

    reward: ModelReward
    tokenizer: Any
    appended: list[int]
    num_closing: int
    num_positions: int | None
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def open(cls, reward: ModelReward, tokenizer: Any, tokenizer_path: str) -> Judge:
        """Find out how the model of a reward is to read.

        Args:
            reward: the entry.
            tokenizer: the policy's, with the chat template of the run.
            tokenizer_path: where it is from.

        Raises:
            ConfigError: the model has another tokenizer or template and may not go through text,
                lacks what that needs, or its folder knows no mean and deviation to normalize by.
        """
        where, own = f"stage.rewards.{reward.name}", load_tokenizer(reward.path)
        if reward.through_text and not own.chat_template:
            raise ConfigError(
                f"{where}.through_text=true needs a chat template in {reward.path}, which has none;"
                " put the one that the model was trained with there as chat_template.jinja"
            )
        if not reward.through_text:
            _refuse_other(reward, own, tokenizer, tokenizer_path)
        statistics = (0.0, 1.0)
        if reward.normalize:
            statistics = reward_statistics(reward.path) or (0.0, 0.0)
            if not statistics[1] > 0:
                raise ConfigError(
                    f"{where}.normalize=true needs reward_mean and reward_std above 0 in "
                    f"{reward.path}/config.json, which an export of stage reward writes; use false"
                )
        config = AutoConfig.from_pretrained(
            reward.path, local_files_only=True, trust_remote_code=False
        )
        return cls(
            reward,
            own if reward.through_text else None,
            appended_ids(own) if reward.through_text else [],
            len(closing_ids(own)) if reward.through_text else 0,
            context_length(config),
            *statistics,
        )

    def read(self, rollout: Rollout, texts: Sequence[str]) -> list[Sample]:
        """Return the tokens the model reads of each response; the last is where it is scored.

        Args:
            rollout: prompts and responses.
            texts: of the responses.

        Raises:
            DataError: one is longer than the model's positions.
        """
        pairs = zip(rollout.prompts, rollout.responses, texts, strict=True)
        samples = []
        for prompt, response, text in pairs:
            sample = self._read(prompt, response, text)
            if self.num_positions is not None and len(sample) > self.num_positions:
                raise DataError(
                    f"stage.rewards.{self.reward.name}: a response takes {len(sample)} tokens with "
                    f"its prompt, the reward model has {self.num_positions} positions; lower "
                    f"data.max_length or stage.sampling.max_new_tokens"
                )
            samples.append(sample)
        return samples

    def _read(self, prompt: Prompt, response: Response, text: str) -> Sample:
        if self.tokenizer is None:
            return Sample(prompt.ids, response.ids)
        ids = self.tokenizer.apply_chat_template(
            [*prompt.chat["messages"], {"role": "assistant", "content": text}],
            tools=prompt.chat["tools"],
            return_dict=False,
        )
        ids = [*ids, *self.appended]
        ids = ids[: len(ids) - self.num_closing]
        return Sample(ids[:-1], ids[-1:])


def _refuse_other(reward: ModelReward, own: Any, tokenizer: Any, tokenizer_path: str) -> None:
    """Refuse a reward model that would read the policy's tokens as something else."""
    differing = []
    if fingerprint(reward.path) != fingerprint(tokenizer_path):
        differing.append(
            f"tokenizer ({num_ids(own)} tokens, the policy's has {num_ids(tokenizer)})"
        )
    if own.chat_template != tokenizer.chat_template:
        differing.append("chat template" if own.chat_template else "chat template (it has none)")
    if differing:
        raise ConfigError(
            f"stage.rewards.{reward.name}.path={reward.path} has another "
            f"{' and another '.join(differing)} than the policy, whose tokens it would misread; "
            f"set stage.rewards.{reward.name}.through_text=true to render texts anew for it, or "
            "give a reward model trained from the same base with the same data.template"
        )


def judge_once(
    reward: RuleReward,
    engine: Engine,
    prompts: Sequence[str],
    texts: Sequence[str],
    answers: Sequence[str | None],
) -> Tensor:
    """Return a rule's numbers of all samples, ``[samples]`` float64, the same on every rank.

    Each sample is judged on one rank only: a user's function may draw random numbers, ask a judge
    elsewhere or look at the clock, and ranks with different rewards would learn different things.

    Args:
        reward: the rule.
        engine: the run's; every rank calls with the same samples.
        prompts: texts as the policy read them.
        texts: of the responses.
        answers: the data's, None where it gives none.

    Raises:
        DataError: the rule failed on a sample of this rank.
    """
    mine = slice(engine.rank, None, engine.world_size)
    scores = torch.zeros(len(texts), dtype=torch.float64)
    scores[mine] = reward.score(prompts[mine], texts[mine], answers[mine])
    return sum_tensor(scores)


class Scorer:
    """Applies all rewards of a run to rollouts.

    Args:
        rewards: from ``build_rewards``.
        tokenizer: the policy's, with the chat template of the run.
        tokenizer_path: where it is from.

    Raises:
        ConfigError: a reward model that cannot read the policy's responses.
    """

    def __init__(self, rewards: Sequence[Reward], tokenizer: Any, tokenizer_path: str) -> None:
        self._rewards, self._tokenizer = list(rewards), tokenizer
        self._judges = {
            reward.name: Judge.open(reward, tokenizer, tokenizer_path)
            for reward in rewards
            if isinstance(reward, ModelReward)
        }

    def score(self, engine: Engine, rollout: Rollout, layout: Layout) -> dict[str, Tensor]:
        """Return each reward's numbers, not weighted: ``[samples]`` float64 by name.

        Args:
            engine: the run's; every rank calls with the same rollout.
            rollout: of the step.
            layout: of rows.

        Raises:
            DataError: a rule failed on a sample, which is named.
            NumericsError: a reward model returned NaN or Inf.
        """
        prompts = self._tokenizer.batch_decode(
            [prompt.ids for prompt in rollout.prompts], skip_special_tokens=True
        )
        texts = self.texts(rollout)
        answers = [prompt.answer for prompt in rollout.prompts]
        return {
            reward.name: self._ask(self._judges[reward.name], engine, rollout, texts, layout)
            if isinstance(reward, ModelReward)
            else judge_once(reward, engine, prompts, texts, answers)
            for reward in self._rewards
        }

    def texts(self, rollout: Rollout) -> list[str]:
        """Return the responses' texts, without the token that ended them."""
        ids = [
            response.ids[: len(response.ids) - response.stopped] for response in rollout.responses
        ]
        texts: list[str] = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def total(self, scores: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of what ``score`` returned: ``[samples]`` float64."""
        return torch.stack([r.weight * scores[r.name] for r in self._rewards]).sum(0)

    def _ask(
        self, judge: Judge, engine: Engine, rollout: Rollout, texts: list[str], layout: Layout
    ) -> Tensor:
        samples = judge.read(rollout, texts)
        longest = max(map(len, samples))
        # What pads is not read: 0, since the policy's padding may be no token of the model's.
        rows = dataclasses.replace(
            layout, max_length=max(layout.max_length, longest), pad_token_id=0
        )
        scores = Collector(engine, samples, rows).scores(judge.reward.part)
        for number in (~scores.isfinite()).nonzero().flatten().tolist():
            prompt = self._tokenizer.decode(rollout.prompts[number].ids)
            raise NumericsError(
                f"stage.rewards.{judge.reward.name}: the reward model returned "
                f"{float(scores[number])} for {describe(prompt, texts[number])}; its weights are "
                "damaged, or overflow in this precision (engine.precision)"
            )
        return (scores - judge.mean) / judge.std
