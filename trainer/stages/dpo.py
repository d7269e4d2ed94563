"""Preference learning without a reward model: DPO and its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.load import load_tokenizer
from trainer.config import RunConfig, nearest
from trainer.data.batches.collate import Batch
from trainer.data.batches.mismatched import MismatchedAnswers
from trainer.data.chats.chat import resolve_template
from trainer.data.prepared.prepare import open_store
from trainer.engine.collectives import any_over_ranks, sum_over_ranks, sum_tensor
from trainer.engine.engine import Engine
from trainer.inputs import tokenizer_path
from trainer.losses.objective import Answers, Objective
from trainer.losses.preference import LOSSES, kl_baseline
from trainer.metrics.pairwise import count_scores, describe_pairs, wilson_interval
from trainer.metrics.sinks import Sinks
from trainer.policy import build_preference_policy
from trainer.preference_data import check_labels, refuse_lone_answers
from trainer.reference import (
    ComputedReference,
    Reference,
    ReferenceKind,
    choose_reference,
    logps_of,
    open_caches,
    why_not_adapter_off,
)
from trainer.reference_cache import COLUMNS
from trainer.sample_answers import choose_questions, write_answers
from trainer.sequence_logps import sum_over_sequences
from trainer.signals import StopRequest
from trainer.stage import Context
from trainer.store_stage import StoreStage

LOW_ADAPTER_LR = 2e-6  # a tenth of what adapters of 7B models are usually tuned with


@dataclass
class Dpo(StoreStage):
    """Hyperparameters of the stage; the rest are the config's groups."""

    name: ClassVar[str] = "dpo"
    content: ClassVar[str] = "preferences"

    objective: dict[str, Any] = field(default_factory=dict)  # name and hyperparameters of the loss
    nll_weight: float = 0.0  # of the chosen answers' own loss, added to that of pairs
    reference: ReferenceKind = "auto"
    sample_prompts: list[str] = field(default_factory=list)  # questions; none = held-out ones
    sample_tokens: int = 128  # tokens of each sampled answer; 0 = no samples

    def check(self, config: RunConfig) -> list[str]:
        """Return what is out of range, and what contradicts the model or the data."""
        problems = super().check(config) + check_objective(self.objective)
        for key, value in (
            ("sample_tokens", self.sample_tokens),
            ("nll_weight", self.nll_weight),
        ):
            if value < 0:
                problems.append(f"stage.{key}={value}: expected 0 or more")
        if config.model.path is None:
            problems.append(
                "model.path is null: preferences tune a model that can answer already; give the "
                "folder of one that stage=sft made"
            )
        if self.objective.get("name") in LOSSES:
            problems += self._check_reference(config)
        return problems

    def _check_reference(self, config: RunConfig) -> list[str]:
        name, problems = self.objective["name"], []
        loss, reason = LOSSES[name], why_not_adapter_off(config.peft)
        if self.reference != "auto" and not loss.uses_reference:
            problems.append(
                f"stage.reference={self.reference} has no effect: loss={name} compares with no "
                "reference; leave it out"
            )
        elif self.reference == "adapter_off" and reason:
            problems.append(
                f"stage.reference=adapter_off, but {reason}; use stage.reference=cached"
            )
        if self.nll_weight and (name == "orpo" or not loss.is_paired):
            why = "has that term already" if loss.is_paired else "knows no chosen answer of a pair"
            problems.append(f"stage.nll_weight={self.nll_weight:g}: loss={name} {why}; use 0")
        return problems

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """Settle the run's length; refuse data that the loss cannot learn from."""
        config, remarks = super().settle(config)
        path, loss = tokenizer_path(config), LOSSES[self.objective["name"]]
        assert path is not None  # ``check`` refuses it
        store = open_store(config.data, path)
        if loss.is_paired:
            refuse_lone_answers(store, f"loss={self.objective['name']}")
        else:
            weights = [self.objective[f"{side}_weight"] for side in ("desirable", "undesirable")]
            remarks += check_labels(store, config.data, *weights)
        if config.peft.mode in ("lora", "qlora") and config.optim.lr < LOW_ADAPTER_LR:
            remarks.append(
                f"optim.lr={config.optim.lr:g} is little for peft.mode={config.peft.mode}: "
                "adapters usually learn preferences with 5e-6 to 5e-5"
            )
        return config, remarks

    def load_tokenizer(self, path: str) -> Any:
        """Return the tokenizer with the chat template of the answers."""
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template = resolve_template(tokenizer, self.config.data.template)
        return tokenizer

    def build(self, context: Context) -> tuple[Engine, dict[str, Any]]:
        """Return the engine around the policy, and its reference unless that is cached."""
        self._kind = None
        if LOSSES[self.objective["name"]].uses_reference:
            self._kind = choose_reference(self.reference, context.config.peft)
        streaming = self._kind in ("adapter_off", "streaming")
        return build_preference_policy(context, self.tokenizer, streaming)

    def setup(self, context: Context, sinks_step: int) -> Sinks:
        """Set up data and model; compute what the reference says, unless it is known."""
        sinks = super().setup(context, sinks_step)
        settings = {key: value for key, value in self.objective.items() if key != "name"}
        self._objective = Objective(self.objective["name"], settings, self.nll_weight)
        data, device = self.config.data, self.policy.device
        self._mismatched = MismatchedAnswers(
            list(self.store.sources.values()),
            max_length=data.max_length,
            packing=data.packing,
            pad_token_id=self.store.pad_token_id,
        )
        self._baseline = torch.zeros((), device=device)
        self._reference: Reference | None = None
        figures: dict[str, Any] = {}
        if self._kind == "cached":
            with self.meters.pause():
                is_unpaired = not self._objective.kind.is_paired
                found = open_caches(context, self.store, self.policy, is_unpaired)
                self._reference, figures = found
        elif self._kind:
            self._reference = ComputedReference(self.policy)
        if self._kind:
            sinks.event(sinks_step, "reference", kind=self._kind, **figures)
        return sinks

    def train_step(self, step: int, batches: Iterator[Batch]) -> int:
        """Do one optimizer step; KTO measures its baseline on the whole global batch first."""
        if self._objective.kind.is_paired:
            return super().train_step(step, batches)
        window = list(islice(batches, self.policy.grad_accum_steps))
        self._baseline = self._measure_baseline(window)
        return super().train_step(step, iter(window))

    @torch.no_grad()
    def _measure_baseline(self, window: list[Batch]) -> Tensor:
        """Return how much likelier than the reference the policy finds answers to other prompts."""
        total, count = 0.0, 0
        for batch in window:
            answers = self._weigh(self._mismatched.of(batch))
            total += float((answers.policy - answers.reference).double().sum())
            count += len(answers.policy)
        sums = torch.tensor(sum_over_ranks([total, count]), dtype=torch.float64)
        return kl_baseline(*sums).float().to(self.policy.device)

    def num_targets(self, batch: Batch) -> float:
        """Return the number of pairs, or of answers where the loss looks at each alone."""
        assert batch.examples is not None
        return float(self._objective.num_losses(batch.examples.sides))

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss of the batch's pairs or answers."""
        answers = self._weigh(batch)
        for name, (total, count) in self._objective.figures(answers, self._baseline).items():
            self.bag.add_ratio(name, total, count)
        return self._objective.losses(answers, self._baseline).sum()

    def _weigh(self, batch: Batch) -> Answers:
        """Return what policy and reference say of the answers of a batch."""
        assert batch.examples is not None
        logps = sum_over_sequences(batch, logps_of(self.policy, "actor"), self.policy.device)
        reference = torch.zeros_like(logps.sums)
        if self._reference is not None:
            reference = self._reference.logps(batch)
        sides = batch.examples.sides.to(self.policy.device)
        return Answers(logps.sums, reference, logps.lengths, sides)

    def measure(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Record the training's figures of every source's held-out pairs, and sampled answers."""
        sources = {}
        for name, source in self.store.sources.items():
            if len(source.document_ids(held_out=True)):
                table = self._weigh_held_out(name, stop)
                if table is None:
                    return False
                sources[name], rewards = self._describe(table)
                counted = count_scores(rewards)
                sinks.plot(step, "histogram", f"Held-out rewards, {name}", **counted)
        sinks.evaluate(step, sources)
        shares = {"fill_share": self.loader.fill_shares()} if self.config.data.packing else {}
        sinks.event(step, "mixture", epochs=self.loader.epochs(), **shares)
        questions = choose_questions(self.config, self.tokenizer, self.store, self.sample_prompts)
        policy: Any = self.policy.module
        asked = (self.tokenizer, questions, self.sample_tokens)
        write_answers(sinks, step, self.policy, policy.actor, *asked)
        return True

    @torch.no_grad()
    def _weigh_held_out(self, name: str, stop: StopRequest) -> Tensor | None:
        """Return policy, reference and length of each held-out document's sequences, on all ranks.

        Returns:
            ``[documents, 3, 3]`` float64: chosen, rejected and mismatched answer, by policy,
            reference and length; a length of 0 where there is no such answer. None when all ranks
            agreed to stop.
        """
        loader, device = self.held_out(name), self.policy.device
        places = {document: place for place, document in enumerate(loader.documents.tolist())}
        table = torch.zeros(len(places), len(COLUMNS), 3, dtype=torch.float64, device=device)
        for batch in loader:
            if any_over_ranks(stop.requested):
                return None
            for part in [batch] if self._objective.kind.is_paired else [
                batch, self._mismatched.of(batch)
            ]:  # fmt: skip
                assert part.examples is not None
                answers = self._weigh(part)
                rows = [places[document] for document in part.examples.documents.tolist()]
                columns = [COLUMNS[side] for side in part.examples.sides.tolist()]
                table[rows, columns] = torch.stack(answers[:3], -1).double()
        return sum_tensor(table)

    def _describe(self, table: Tensor) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        """Return the figures of a source, and its rewards by kind of answer."""
        policy, reference, lengths = table.unbind(-1)
        apart = (policy - reference)[:, 2][lengths[:, 2] > 0]
        baseline = kl_baseline(apart.sum(), torch.tensor(len(apart)))
        there = lengths[:, :2] > 0
        sides = torch.tensor([1, -1], device=table.device).expand_as(there)
        answers = Answers(*(values[:, :2][there] for values in (policy, reference, lengths, sides)))
        losses = self._objective.losses(answers, baseline)
        sums = self._objective.figures(answers, baseline)
        figures = {"loss": float(losses.mean()), "num_losses": len(losses)}
        figures |= {name: float(total / count) for name, (total, count) in sums.items()}
        rewards, is_chosen = self._objective.rewards(answers).cpu().numpy(), answers.sides > 0
        by_side = {"chosen": rewards[is_chosen.cpu()], "rejected": rewards[~is_chosen.cpu()]}
        low, high = wilson_interval(figures["accuracy"] * len(losses), len(losses))
        figures |= {"accuracy_low": low, "accuracy_high": high}
        if self._objective.kind.is_paired:
            figures = describe_pairs(by_side["chosen"], by_side["rejected"]) | figures
        return figures, by_side


def check_objective(objective: dict[str, Any]) -> list[str]:
    """Return what is wrong with the name or the hyperparameters of a loss."""
    name = objective.get("name")
    if name not in LOSSES:
        known = "|".join(LOSSES)
        return [f"stage.objective.name={name!r}: expected {known}{nearest(str(name), LOSSES)}"]
    given, problems = {k: v for k, v in objective.items() if k != "name"}, []
    wanted = LOSSES[name].hyperparameters
    for key in given:
        if key not in wanted:
            problems.append(
                f"stage.objective.{key} is no hyperparameter of loss={name}, which has "
                f"{', '.join(wanted)}{nearest(key, wanted)}"
            )
    for key in wanted:
        value, where = given.get(key), f"stage.objective.{key}"
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            problems.append(f"{where}={value!r}: loss={name} needs a number")
        elif key == "label_smoothing" and not 0 <= value < 0.5:
            problems.append(f"{where}={value:g}: expected 0 or more and less than 0.5")
        elif key == "beta" and value <= 0:
            problems.append(f"{where}={value:g}: expected more than 0")
        elif value < 0:
            problems.append(f"{where}={value:g}: expected 0 or more")
    return problems
