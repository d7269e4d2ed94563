"""Feed every reader with broken bytes and print what came of it.

    PYTHONPATH=.:tests:tests/faults python tests/faults/fuzz_readers.py --inputs 10000 --seed 0

A reader may accept a file, reject rows of it with file, line and reason, or refuse it with an error
that says what to do. A crash is any other exception, a hang, or the end of the process; a silent
loss is a row that was neither accepted nor rejected. Each reader works in a process of its own,
since libraries underneath are written in C++.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

from broken_bytes import Tally, Target, fuzz
from data_targets import data_targets
from record_targets import record_targets

MEMORY_BYTES = 12 << 30  # of one reader's process: more is asked for by a length that is broken
HEADERS = ("reader", "inputs", "accepted", "refused", "rows read", "accepted", "rejected")


def make_targets(folder: Path) -> list[Target]:
    """Return every reader; ``folder`` is for what they need beside their files."""
    return [*data_targets(), *record_targets(folder)]


def fuzz_apart(target: Target, num: int, seed: int) -> Tally:
    """Fuzz a reader in a process of its own, which it may take down."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place)
        receive, send = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=_fuzz_here, args=(target, num, seed, folder, send)
        )
        process.start()
        send.close()
        try:
            tally: Tally = receive.recv()
        except EOFError:
            process.join()
            last = (folder / "last").read_text(errors="replace")
            crash = f"{target.name}: its process ended with {process.exitcode} on {last}"
            return Tally(inputs=num, crashes=[crash])
        process.join()
        return tally


def _fuzz_here(target: Target, num: int, seed: int, folder: Path, send: object) -> None:
    quieten()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    last = folder / "last"
    send.send(fuzz(target, num, folder, seed, last.write_text))  # type: ignore[attr-defined]


def quieten() -> None:
    """Keep remarks about broken files from the terminal: there are thousands."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def show(tallies: dict[str, Tally]) -> str:
    """Return the table as Markdown."""
    table = ["| " + " | ".join(HEADERS) + " |", "|---|" + "--:|" * (len(HEADERS) - 1)]
    total = Tally()
    for tally in tallies.values():
        total.add(tally)
    for name, tally in [*tallies.items(), ("all", total)]:
        rows = [tally.rows[key] for key in ("read", "accepted", "rejected")]
        figures = [tally.inputs, tally.accepted, tally.refused, *rows]
        table.append(f"| {name} | " + " | ".join(f"{figure:,}" for figure in figures) + " |")
    return "\n".join(table)


def main() -> int:
    """Print the table, every crash and every loss; return how many there were, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers with this in their name")
    options = parser.parse_args()
    quieten()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        targets = [t for t in make_targets(Path(place)) if options.only in t.name]
        each = -(-options.inputs // len(targets))
        tallies = {target.name: fuzz_apart(target, each, options.seed) for target in targets}
    found = [text for tally in tallies.values() for text in (*tally.crashes, *tally.losses)]
    print(show(tallies))
    crashes = sum(len(tally.crashes) for tally in tallies.values())
    print(f"\n{crashes} crashes, {len(found) - crashes} silent losses (seed {options.seed})")
    print("\n\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
