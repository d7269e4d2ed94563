"""The output embedding of a causal language model, with the loss fused into it.

The head stays the module that transformers and DeepSpeed know: the same parameter, under the same
name, plain logits when called as they call it. Called with labels it returns the summed loss and
never holds the logits of the whole batch. Computing the loss inside ``forward`` is what makes it
work under ZeRO-3, whose hooks hold the gathered weight only there.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from trainer.errors import ConfigError
from trainer.losses.cross_entropy import (
    IGNORE_INDEX,
    cross_entropy_sum,
    linear_cross_entropy,
    next_token_targets,
    next_token_weights,
)
from trainer.losses.token_logps import linear_logps, logps_from_logits
from trainer.models.attention import isolated_documents
from trainer.models.router import router_loss_coefficient, router_loss_sum


@dataclass(frozen=True)
class LogpsOptions:
    """How log-probabilities of targets are wanted.

    Attributes:
        temperature: of sampling, which the logits are divided by.
        with_entropy: whether the entropies of the distributions are wanted as well.
    """

    temperature: float = 1.0
    with_entropy: bool = False


class FusedHead(nn.Linear):
    """A linear output embedding without bias that can return the next-token loss."""

    num_real_rows: int

    @classmethod
    def adopt(cls, linear: nn.Linear, num_real_rows: int) -> FusedHead:
        """Make a head around the very parameter of ``linear``, so that tied weights stay tied.

        Args:
            linear: the model's output embedding; also one partitioned by ZeRO-3.
            num_real_rows: vocabulary size; rows from this one on are padding, which the loss
                leaves out of the softmax.

        Raises:
            ConfigError: when ``linear`` has a bias, or fewer rows than the vocabulary.
        """
        if linear.bias is not None:
            raise ConfigError("the output embedding has a bias, which the fused loss does not add")
        if not 0 < num_real_rows <= linear.out_features:
            raise ConfigError(
                f"num_real_rows={num_real_rows}: the output embedding has {linear.out_features} "
                "rows; give it as many as the tokenizer has tokens, or more"
            )
        head = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        head.weight = linear.weight
        head.num_real_rows = num_real_rows
        return head.train(linear.training)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        weights: Tensor | None = None,
        logps: LogpsOptions | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits; with labels the summed next-token loss, or each target's log-probability.

        Args:
            hidden: ``[batch, seq, d]`` last hidden states (any leading dimensions without labels).
            labels: ``[batch, seq]`` token ids, unshifted; ``IGNORE_INDEX`` is no target.
            weights: ``[batch, seq]`` factor of each target's loss, unshifted; None is 1.
            logps: given, each target's log-probability is returned instead of the loss.

        Returns:
            ``[..., vocab]`` logits without labels; ``[]`` sum in nats, fp32, with them; with
            ``logps`` ``[n]`` for the n targets in row-major order, fp32, and their entropies if
            asked for.
        """
        if labels is None:
            return super().forward(hidden)
        if logps is not None:
            # Only here: tokens that predict no target never reach the matrix.
            targets = next_token_targets(labels)
            chosen = targets != IGNORE_INDEX
            return linear_logps(
                hidden[chosen],
                self.weight,
                targets[chosen],
                self.num_real_rows,
                logps.temperature,
                logps.with_entropy,
            )
        token_weights = None if weights is None else next_token_weights(weights).flatten()
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            next_token_targets(labels).flatten(),
            self.num_real_rows,
            token_weights,
        )

    def extra_repr(self) -> str:
        """Name the sizes in ``print(model)``."""
        return f"{super().extra_repr()}, num_real_rows={self.num_real_rows}"


class _FixedOutput(BaseModelOutputWithPast):
    """A decoder's output; what a family expects beside the hidden states is None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Fixed(nn.Module):
    """A module that returns what it was given at construction and keeps its first input."""

    def __init__(self, output: Tensor | _FixedOutput) -> None:
        super().__init__()
        self.output = output
        self.received: Tensor | None = None

    def forward(self, *args: Tensor, **kwargs: object) -> Tensor | _FixedOutput:
        self.received = args[0] if args else None
        return self.output


def _replaced(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return ``root`` with ``module`` at ``path``, copying the containers on the way only."""
    name, _, rest = path.partition(".")
    result = copy.copy(root)
    result._modules = dict(root._modules)
    result._modules[name] = _replaced(root.get_submodule(name), rest, module) if rest else module
    return result


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


