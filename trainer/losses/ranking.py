"""The loss of a reward model that ranks two answers to the same prompt."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def ranking_losses(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """Return each pair's loss, -log σ(chosen - rejected - margin) + centering·(chosen + rejected)².

    The first term is the likelihood of Bradley and Terry (Biometrika 39, 1952) with the margin of
    Llama 2 (eq. 2, arXiv:2307.09288). It knows differences only; the second one draws the mean of
    a pair's scores to 0 (Eisenstein et al., eq. 2, arXiv:2312.09244).

    Args:
        chosen: ``[n]`` scores of the better answers.
        rejected: ``[n]`` scores of the others.
        margins: ``[n]`` by how much the better one is known to be better; None is 0.
        centering: coefficient of the second term, 0.01 in the paper.

    Returns:
        ``[n]`` losses in nats, of the dtype of the scores; their sum is divided once by the global
        number of pairs.
    """
    advance = chosen - rejected
    if margins is not None:
        advance = advance - margins
    losses = softplus(-advance)  # -log σ(x), also where σ(x) underflows
    if centering:
        losses = losses + centering * (chosen + rejected) ** 2
    return losses
