"""Print TRL's preference losses of the pairs on standard input; run by a Python that has TRL."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import trl.import_utils as import_utils

# With transformers 5, TRL 0.24 takes a (found, version) pair for "found", and imports what is not.
for name, value in list(vars(import_utils).items()):
    if name.endswith("_available") and isinstance(value, tuple):
        setattr(import_utils, name, value[0])

from trl.trainer.cpo_trainer import CPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402
from trl.trainer.orpo_trainer import ORPOTrainer  # noqa: E402


def trainer(**settings: Any) -> SimpleNamespace:
    """Return what the trainers' loss methods read of themselves."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda tensor: tensor)
    fixed = {"reference_free": False, "f_divergence_type": None, "f_divergence_params": None}
    return SimpleNamespace(accelerator=accelerator, **fixed, **settings)


def main() -> None:
    given = json.load(sys.stdin)
    values = {name: torch.tensor(value, dtype=torch.float64) for name, value in given.items()}
    names = ("chosen", "rejected", "reference_chosen", "reference_rejected")
    sums = [values[name] for name in names]
    lengths = [values["chosen_lengths"], values["rejected_lengths"]]
    means = [each / length for each, length in zip(sums, lengths * 2, strict=True)]
    losses = {}
    for name, kind, smoothing in (
        ("sigmoid", "sigmoid", 0.0),
        ("cdpo", "sigmoid", 0.1),
        ("robust", "robust", 0.1),
        ("hinge", "hinge", 0.0),
    ):
        settings = trainer(beta=0.3, label_smoothing=smoothing)
        losses[name] = DPOTrainer.dpo_loss(settings, *sums, kind)[0]
    settings = trainer(beta=0.3, label_smoothing=0.0)
    losses["ipo"] = DPOTrainer.dpo_loss(settings, *means, "ipo")[0]
    settings = trainer(beta=2.0, label_smoothing=0.0, simpo_gamma=0.5, loss_type="simpo", alpha=0.0)
    losses["simpo"] = CPOTrainer.cpo_loss(settings, *means[:2])[0]
    # Its trainer adds the NLL to the loss and takes what this method returns away.
    losses["orpo"] = -means[0] - ORPOTrainer.odds_ratio_loss(trainer(beta=0.2), *means[:2])[0]
    settings = trainer(
        beta=0.3, desirable_weight=1.2, undesirable_weight=0.8, calculate_KL=True, loss_type="kto"
    )
    mismatched = values["mismatched"], values["reference_mismatched"]
    losses["kto"] = KTOTrainer.kto_loss(
        settings, *sums[:2], mismatched[0], *sums[2:], mismatched[1]
    )[0]
    print(json.dumps({name: loss.tolist() for name, loss in losses.items()}))


if __name__ == "__main__":
    main()
