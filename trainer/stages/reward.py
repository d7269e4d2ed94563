"""A reward model: a score for an answer, learnt from pairs of which one is preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenizer.load import load_tokenizer
from trainer.config import RunConfig
from trainer.data.batches.collate import Batch, Examples
from trainer.data.chats.chat import resolve_template
from trainer.data.prepared.prepare import open_store
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.engine.collectives import any_over_ranks, sum_tensor
from trainer.engine.engine import Engine
from trainer.inputs import tokenizer_path
from trainer.losses.ranking import ranking_losses
from trainer.metrics.pairwise import calibrate, count_scores, describe_pairs
from trainer.metrics.sinks import Sinks
from trainer.policy import build_scalar
from trainer.preference_data import refuse_lone_answers
from trainer.signals import StopRequest
from trainer.stage import Context
from trainer.store_stage import StoreStage

NUM_SHOWN = 3  # pairs of the highest and of the lowest margin in the report


@dataclass
class Reward(StoreStage):
    """Hyperparameters of the stage; the rest are the config's groups."""

    name: ClassVar[str] = "reward"
    content: ClassVar[str] = "preferences"

    use_margin: bool = False  # demand the margins that the data gives
    centering: float = 0.01  # how strongly a pair's scores are drawn to 0; 0 = not at all

    def check(self, config: RunConfig) -> list[str]:
        """Return what is out of range, and what contradicts the model or the data."""
        problems = super().check(config)
        if self.centering < 0:
            problems.append(f"stage.centering={self.centering}: expected 0 or more")
        return problems

    def settle(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """Settle the run's length; refuse answers without a pair, say what margins come to."""
        config, remarks = super().settle(config)
        path = tokenizer_path(config)
        assert path is not None  # ``check`` refuses it
        store = open_store(config.data, path)
        refuse_lone_answers(store, "a reward model")
        if remark := self._compare_margins(store):
            remarks.append(remark)
        return config, remarks

    def _compare_margins(self, store: TokenStore) -> str:
        given = [name for name, source in store.sources.items() if np.any(source.margins)]
        if self.use_margin and not given:
            return "stage.use_margin=true changes nothing: no source of data.sources gives margins"
        if given and not self.use_margin:
            return (
                f"the margins in data.sources.{', '.join(given)} are not used; "
                "stage.use_margin=true demands them of the scores"
            )
        return ""

    def load_tokenizer(self, path: str) -> Any:
        """Return the tokenizer with the chat template of the scored dialogues."""
        tokenizer = load_tokenizer(path)
        tokenizer.chat_template = resolve_template(tokenizer, self.config.data.template)
        return tokenizer

    def build(self, context: Context) -> tuple[Engine, dict[str, Any]]:
        """Return the engine around a model with one output, and what its work is counted by."""
        engine, model_config = build_scalar(context, self.tokenizer)
        return engine, model_config | {"vocab_size": 1}  # the rows of its head

    def batches(self, state: dict[str, Any] | None) -> Any:
        """Yield this rank's micro-batches from where ``state`` left off."""
        self._reward_stats = state["reward_stats"] if state else None
        return super().batches(state)

    def state(self) -> dict[str, Any]:
        """Return what resumes, and mean and deviation of the last evaluation's rewards."""
        return super().state() | {"reward_stats": self._reward_stats}

    def num_targets(self, batch: Batch) -> float:
        """Return the number of pairs."""
        return float(examples_of(batch).num_pairs)

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the score of each sequence at its answer's end, and the router's loss.

        Returns:
            ``[n]`` fp32, and ``[]`` a mean over tokens, 0 unless the model mixes experts.
        """
        examples, device = examples_of(batch), self.policy.device
        selected = examples.rows * batch.input_ids.shape[1] + answer_ends(batch)
        inputs = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "selected": selected,
        }
        inputs = {k: v.to(device, non_blocking=True) for k, v in inputs.items()}
        scores, router_loss = self.policy(**inputs, with_router_loss=True)
        return scores, router_loss

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed ranking loss of the batch's pairs."""
        examples, (scores, router_loss) = examples_of(batch), self.score(batch)
        is_chosen = examples.sides > 0  # the two sides of the pairs are in the same order
        chosen, rejected = scores[is_chosen], scores[~is_chosen]
        margins = examples.margins[is_chosen].to(scores) if self.use_margin else None
        num = len(chosen)
        with torch.no_grad():
            self.bag.add_ratio("accuracy", (chosen > rejected).sum(), num)
            self.bag.add_ratio("margin", (chosen - rejected).sum(), num)
            self.bag.add_ratio("chosen_reward", chosen.sum(), num)
            self.bag.add_ratio("rejected_reward", rejected.sum(), num)
        losses = ranking_losses(chosen, rejected, margins, self.centering)
        return losses.sum() + router_loss * num

    def measure(self, sinks: Sinks, step: int, stop: StopRequest) -> bool:
        """Record accuracy, calibration and distribution of every source's held-out pairs."""
        sources, everything = {}, []
        for name, source in self.store.sources.items():
            if not len(source.document_ids(held_out=True)):
                continue
            found = self._score_held_out(name, stop)
            if found is None:
                return False
            documents, scores = found
            everything.append(scores)
            sources[name] = self._describe(source, documents, scores)
            self._draw(sinks, step, name, documents, scores)
        if everything:
            scores = np.concatenate(everything)
            self._reward_stats = {
                "mean": float(scores.mean()), "std": float(scores.std()), "num": scores.size
            }  # fmt: skip
        sinks.evaluate(step, sources)
        shares = {"fill_share": self.loader.fill_shares()} if self.config.data.packing else {}
        sinks.event(step, "mixture", epochs=self.loader.epochs(), **shares)
        return True

    @torch.no_grad()
    def _score_held_out(
        self, name: str, stop: StopRequest
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
        """Return held-out documents [n] and the scores [n, 2] of their chosen and rejected answer.

        None when all ranks agreed to stop.
        """
        loader = self.held_out(name)
        places = {document: place for place, document in enumerate(loader.documents.tolist())}
        scores = torch.zeros(len(places), 2, dtype=torch.float64, device=self.policy.device)
        for batch in loader:
            if any_over_ranks(stop.requested):
                return None
            examples = examples_of(batch)
            rows = torch.tensor([places[d] for d in examples.documents.tolist()], dtype=torch.long)
            columns = (examples.sides < 0).long()
            scores[rows.to(scores.device), columns.to(scores.device)] = self.score(batch)[
                0
            ].double()
        return loader.documents, sum_tensor(scores).cpu().numpy()

    def _describe(
        self, source: SourceStore, documents: NDArray[np.int64], scores: NDArray[np.float64]
    ) -> dict[str, float]:
        """Return the figures of a source, its loss as in training."""
        assert source.margins is not None
        margins = torch.from_numpy(source.margins[documents]).double() if self.use_margin else None
        chosen, rejected = torch.from_numpy(scores).unbind(1)
        losses = ranking_losses(chosen, rejected, margins, self.centering)
        return {"loss": float(losses.mean()), **describe_pairs(scores[:, 0], scores[:, 1])}

    def _draw(
        self,
        sinks: Sinks,
        step: int,
        name: str,
        documents: NDArray[np.int64],
        scores: NDArray[np.float64],
    ) -> None:
        """Record distribution, calibration and the pairs that the model tells apart most, least."""
        chosen, rejected = scores.T
        counted = count_scores({"chosen": chosen, "rejected": rejected})
        sinks.plot(step, "histogram", f"Held-out rewards, {name}", **counted)
        bins = calibrate(chosen, rejected)
        sinks.plot(step, "calibration", f"Right how often, by confidence, {name}", bins=bins)
        order = np.argsort(rejected - chosen, kind="stable")
        shown = dict.fromkeys([*order[:NUM_SHOWN].tolist(), *order[-NUM_SHOWN:].tolist()])
        rows = [
            {**self._read_pair(self.store.sources[name], documents[i]), "margin": c - r,
             "chosen reward": c, "rejected reward": r}
            for i, (c, r) in ((i, scores[i].tolist()) for i in shown)
        ]  # fmt: skip
        sinks.table(step, f"Highest and lowest margins, {name}", rows)

    def _read_pair(self, source: SourceStore, document: int) -> dict[str, str]:
        """Return what was asked last and both answers, as texts."""
        assert source.first_lengths is not None
        tokens, weights = source.document(document), source.document_weights(document)
        assert weights is not None
        first = int(source.first_lengths[document])
        prompt = tokens[: int(np.argmax(weights > 0))]
        answers = [tokens[span][weights[span] > 0] for span in (np.s_[:first], np.s_[first:])]
        texts = self._decode([prompt, *answers])
        return dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))

    def _decode(self, sequences: Sequence[NDArray[Any]]) -> list[str]:
        return [
            self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
            for ids in sequences
        ]


def examples_of(batch: Batch) -> Examples:
    """Return where the batch's sequences are; a store of preferences always says so."""
    assert batch.examples is not None
    return batch.examples


def answer_ends(batch: Batch) -> Tensor:
    """Return each sequence's place in its row of the last token that the answer consists of.

    That is its end token where the template has one. What a template puts behind it, a line break
    say, no model writes, so a score must not stand there. -> [n] int64
    """
    examples, weights = examples_of(batch), batch.weights
    if weights is None:  # rows without pairs: an evaluation has one too few for this rank
        assert not len(examples.rows)
        return torch.zeros(0, dtype=torch.int64)
    spans = zip(
        *(t.tolist() for t in (examples.rows, examples.starts, examples.stops)), strict=True
    )
    ends = [start + int(weights[row, start:stop].nonzero()[-1]) for row, start, stop in spans]
    return torch.tensor(ends, dtype=torch.int64)
