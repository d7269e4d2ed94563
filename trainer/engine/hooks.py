"""Hooks of modules, taken off for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def hooks_off(module: nn.Module, handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Run the forwards inside without some hooks of ``module`` and the modules in it.

    The hooks come back in the order in which they were called before, which registering them anew
    would not do.

    Args:
        module: the module whose forward is called.
        handles: of the hooks; those of other modules are left alone.
    """
    ids = {handle.id for handle in handles}
    before = [
        (hooks, dict(hooks))
        for inner in module.modules()
        for hooks in (inner._forward_hooks, inner._forward_pre_hooks)
    ]
    for hooks, every in before:
        for number in ids & every.keys():
            del hooks[number]
    try:
        yield
    finally:
        for hooks, every in before:
            hooks.clear()
            hooks.update(every)
