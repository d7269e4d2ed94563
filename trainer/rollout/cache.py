"""A cache of keys and values with room to grow.

transformers' own joins what it holds and each new token into a new tensor: every token copies all
those before it. Here a token is written behind them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens by which a buffer is made longer than what is in it


def make_cache(config: PretrainedConfig) -> DynamicCache:
    """Return an empty cache for a model; layers that attend to a window keep a window only."""
    cache = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, ``[rows, heads, seq, d]``: views into longer buffers."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin without tokens."""
        super().lazy_initialization(key_states, value_states)
        self._buffers = key_states[..., :0, :], value_states[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append states ``[rows, heads, new, d]`` and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        keys, values = self._buffers
        if stop > keys.shape[-2]:
            keys = _extend(keys[..., :start, :], key_states, stop + ROOM)
            values = _extend(values[..., :start, :], value_states, stop + ROOM)
            self._buffers = keys, values
        keys[..., start:stop, :] = key_states
        values[..., start:stop, :] = value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows ``indices`` only; the next token makes buffers of them."""
        super().batch_select_indices(indices)
        self._buffers = self.keys, self.values


def _extend(held: Tensor, new: Tensor, length: int) -> Tensor:
    """Return a buffer of ``length`` tokens that begins with ``held``, shaped as ``new`` is."""
    buffer = new.new_empty((*new.shape[:-2], length, new.shape[-1]))
    buffer[..., : held.shape[-2], :] = held
    return buffer
