"""Frozen linear layers whose weights are stored in 4 or 8 bits (QLoRA, arXiv:2305.14314).

bitsandbytes quantises each weight as transformers reads it, so that no rank holds the model in full
precision. The layers of bitsandbytes are then replaced by ``QuantizedLinear``: theirs keep further
references to the weight (for the backward pass, for int8's statistics) and rearrange it for CPU
inference, neither of which survives ZeRO-3, where a parameter's storage comes and goes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from trainer.errors import ConfigError

Quantization = Literal["nf4", "int8"]
INSTALL = "pip install 'bitsandbytes>=0.48'"
# What transformers notes on a model that it quantised; the replaced layers are ordinary ones.
NOTES = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer")


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


def load_quantized(
    path: str, dtype: torch.dtype, kind: Quantization, own_code: bool = False
) -> PreTrainedModel:
    """Load a model with every linear layer quantised except the output embedding.

    Each rank holds the whole model in its quantised form until ZeRO-3 splits it; of the full
    precision only the tensors being read.

    Args:
        path: model folder.
        dtype: of everything else, and of the arithmetic.
        kind: ``nf4`` (with double quantisation) or ``int8``.
        own_code: whether the folder's own code is run.
    """
    require_bitsandbytes()
    settings = BitsAndBytesConfig(
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=own_code,
        quantization_config=settings,
    )
    _adopt_layers(model, dtype)
    for note in NOTES:
        vars(model).pop(note, None)
    del model.config.quantization_config
    return model


def _adopt_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the layers of bitsandbytes by ours, around the same storage."""
    import bitsandbytes as bnb

    for path, layer in list(model.named_modules()):
        unpack: Callable[[Tensor], Tensor]
        if isinstance(layer, bnb.nn.Linear4bit):
            unpack = _Unpack4bit(layer.weight.quant_state, dtype)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            unpack = _Unpack8bit(layer.weight.SCB, dtype)
        else:
            continue
        bias = None if layer.bias is None else layer.bias.data
        shape = (layer.out_features, layer.in_features)
        model.set_submodule(path, QuantizedLinear(layer.weight.data, unpack, shape, bias))


def quantized_weights(model: PreTrainedModel) -> set[str]:
    """Return the names of the weights that ``load_quantized`` quantises (of any device, or meta).

    Args:
        model: the same architecture, not quantised.
    """
    skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or [])]
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, skipped)
    }


def round_trip(weight: Tensor, kind: Quantization, dtype: torch.dtype) -> Tensor:
    """Return what a quantised layer computes with instead of ``weight [out, in]``, fp32."""
    import bitsandbytes as bnb

    if kind == "nf4":
        packed, state = bnb.functional.quantize_4bit(
            weight.to(dtype).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return _Unpack4bit(state, dtype)(packed).float()
    packed, largest, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
    return _Unpack8bit(largest, dtype)(packed).float()
