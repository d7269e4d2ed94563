"""Proximal policy optimisation, GRPO and RLOO: learn from rewards of the model's own responses."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenizer.load import load_tokenizer
from trainer import faults, heartbeat
from trainer.config import RunConfig
from trainer.data.chats.chat import resolve_template, stop_token_ids
from trainer.engine.collectives import any_over_ranks
from trainer.engine.engine import Engine
from trainer.errors import NumericsError
from trainer.inputs import tokenizer_path
from trainer.losses.ppo import adapt_kl_coef
from trainer.metrics.pairwise import count_scores
from trainer.metrics.sinks import Sinks
from trainer.models.identity import model_identity
from trainer.policy import build_actor_critic
from trainer.rollout.answer_rows import Layout
from trainer.rollout.collection import Collector, Rollout, roll_out
from trainer.rollout.experience import (
    Experience,
    RewardStatistics,
    Shaping,
    make_experience,
    refuse_broken_figures,
    shape_scores,
)
from trainer.rollout.prompts import Prompt, PromptLoader, held_out_prompts
from trainer.rollout.rewards import (
    ModelReward,
    build_rewards,
    reward_inputs,
)
from trainer.rollout.scoring import Scorer
from trainer.rollout.settings import PpoSettings
from trainer.rollout.tally import count_rollout, find_oddities, flat_share, spread, tally
from trainer.rollout.update import Update
from trainer.signals import StopRequest
from trainer.stage import Context
from trainer.store_stage import StoreStage

LOG = logging.getLogger(__name__)
NUM_SHOWN = 8  # held-out responses in the report
EVAL_STEP = -1  # key of the random numbers of evaluations, which all draw the same


@dataclass
class Ppo(PpoSettings, StoreStage):
    """Hyperparameters of the stage; the rest are the config's groups."""

    name: ClassVar[str] = "ppo"
    content: ClassVar[str] = "prompts"

    def check(self, config: RunConfig) -> list[str]:
        """Return what is out of range, and what contradicts the model or itself."""
        return super().check(config) + self.problems(config)

    def rows_per_step(self, config: RunConfig) -> int:
        """Return the prompts of a step over all ranks."""
        return self.rollouts_per_step

    def load_tokenizer(self, path: str) -> Any:
        """Return the tokenizer with the chat template of the prompts."""
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template = resolve_template(tokenizer, self.config.data.template)
        return tokenizer

    def build(self, context: Context) -> tuple[Engine, dict[str, Any]]:
        """Return the engine around actor, critic, reference and reward models."""
        return build_actor_critic(
            context,
            self.tokenizer,
            shared=self.models == "shared",
            with_critic=self.has_critic,
            critic_path=self.critic,
            critic_lr_ratio=self.critic_lr_ratio,
            rewards={reward.name: reward.path for reward in self._models},
        )

    @property
    def _models(self) -> list[ModelReward]:
        return [reward for reward in build_rewards(self.rewards) if isinstance(reward, ModelReward)]

    def describe_inputs(self) -> dict[str, str]:
        """Return identities of everything the run reads: reward models, users' rules, …"""
        folders = {f"stage.rewards.{reward.name}.path": reward.path for reward in self._models}
        if self.critic:
            folders["stage.critic"] = self.critic
        models = {key: model_identity(Path(path)) for key, path in folders.items()}
        return super().describe_inputs() | models | reward_inputs(build_rewards(self.rewards))

    def setup(self, context: Context, sinks_step: int) -> Sinks:
        """Set up data and models; find what ends a response."""
        sinks = super().setup(context, sinks_step)
        self.meters.flops_per_token = 0.0  # a step is more than one forward and backward a token
        self._stop_ids, self._warned = stop_token_ids(self.tokenizer), set[str]()
        self._scorer = Scorer(
            build_rewards(self.rewards), self.tokenizer, str(tokenizer_path(self.config))
        )
        data, loop = self.config.data, self.config.loop
        self._layout = Layout(
            max_length=data.max_length + self.sampling.max_new_tokens,
            micro_batch_size=loop.micro_batch_size,
            packing=data.packing,
            pad_token_id=self.store.pad_token_id,
            rank=context.rank,
            world_size=context.world_size,
        )
        self._shaping = Shaping(
            self.advantage, self.responses_per_prompt, self.kl.estimator, self.gamma, self.lam
        )
        return sinks

    def batches(self, state: dict[str, Any] | None) -> Iterator[Any]:
        """Yield the prompts of each step, from where ``state`` left off."""
        self._kl_coef = state["kl_coef"] if state else self.kl.coef
        self._statistics = RewardStatistics(**(state["reward_statistics"] if state else {}))
        self._latest: dict[str, float] = {}
        return super().batches(state)

    def make_loader(self, start_row: int) -> Any:
        """Return the prompts by step, the same on every rank."""
        return PromptLoader(
            self.store,
            self.config.data,
            self.config.loop.seed,
            self.rollouts_per_step,
            start_row,
        )

    def _measured(self, batches: Any) -> Iterator[Any]:
        """Yield prompts as they come: what of them is learnt is not known yet."""
        return iter(batches)

    def state(self) -> dict[str, Any]:
        """Return the prompt cursor, the price of KL and the statistics of the rewards."""
        return super().state() | {
            "kl_coef": self._kl_coef,
            "reward_statistics": vars(self._statistics),
        }

    def progress(self) -> dict[str, float]:
        """Return tokens, epochs and the last step's figures that are no means."""
        return super().progress() | self._latest

    def train_step(self, step: int, batches: Iterator[Any]) -> int:
        """Roll out, score, update; return the tokens of prompts and responses."""
        key = (self.config.loop.seed, step)
        with self._timed("rollout"):
            faults.reach("rollout", rank=self.context.rank, step=step)
            rollout = self._roll_out(next(batches), self.responses_per_prompt, key)
        self._tokens += rollout.num_tokens
        try:
            with self._timed("score"):
                rewards, scores, experience = self._score(rollout)
        except NumericsError as error:  # the same on every rank: all have all figures
            self.guard.veto(step, str(error), self._own_rows())
            return rollout.num_tokens
        tally(self.bag, rollout, rewards, scores, experience)
        self._latest = spread(rewards) | {"kl_coef": self._kl_coef}
        self._warn(step, rollout, scores)
        with self._timed("update"):
            faults.reach("update", rank=self.context.rank, step=step)
            self._learn(step, experience)
        kl = float(experience.figures.sample_kl().mean())
        if self.kl.target is not None:
            num = len(rollout.responses)
            self._kl_coef = adapt_kl_coef(self._kl_coef, kl, self.kl.target, num, self.kl.horizon)
        return rollout.num_tokens

    def _own_rows(self) -> range:
        """Return the rows of this step's prompts, dealt to the ranks."""
        stop = self.loader.state()["next_row"]
        first = stop - self.rollouts_per_step
        return range(first + self.context.rank, stop, self.context.world_size)

    def _roll_out(self, prompts: list[Prompt], group_size: int, key: tuple[int, int]) -> Rollout:
        module: Any = self.policy.module
        return roll_out(
            self.policy,
            module.actor,
            prompts,
            self.sampling,
            self._stop_ids,
            group_size=group_size,
            key=key,
            times=self.meters.own,
        )

    def _score(self, rollout: Rollout) -> tuple[Tensor, Tensor, Experience]:
        """Return rewards and what is paid, both [samples], and the experience made of them."""
        collector = Collector(self.policy, rollout.samples, self._layout)
        by_name = self._scorer.score(self.policy, rollout, self._layout)
        for name, values in by_name.items() if len(by_name) > 1 else ():
            self.bag.add(f"reward/{name}", float(values.mean()))
        rewards = self._scorer.total(by_name)
        figures = collector.figures(self.sampling.temperature, with_critic=self.has_critic)
        refuse_broken_figures(figures)
        self._statistics.update(rewards)
        scores = shape_scores(rewards, rollout.stopped, self._statistics.deviation, self.score)
        experience = make_experience(rollout.samples, scores, figures, self._shaping, self._kl_coef)
        return rewards, scores, experience

    def _learn(self, step: int, experience: Experience) -> None:
        update = Update(
            self.policy,
            experience,
            self.update,
            self._layout,
            temperature=self.sampling.temperature,
            loss_kl_coef=self._kl_coef if self.advantage == "grpo" else 0.0,
            bag=self.bag,
            guard=self.guard,
        )
        key = f"{self.config.loop.seed}/{step}"
        with_actor = step >= self.update.critic_warmup_steps
        update.run(step, self.lr(step), key, with_actor=with_actor)

    def _warn(self, step: int, rollout: Rollout, scores: Tensor) -> None:
        """Count prompts that teach nothing; say what is odd, each thing once a life."""
        group_size = self.responses_per_prompt if self.advantage != "gae" else 1
        if group_size > 1:
            self._latest["flat_share"] = flat_share(scores, group_size)
        for kind, oddity in find_oddities(rollout, scores, group_size).items():
            if kind not in self._warned and self.context.rank == 0:
                LOG.warning("step %d: %s", step + 1, oddity)
            self._warned.add(kind)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Record how long a part of the step takes."""
        start = time.perf_counter()
        with heartbeat.phase(part):
            yield
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)
        self.bag.add(f"{part}_seconds", time.perf_counter() - start)

    @torch.no_grad()
    def measure(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Record mean reward, KL and length of responses to every source's held-out prompts.

        They are drawn as in training, with the same random numbers at every evaluation.
        """
        sources = {}
        for name, source in self.store.sources.items():
            if any_over_ranks(stop.requested):
                return False
            if not len(source.document_ids(held_out=True)):
                continue
            prompts = held_out_prompts(source, self.config.loop.eval_chars)
            rollout = self._roll_out(prompts, 1, (self.config.loop.seed, EVAL_STEP))
            collector = Collector(self.policy, rollout.samples, self._layout)
            by_name = self._scorer.score(self.policy, rollout, self._layout)
            rewards = self._scorer.total(by_name)
            figures = collector.figures(self.sampling.temperature, with_critic=False)
            sources[name] = count_rollout(rollout, rewards, figures) | spread(rewards)
            self._show(sinks, step, name, rollout, rewards)
        sinks.evaluate(step, sources)
        sinks.event(step, "mixture", epochs=self.loader.epochs())
        return True

    def _show(self, sinks: Sinks, step: int, name: str, rollout: Rollout, rewards: Tensor) -> None:
        """Record the distribution of the rewards and the first responses."""
        counted = count_scores({"reward": rewards.numpy()})
        sinks.plot(step, "histogram", f"Held-out rewards, {name}", **counted)
        shown = rollout.prompts[:NUM_SHOWN]
        prompts = self.tokenizer.batch_decode([p.ids for p in shown], skip_special_tokens=True)
        texts, ends = self._scorer.texts(rollout), ("cut off", "yes")
        rows = [
            {"prompt": prompt, "response": text, "ended": ends[stopped], "reward": reward}
            for prompt, text, stopped, reward in zip(
                prompts, texts, rollout.stopped.tolist(), rewards.tolist(), strict=False
            )
        ]
        sinks.table(step, f"Responses to held-out prompts, {name}", rows)
