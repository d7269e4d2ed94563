"""Frozen linear layers whose weights are stored in 4 or 8 bits (QLoRA, arXiv:2305.14314).

bitsandbytes quantises and computes back; each weight is quantised as it is read, so that no rank
holds the model in full precision (transformers' own quantised loading keeps several times that in
memory on a CPU). The layers are ours: those of bitsandbytes keep further references to a weight,
for the backward pass and int8's statistics, and rearrange it for CPU inference, neither of which
survives ZeRO-3, where a parameter's storage comes and goes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from trainer.errors import ConfigError

Quantization = Literal["nf4", "int8"]
INSTALL = "pip install 'bitsandbytes>=0.48'"


def require_bitsandbytes() -> None:
    """Refuse QLoRA where bitsandbytes is not installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"peft.mode=qlora needs bitsandbytes, which is not installed: {INSTALL} (or use "
            "peft=lora, whose base takes 2 bytes a weight instead of half a byte or one)"
        )


class QuantizedLinear(nn.Linear):
    """A linear layer with a frozen, quantised weight that is computed anew at every use.

    ``weight`` is the dequantised matrix, so that whatever treats the layer as a linear one (peft's
    LoRA and DoRA) computes with what the layer computes with.

    Args:
        packed: the stored weight: NF4 ``[out * in / 2, 1]`` uint8, or int8 ``[out, in]``.
        unpack: from the stored weight to the matrix ``[out, in]``.
        shape: (out, in).
        bias: ``[out]`` or None.
    """

    def __init__(
        self,
        packed: Tensor,
        unpack: Callable[[Tensor], Tensor],
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.packed.num_weights = shape[0] * shape[1]  # two of which share an element in NF4
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._unpack = unpack

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, ``[out, in]``."""
        return self._unpack(self.packed.data)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden [..., in]`` times the weight, plus the bias: ``[..., out]``."""
        output: Tensor = _FrozenProduct.apply(hidden, self)
        return output


class _FrozenProduct(torch.autograd.Function):
    """A product that remembers the layer, not the weight: it is dequantised again for backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(hidden, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight, None


class _Unpack4bit:
    """NF4 in blocks of 64 whose scales are themselves 8-bit (double quantisation)."""

    def __init__(self, state: Any, dtype: torch.dtype) -> None:
        self.state = state
        self.state.dtype = dtype

    def __call__(self, packed: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        if self.state.absmax.device != packed.device:
            self.state.to(packed.device)
        return dequantize_4bit(packed, self.state)


class _Unpack8bit:
    """int8 with one scale a row: 127 stands for the row's largest absolute value."""

    def __init__(self, largest: Tensor, dtype: torch.dtype) -> None:
        self.largest, self.dtype = largest, dtype

    def __call__(self, packed: Tensor) -> Tensor:
        self.largest = self.largest.to(packed.device)
        return (packed * (self.largest / 127)[:, None]).to(self.dtype)


def quantize_layers(
    model: PreTrainedModel,
    stored: Mapping[str, Any],
    dtype: torch.dtype,
    kind: Quantization,
    after_each: Callable[[int], None],
) -> None:
    """Fill a freshly constructed model, quantising its linear layers one tensor at a time.

    All linear layers inside the model are quantised, the output embedding is not.

    Args:
        model: constructed without values.
        stored: parameter name → open safetensors file that holds it.
        dtype: of everything that is not quantised, and of the arithmetic.
        kind: ``nf4`` (with double quantisation) or ``int8``.
        after_each: called with the bytes that a tensor took before it was quantised.
    """
    device = (
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    )
    names = quantized_weights(model)
    for name, param in list(model.named_parameters()):
        value = stored[name].get_tensor(name)
        size = value.numel() * value.element_size()
        if name in names:
            path = name.removesuffix(".weight")
            weight = (value.T if names[name] else value).to(device)
            bias = model.get_submodule(path).bias
            model.set_submodule(path, _quantize_layer(weight, bias, dtype, kind))
            del weight
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            with torch.no_grad():  # a bias has moved into the layer that was quantised
                owner.get_parameter(name.rpartition(".")[2]).copy_(value)
        del param, value
        after_each(size)


def _quantize_layer(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, kind: Quantization
) -> QuantizedLinear:
    """Return the layer of ``weight [out, in]``."""
    packed, unpack = quantize(weight, dtype, kind)
    shape = (weight.shape[0], weight.shape[1])
    return QuantizedLinear(packed, unpack, shape, None if bias is None else bias.data)


def quantize(
    weight: Tensor, dtype: torch.dtype, kind: Quantization
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the stored form of ``weight [out, in]``, and the function that computes it back.

    Args:
        weight: in any floating dtype; it is rounded to ``dtype`` first.
        dtype: of the arithmetic.
        kind: ``nf4`` or ``int8``.
    """
    import bitsandbytes as bnb

    weight = weight.to(dtype).contiguous()
    if kind == "nf4":
        packed, state = bnb.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return packed, _Unpack4bit(state, dtype)
    packed, largest, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return packed, _Unpack8bit(largest, dtype)


def quantized_weights(model: PreTrainedModel) -> dict[str, bool]:
    """Return the weights that ``load_quantized`` quantises: name → whether stored as [in, out].

    Args:
        model: the same architecture, not quantised; on any device, also meta.
    """
    skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    return {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, skipped)
    }


def as_quantized(
    names: Mapping[str, bool], kind: Quantization, dtype: torch.dtype, name: str, weight: Tensor
) -> Tensor:
    """Return what a quantised model computes with instead of a weight, fp32.

    Args:
        names: from ``quantized_weights``; other weights come back as they are.
        kind: of the quantisation.
        dtype: in which the quantised model computed.
        name: of the weight.
        weight: its value in full precision.
    """
    if name not in names:
        return weight
    return _round_trip(weight.T, kind, dtype).T if names[name] else _round_trip(weight, kind, dtype)


def _round_trip(weight: Tensor, kind: Quantization, dtype: torch.dtype) -> Tensor:
    """Quantise ``weight [out, in]`` and compute it back, fp32."""
    packed, unpack = quantize(weight, dtype, kind)
    return unpack(packed).float()