@torch.no_grad()
def supports_fused_head(model: PreTrainedModel) -> bool:
    """Find out whether the model's logits are its head's output for its last hidden states.

    Some families cap or scale the logits (Gemma-2, Granite, Cohere), rescale the hidden states
    (MiniCPM) or add a bias (Phi): the fused loss would be silently wrong. The model's own forward
    runs once with its decoder and head replaced by modules that return fixed numbers. No weight is
    touched, so parameters may be partitioned.
    """
    linear, decoder = model.get_output_embeddings(), model.get_decoder()
    if not isinstance(linear, nn.Linear) or linear.bias is not None or decoder is model:
        return False
    # Wide ranges: a soft cap moves small logits by less than rounding.
    hidden = torch.linspace(-50, 50, 2 * linear.in_features).view(1, 2, -1)
    logits = torch.linspace(-100, 100, 2 * linear.out_features).view(1, 2, -1)
    head = _Fixed(logits)
    probe = _replaced(model, _path_of(model, linear), head)
    body = _Fixed(_FixedOutput(last_hidden_state=hidden))
    probe = _replaced(probe, _path_of(model, decoder), body)
    output = probe(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    same_hidden = head.received is not None and torch.equal(head.received, hidden)
    return same_hidden and torch.equal(output.logits, logits)


def install_fused_head(model: PreTrainedModel, num_real_rows: int | None = None) -> None:
    """Put a ``FusedHead`` in the place of the model's output embedding.

    To be called before adapters and the engine wrap the model. Names, parameters, tying and the
    config stay as they are.

    Args:
        model: a transformers causal language model, changed in place.
        num_real_rows: number of tokens the tokenizer has, when the matrix is padded beyond it;
            None counts every row.

    Raises:
        ConfigError: when the family does more between decoder and logits than the head's product,
            or ``num_real_rows`` exceeds the matrix.
    """
    if not supports_fused_head(model):
        raise ConfigError(
            f"model architecture {type(model).__name__} scales, caps or shifts its logits, which "
            "the fused loss does not; leave its own head in place"
        )
    linear = model.get_output_embeddings()
    rows = linear.out_features if num_real_rows is None else num_real_rows
    model.set_output_embeddings(FusedHead.adopt(linear, rows))


def causal_lm_logps(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    num_real_rows: int | None = None,
    options: LogpsOptions = LogpsOptions(),
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the log-probability of each target of a batch.

    Args:
        model: a causal language model, or one wrapped by peft.
        input_ids: ``[batch, seq]``.
        position_ids: ``[batch, seq]``, starting at 0 with each document.
        labels: ``[batch, seq]`` token ids, unshifted; ``IGNORE_INDEX`` is no target.
        num_real_rows: rows of the vocabulary that are tokens, for a head that is not fused; None
            counts every row.
        options: temperature, entropy.

    Returns:
        ``[n]`` nats, fp32, for the n targets in row-major order; or these and ``[n]`` entropies.
    """
    head = model.get_output_embeddings()
    fused = isinstance(head, FusedHead)
    with isolated_documents(model, position_ids) as mask:
        forward = model.get_decoder() if fused else model
        output = forward(
            input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
        )
    if fused:
        return head(output.last_hidden_state, labels, logps=options)
    targets = next_token_targets(labels)
    chosen = targets != IGNORE_INDEX
    return logps_from_logits(
        output.logits[chosen],
        targets[chosen],
        num_real_rows,
        options.temperature,
        options.with_entropy,
    )


def causal_lm_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    num_real_rows: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the summed next-token loss of a batch.

    The cache is off and no two-dimensional mask is passed: either would silently join packed
    documents, which begin where ``position_ids`` start again. A model whose head is not fused
    computes plain logits. While a mixture of experts is trained, its router loss is added.

    Args:
        model: a causal language model, or one wrapped by peft.
        input_ids: ``[batch, seq]``.
        position_ids: ``[batch, seq]``, starting at 0 with each document.
        labels: ``[batch, seq]`` token ids, unshifted; ``IGNORE_INDEX`` is no target.
        num_real_rows: rows of the vocabulary that are tokens, for a head that is not fused; None
            counts every row.
        weights: ``[batch, seq]`` factor of each target's loss, unshifted; None is 1.

    Returns:
        ``[]`` sum in nats, fp32.
    """
    inputs = {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": None,
        "use_cache": False,
    }
    balances = model.training and router_loss_coefficient(model.config) > 0
    if balances:
        inputs["output_router_logits"] = True
    head = model.get_output_embeddings()
    fused = isinstance(head, FusedHead)
    with isolated_documents(model, position_ids) as mask:
        inputs["attention_mask"] = mask
        output = model.get_decoder()(**inputs) if fused else model(**inputs)
    if fused:
        loss: Tensor = head(output.last_hidden_state, labels, weights)
    else:
        logits = output.logits[..., :num_real_rows]
        token_weights = None if weights is None else next_token_weights(weights)
        loss = cross_entropy_sum(logits, next_token_targets(labels), token_weights)
    if balances:
        loss = loss + router_loss_sum(output.router_logits, model.config, labels, weights)
    return loss
