"""Which of a backbone's adapters a forward uses.

peft's own ``set_adapter`` and ``disable_adapter`` also turn ``requires_grad`` of the other adapters
off: under ZeRO-3 their gradients of the same step are then lost. Here only the forward changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from trainer.models.adapter_files import NAME


class AdapterSwitch:
    """The adapters of one backbone, of which one or none is on at a time.

    Args:
        model: wrapped by peft; its first adapter is on.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self._current: str | None = NAME

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Compute with one adapter, or with none, in the forwards inside."""
        before = self._current
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts of a checkpointed forward and of its repetition in backward.

        By then another adapter may be on (torch's ``context_fn``).
        """
        return nullcontext(), self.using(self._current)

    def _set(self, name: str | None) -> None:
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]
        self._current = name
