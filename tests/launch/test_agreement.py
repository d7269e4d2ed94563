"""Ranks compare where they are with where the configuration says."""

from __future__ import annotations

import pytest

from launch.agreement import refuse_crowding
from trainer.engine import collectives
from trainer.errors import RanksDisagreeError


def test_of_one_rank_the_name_comes_back() -> None:
    assert collectives.gather_texts("節點1") == ["節點1"]


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_ranks_on_other_nodes_than_asked_are_refused(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int
) -> None:
    monkeypatch.setattr(collectives, "gather_texts", lambda node: ["n1", "n1", "n2", "n2"])
    refuse_crowding(2, "n1")
    with pytest.raises(RanksDisagreeError, match=r"4 ranks are on 2 nodes \(n1, n2\), but cluster"):
        refuse_crowding(num_nodes, "n1")
