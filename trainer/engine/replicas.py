"""Compare what ranks must hold alike: a flipped bit on one of them spoils the run in silence.

Each rank sums the words of each tensor, in one pass on the device, and sends 8 bytes a tensor. A
flip changes the sum by a power of two. Under ZeRO-0 all weights, masters and moments are compared,
under ZeRO-1 and 2 the weights, which are whole on every rank, under ZeRO-3 the parameters that stay
whole, and one module more, gathered for it, drawn by lot each time.
"""

from __future__ import annotations

import random
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from trainer.engine.collectives import gather_integers, gather_texts
from trainer.errors import CorruptionError

if TYPE_CHECKING:
    from trainer.engine.engine import Engine

WORD = 8  # bytes


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's bytes, read as 64-bit integers, modulo 2**64: [] int64.

    Integers of that width are summed as fast as memory is read; narrower ones are converted first.
    """
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % WORD:
        flat = flat.clone()  # words begin where the tensor does, wherever that lies
    data = flat.view(torch.uint8)
    whole = len(data) // WORD * WORD
    return data[:whole].view(torch.int64).sum() + data[whole:].sum(dtype=torch.int64)


def compare_replicas(engine: Engine, step: int) -> None:
    """Compare over all ranks what is to be equal; every rank calls this between two steps.

    Raises:
        CorruptionError: naming the ranks that differ from the majority and what differs first.
    """
    if engine.world_size == 1:
        return
    found = dict(_digests(engine, step))
    sums = torch.stack([one.to(engine.device) for one in found.values()]).tolist()
    everyone = gather_integers(sums)
    if any(one != everyone[0] for one in everyone):
        raise CorruptionError(
            describe_difference(list(found), everyone, gather_texts(socket.gethostname()), step)
        )


def describe_difference(
    names: Sequence[str], sums: Sequence[Sequence[int]], hosts: Sequence[str], step: int
) -> str:
    """Return who differs from the majority, and in what first.

    Args:
        names: of what was compared.
        sums: of each rank, in the order of names.
        hosts: of each rank.
        step: after which.
    """
    counts = Counter(map(tuple, sums))
    [(common, votes), *_] = counts.most_common()
    place = next(at for at, values in enumerate(zip(*sums, strict=True)) if len(set(values)) > 1)
    where, what = f"after step {step}", f"{names[place]} is not the same on all ranks"
    if 2 * votes > len(sums):
        wrong = [rank for rank, own in enumerate(sums) if tuple(own) != common]
        first = names[next(at for at, one in enumerate(common) if sums[wrong[0]][at] != one)]
        who = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in wrong)
        where, what = f"{who} {where}", f"{first} is not what it is on the other ranks"
    else:
        where += f": no majority among ranks on {', '.join(dict.fromkeys(hosts))}"
    return (
        f"silent corruption, {where}: {what}. Nothing was saved since; the newest checkpoint was "
        "compared before it was written. Start again to resume from it, without that machine "
        "(cluster.exclude) if it comes back"
    )


def _digests(engine: Engine, step: int) -> Iterator[tuple[str, torch.Tensor]]:
    split = []
    for name, param in engine.module.named_parameters():
        own = vars(param)
        if "ds_id" not in own or (own["ds_persist"] and own["ds_status"].name == "AVAILABLE"):
            yield name, digest(param)
        else:
            split.append(name)
    if split:
        yield from _gathered_digests(engine, draw(split, step))
    if engine.config.zero_stage == 0:
        for fragment in engine.fragments(write=True):
            for kind, tensor in fragment.tensors().items():
                if kind != "master" or engine.precision != "fp32":  # that is the weight itself
                    yield f"{fragment.name}|{kind}", digest(tensor)


def draw(names: Sequence[str], step: int) -> str:
    """Return one of the names, by lot: with ``step % len(names)`` most would never have a turn.

    Comparisons come every so many steps, and that number may have a factor in common with theirs.
    """
    return random.Random(step).choice(names)


def _gathered_digests(engine: Engine, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    module = engine.module.get_submodule(name.rpartition(".")[0])
    with engine.gathered(module):
        for own, param in module.named_parameters(recurse=False):
            yield f"{name.rpartition('.')[0]}.{own}, gathered", digest(param)
