"""Names under which a model folder holds a model's parameters, where they differ."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tokenizer.load import safetensors_header
from trainer.models.adapter_files import ADAPTED


def superseded_names(model: PreTrainedModel, folder: Path, trained: Iterable[str]) -> set[str]:
    """Return what a folder holds of trained parameters under other names than the model's.

    Transformers renames and joins tensors while it loads some families: each expert's matrices of
    a Mixtral become one parameter of a layer. Beside the trained parameter they would be stale.

    Args:
        model: the architecture, on any device.
        folder: the model folder.
        trained: names of trained parameters, also with peft's prefix.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    own, wanted = model.state_dict(), {name.removeprefix(ADAPTED) for name in trained}
    superseded = set()
    for path in sorted(folder.glob("*.safetensors")):
        for name in safetensors_header(path).keys() - own.keys():
            becomes, _ = rename_source_key(
                name, renamings, converters, model.base_model_prefix, own
            )
            if becomes in wanted:
                superseded.add(name)
    return superseded
