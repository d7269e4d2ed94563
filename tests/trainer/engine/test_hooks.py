"""Hooks come back, in their order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trainer.engine.hooks import hooks_off


def test_hooks_are_off_inside_and_back_in_order_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    called: list[str] = []

    def note(name: str) -> Any:
        return lambda *args: called.append(name)

    first = model[0].register_forward_pre_hook(note("first"))
    model[0].register_forward_pre_hook(note("second"))
    third = model[1].register_forward_hook(note("third"))
    outside = nn.Linear(2, 2).register_forward_hook(note("outside"))
    whole = model.register_forward_hook(note("whole"))
    with pytest.raises(KeyError), hooks_off(model, [third, first, outside]):
        model(torch.ones(1, 2))
        assert called == ["second", "whole"]
        raise KeyError
    called.clear()
    model(torch.ones(1, 2))
    assert called == ["first", "second", "third", "whole"]
    first.remove()  # handles still work
    called.clear()
    with hooks_off(model[1], [third, whole]):
        model(torch.ones(1, 2))
    assert called == ["second", "whole"]
