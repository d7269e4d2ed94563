"""A plain Hugging Face folder from weights read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainer.errors import CheckpointError
from trainer.models.adapter_files import ADAPTED, NAME, WEIGHTS_NAME, file_name, scale_of
from trainer.models.merge import merge
from trainer.models.shards import open_tensors

INDEX_NAME = "model.safetensors.index.json"


class Weights:
    """The final model's weights by name: trained ones, frozen ones, adapters merged in.

    Args:
        trained: shapes of the trained parameters, by name.
        read: returns a trained parameter, fp32.
        base_folder: the model folder that frozen weights come from, if any.
        adapter: peft's settings of adapters among the trained parameters, if any.
        aliases: names that a tied model gives to a parameter it also has under another name.
        transposed: names of weights that the model stores as [in, out].
        as_trained: from name and value of a frozen weight to the one training computed with.
        buffers: what a model from scratch keeps beside its parameters.

    Raises:
        CheckpointError: adapters that cannot be merged into a weight of the same module.
    """

    def __init__(
        self,
        trained: Mapping[str, Sequence[int]],
        read: Callable[[str], Tensor],
        base_folder: Path | None,
        adapter: Mapping[str, Any] | None,
        aliases: Collection[str] = (),
        transposed: Collection[str] = (),
        as_trained: Callable[[str, Tensor], Tensor] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._read, self._adapter, self._transposed = read, adapter, transposed
        self._as_trained, self._buffers = as_trained, buffers or {}
        adapters = {name for name in trained if ".lora_" in name}
        self._trained = {n.removeprefix(ADAPTED): n for n in trained if n not in adapters}
        self._adapters = {n.removeprefix(ADAPTED) for n in adapters}
        self._base = open_folder(base_folder) if base_folder else {}
        self.shapes = {name: list(trained[full]) for name, full in self._trained.items()}
        self.shapes |= {name: list(buffer.shape) for name, buffer in self._buffers.items()}
        for name, file in self._base.items():
            if name not in aliases:  # a stored copy of a tied weight is not the trained one
                self.shapes.setdefault(name, file.get_slice(name).get_shape())
        merged = {n for name in self.shapes for n in self._adapter_names(name)}
        if lost := sorted(self._adapters - merged):
            raise CheckpointError(
                f"{len(lost)} adapters are not of linear layers and cannot be merged, for example "
                f"{lost[0]}; export merges lora_A and lora_B of linear layers"
            )

    def read(self, name: str) -> Tensor:
        """Return one parameter of the final model, fp32."""
        if name in self._trained:
            weight = self._read(self._trained[name])
        elif name in self._buffers:
            weight = self._buffers[name].float()
        else:
            weight = self._base[name].get_tensor(name).float()
            weight = self._as_trained(name, weight) if self._as_trained else weight
        down, up, magnitude = self._adapter_names(name)
        if up not in self._adapters:
            return weight
        return merge(
            weight,
            self._read(ADAPTED + down),
            self._read(ADAPTED + up),
            scale_of(self._adapter or {}, name.removesuffix(".weight")),
            self._read(ADAPTED + magnitude) if magnitude in self._adapters else None,
            transposed=name in self._transposed,
        )

    @staticmethod
    def _adapter_names(name: str) -> tuple[str, str, str]:
        """Return the names of a weight's adapter: A [rank, in], B [out, rank], DoRA's m [out]."""
        module = name.removesuffix(".weight")
        kinds = ("lora_A", "lora_B", "lora_magnitude_vector")
        down, up, magnitude = (f"{module}.{kind}.{NAME}.weight" for kind in kinds)
        return down, up, magnitude


def transposed_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights that a model stores as [in, out]."""
    layers = model.named_modules()
    return {f"{name}.weight" for name, module in layers if isinstance(module, Conv1D)}


def open_folder(folder: Path) -> dict[str, safe_open]:
    """Return the open safetensors file of every parameter in a model folder."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = open_tensors(path)
        files.update(dict.fromkeys(file.keys(), file))
    if not files:
        raise CheckpointError(
            f"model folder {folder} has no .safetensors file to read frozen weights"
        )
    return files


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Group names, in order, into shards of at most ``max_bytes`` (a larger one stands alone)."""
    shards: list[list[str]] = []
    used = max_bytes + 1
    for name, size in sizes.items():
        if used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_adapter(
    names: Iterable[str], read: Callable[[str], Tensor], folder: Path, dtype: torch.dtype
) -> int:
    """Write trained parameters as peft's ``adapter_model.safetensors``.

    Returns:
        The number of weights written.
    """
    tensors = {file_name(name): read(name).to(dtype).contiguous() for name in names}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def write_shards(
    weights: Weights,
    folder: Path,
    dtype: torch.dtype,
    max_bytes: int,
    progress: Callable[[Iterable[list[str]]], Iterable[list[str]]],
) -> int:
    """Write sharded safetensors with their index, holding one shard in memory at a time.

    Returns:
        The number of parameters written.
    """
    sizes = {n: torch.Size(s).numel() * dtype.itemsize for n, s in weights.shapes.items()}
    shards = plan_shards(sizes, max_bytes)
    index = {}
    for number, names in enumerate(progress(shards), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = "model.safetensors" if len(shards) == 1 else file
        tensors = {name: weights.read(name).to(dtype).contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        whole = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (folder / INDEX_NAME).write_text(json.dumps(whole, indent=2) + "\n")
    return sum(sizes.values()) // dtype.itemsize
