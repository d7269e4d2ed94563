"""Broken variants of valid files, and what a reader makes of them: accepted, rejected, refused."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from trainer.errors import KuroshioError

LIMIT_S = 20  # for one input: longer is a hang
# What readers stumble over: NUL, byte-order marks, invalid UTF-8, ends of lines, deep nesting, huge
# and unusual numbers, values of other types.
TOKENS = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f", b"\r\n", b"\n"),
    *(b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\t", b"---\n", b"&a *a"),
    *(b"[" * 3000, b'{"a":' * 2000, b"9" * 5000, b"1e999", b"-1", b"NaN", b"null", b"true"),
    *(b'{"role": "nobody"}', b"[null]", b"{% for", b"{{", b"}}", b"%}", b" " * 5000, b"x" * 70000),
)


@dataclass(frozen=True)
class Rows:
    """How many rows a reader saw, and what became of them."""

    read: int
    accepted: int
    rejected: int


@dataclass(frozen=True)
class Target:
    """A reader under test.

    Attributes:
        name: shown.
        seeds: valid contents of its file by file name; the name decides the format.
        read: reads the file; raises a KuroshioError to refuse it; returns None where a file has
            no rows.
    """

    name: str
    seeds: Mapping[str, bytes]
    read: Callable[[Path], Rows | None]


@dataclass
class Tally:
    """What came of the inputs of one reader."""

    inputs: int = 0
    accepted: int = 0  # files
    refused: int = 0
    rows: Counter[str] = field(default_factory=Counter)  # read, accepted, rejected
    crashes: list[str] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the figures of another tally."""
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.rows += other.rows
        self.crashes += other.crashes
        self.losses += other.losses


def break_bytes(random: Random, content: bytes, others: Sequence[bytes]) -> bytes:
    """Return ``content`` with one to four defects."""
    broken = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = random.randrange(len(broken) + 1)
        kind = random.choice(("flip", "flip", "cut", "insert", "token", "token", "drop", "splice"))
        if kind == "flip" and broken:
            broken[min(at, len(broken) - 1)] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del broken[at:]
        elif kind == "insert":
            broken[at:at] = random.randbytes(random.randint(1, 8))
        elif kind == "token":
            broken[at : at + random.choice((0, 0, 4))] = random.choice(TOKENS)
        elif kind == "drop":
            del broken[at : at + random.randint(1, 64)]
        elif kind == "splice":
            other = random.choice(others)
            broken[at:] = other[random.randrange(len(other) + 1) :]
    return bytes(broken)


def draw_inputs(target: Target, num: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield file names and contents: each valid file once, then broken ones."""
    random, seeds = Random(f"{target.name}/{seed}"), list(target.seeds.items())
    yield from seeds[:num]
    for _ in range(num - len(seeds)):
        name, content = random.choice(seeds)
        yield name, break_bytes(random, content, list(target.seeds.values()))


def try_reader(target: Target, name: str, content: bytes, folder: Path) -> Tally:
    """Let a reader read one input from a folder of its own; return what came of it."""
    path, tally = folder / name, Tally(inputs=1)
    path.write_bytes(content)
    try:
        with time_limit(LIMIT_S):
            rows = target.read(path)
    except KuroshioError:
        tally.refused = 1
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic of Rust code is no Exception
        tally.crashes.append(f"{target.name} {name}: {content[:300]!r}\n{traceback.format_exc()}")
    else:
        tally.accepted = 1
        if rows is not None:
            counts = {"read": rows.read, "accepted": rows.accepted, "rejected": rows.rejected}
            tally.rows.update(counts)
            if rows.accepted + rows.rejected != rows.read:
                tally.losses.append(f"{target.name} {name}: {rows}, of {content[:300]!r}")
    return tally


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; of the main thread only."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError(f"the reader took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(
    target: Target, num: int, folder: Path, seed: int, note: Callable[[str], None] = lambda _: None
) -> Tally:
    """Read ``num`` inputs; ``note`` is told each before it is read, as a reader may take us along.

    Args:
        target: the reader.
        num: how many.
        folder: empty; gets a folder for every input.
        seed: decides the inputs.
        note: keeps what is being read.
    """
    tally = Tally()
    for number, (name, content) in enumerate(draw_inputs(target, num, seed)):
        place = folder / f"{target.name.replace(' ', '_').replace('/', '_')}-{number}"
        place.mkdir()
        note(f"{number} {name} {content[:300]!r}")
        tally.add(try_reader(target, name, content, place))
    return tally
