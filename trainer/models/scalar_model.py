"""A decoder with one number for each position: a reward model, or a critic.

It is transformers' one-label ``*ForSequenceClassification`` of the family, so that the exported
folder is one that everybody loads. Here the numbers are computed at chosen positions of packed
rows; transformers computes them at the last token that is not padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from tokenizer.load import safetensors_header
from trainer.config import ModelConfig
from trainer.errors import ConfigError
from trainer.models.attention import isolated_documents, use_document_attention
from trainer.models.load import Made, make_config
from trainer.models.router import router_loss_coefficient, router_loss_mean

HEAD = "score"  # the head's name in transformers' classifiers of decoders
HEAD_WEIGHT = f"{HEAD}.weight"
STATISTICS = ("reward_mean", "reward_std")  # in config.json of an exported reward model


class ScoreHead(nn.Linear):
    """One output without bias, computed in fp32: low precision would tie close answers."""

    @classmethod
    def adopt(cls, linear: nn.Linear) -> ScoreHead:
        """Make a head around the very parameter of ``linear``; also one split by ZeRO-3."""
        head = cls(linear.in_features, 1, bias=False, device="meta")
        head.weight = linear.weight
        return head.train(linear.training)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[n]`` fp32 (fp64 for fp64) from ``hidden [n, d]``."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return nn.functional.linear(hidden.to(dtype), self.weight.to(dtype)).squeeze(-1)


class ScalarModel(nn.Module):
    """Wraps a one-label sequence classifier (or a peft one).

    Args:
        decoder: the classifier.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        use_document_attention(decoder)
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        selected: Tensor,
        with_router_loss: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the score at each selected position.

        Args:
            input_ids: ``[rows, length]``.
            position_ids: ``[rows, length]``, starting at 0 with each document.
            selected: ``[n]`` positions in the flattened batch (row * length + place).
            with_router_loss: also return the router loss of a mixture of experts.

        Returns:
            ``[n]`` fp32; or these and ``[]`` the load-balancing loss times its coefficient, a mean
            over the tokens up to the last selected one of each row; 0 for other models.
        """
        return score(
            self.decoder, self.decoder.score, input_ids, position_ids, selected, with_router_loss
        )


def score(
    model: PreTrainedModel,
    head: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    selected: Tensor,
    with_router_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return a head's output for the last hidden states of a model's decoder.

    Args:
        model: any model around a decoder, or one wrapped by peft.
        head: from ``[n, d]`` to ``[n]``.
        input_ids: ``[rows, length]``.
        position_ids: ``[rows, length]``.
        selected: ``[n]``.
        with_router_loss: as in ``ScalarModel.forward``, like the result.
    """
    balances = with_router_loss and router_loss_coefficient(model.config) > 0
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    inputs |= {"output_router_logits": True} if balances else {}
    with isolated_documents(model, position_ids) as mask:
        output = model.get_decoder()(**inputs, attention_mask=mask, use_cache=False)
    scores: Tensor = head(output.last_hidden_state.flatten(0, 1)[selected])
    if not with_router_loss:
        return scores
    if not balances:
        return scores, scores.new_zeros(())
    chosen = torch.zeros_like(input_ids, dtype=torch.bool)
    chosen.view(-1)[selected] = True
    return scores, router_loss_mean(output.router_logits, model.config, chosen)


def scalar_config(
    model: ModelConfig, num_tokens: int, special_ids: dict[str, Any]
) -> PretrainedConfig:
    """Return the transformers config of a one-label classifier.

    Args:
        model: the model group: a causal language model, or a classifier with one label.
        num_tokens: as for ``make_config``, like the next.
        special_ids: bos, eos and pad ids for a model from scratch.

    Raises:
        ConfigError: the family has no classifier in transformers, or the folder holds one with
            more labels.
    """
    config = make_config(model, num_tokens, special_ids)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ConfigError(
            f"model.path={model.path}: transformers has no sequence classifier for model_type="
            f"{config.model_type}, so there is no reward model or critic of this family; "
            "docs/models.md lists the families that have one"
        )
    if model.path is not None and (labels := stored_labels(Path(model.path))) not in (None, 1):
        raise ConfigError(
            f"model.path={model.path} is a classifier with {labels} labels; a reward model has "
            "one: give a language model or a classifier with num_labels=1"
        )
    config.num_labels = 1
    return config


def stored_labels(folder: Path) -> int | None:
    """Return how many labels the classifier in a folder has, None for a language model."""
    for path in sorted(folder.glob("*.safetensors")):
        entry = safetensors_header(path).get(HEAD_WEIGHT)
        if entry:
            return int(entry["shape"][0])
    return None


def made_head(
    model: ModelConfig, config: PretrainedConfig, seed: int, *, zero: bool = False
) -> dict[str, Made]:
    """Return the head's first weight, for a model that brings none.

    A reward head begins at N(0, 1 / (d + 1)) (arXiv:2009.01325), which keeps first scores near 1.
    A value head begins at 0: a critic that knows nothing predicts no difference, and its first
    errors do not disturb the advantages.

    Args:
        model: the model group.
        config: from ``scalar_config``.
        seed: of the numbers, which are equal on every rank and ZeRO stage.
        zero: whether it begins at 0.
    """
    if model.path is not None and stored_labels(Path(model.path)) is not None:
        return {}
    width = _width(config)

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, width, generator=generator) / (width + 1) ** 0.5
        return weight * 0 if zero else weight

    return {HEAD_WEIGHT: Made(make)}


def new_value_head(config: PretrainedConfig, dtype: torch.dtype) -> ScoreHead:
    """Return a value head at 0 for a backbone that another model brings."""
    head = ScoreHead(_width(config), 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    return head


def _width(config: PretrainedConfig) -> int:
    """Return the width of the last hidden states."""
    if config.model_type == "opt":
        return int(config.word_embed_proj_dim)
    return int(config.get_text_config().hidden_size)


def install_score_head(model: PreTrainedModel) -> None:
    """Put a ``ScoreHead`` in the place of a classifier's own; name and parameter stay."""
    model.score = ScoreHead.adopt(model.score)


def statistics_config(statistics: Mapping[str, float] | None) -> dict[str, float]:
    """Return the entries of config.json that ``reward_statistics`` reads.

    Args:
        statistics: ``mean`` and ``std`` of held-out scores; None where none were computed.
    """
    if statistics is None:
        return {}
    return dict(zip(STATISTICS, (statistics["mean"], statistics["std"]), strict=True))


def reward_statistics(folder: str | Path) -> tuple[float, float] | None:
    """Return mean and standard deviation of a reward model's scores, if its folder knows them."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if any(key not in config for key in STATISTICS):
        return None
    mean, std = (float(config[key]) for key in STATISTICS)
    return mean, std


SCALAR = AutoModelForSequenceClassification
