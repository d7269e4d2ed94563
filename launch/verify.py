"""``kuroshio verify RUN``: is everything in a run's folder whole, and does it happen again?"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from launch.slurm_queue import job_state
from launch.tenancy import life_sign
from launch.verification import checkpoints, exports, inputs, parents, records
from launch.verification.check import Check, as_data, exit_code
from trainer.engine.manifest import list_steps
from trainer.errors import ConfigError
from trainer.lease import Holder, read_holder
from trainer.lives import CHECKPOINTS_NAME, read_lives
from trainer.metrics.run_facts import section

STYLES = {"ok": "green", "problem": "bold red", "unchecked": "yellow"}
WORDS = {"ok": "ok", "problem": "problem", "unchecked": "not checkable"}
FILE_WIDTH = 110  # of a table in a file or pipe
Count = Callable[[int], None]


def main(argv: Sequence[str]) -> int:
    """Check a run, and replay steps of it if asked to; return 0, or 66 for damage.

    Raises:
        ConfigError: the folder is no run's, or nothing can be replayed as asked.
    """
    options = parse(argv)
    run_dir: Path = options.run
    if not parents.is_parent(run_dir):
        raise ConfigError(f"{run_dir} is not the folder of a run; give the run_dir of one")
    run_dir = run_dir.absolute()
    with counting(total_bytes(run_dir), hidden=options.json) as count:
        checks = list(verify(run_dir, count))
    if options.replay is not None:
        from launch.verification.replay import replay

        with seen_from(run_dir):
            checks += replay(run_dir, options.replay, options.step, options.ranks, options.scratch)
    if options.json:
        print(json.dumps({"run": str(run_dir), **as_data(checks)}, ensure_ascii=False, indent=2))
    else:
        show(checks)
    return exit_code(checks)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="kuroshio verify",
        allow_abbrev=False,
        description="Check what a run's folder holds: checkpoints by size and SHA-256, config, "
        "lives, figures, lease, what it was made of, the runs before it, its exports. With "
        "--replay train some steps again in a folder beside it, once through and once with a "
        "stop in the middle, and compare with what the run recorded. The run is never touched.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder (run_dir)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--replay", type=_positive, metavar="K", help="train K steps again (needs its machine)"
    )
    parser.add_argument(
        "--step", type=int, metavar="S",
        help="replay from the checkpoint of step S, 0 for the start (default: the newest after "
        "which K steps were recorded)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=_positive, metavar="N", help="replay on N ranks (default: the run's)"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="FOLDER",
        help="replay below FOLDER (default: beside RUN), where a few checkpoints find room",
    )  # fmt: skip
    options = parser.parse_args(argv)
    alone = {"--step": options.step, "--ranks": options.ranks, "--scratch": options.scratch}
    if options.replay is None and (given := [f for f, value in alone.items() if value is not None]):
        parser.error(f"{', '.join(given)} says how to replay: give --replay K, too")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def verify(run_dir: Path, count: Count) -> Iterator[Check]:
    """Yield the results for a run, then those for the runs that it was made of."""
    done: dict[Path, None] = {}
    left = [run_dir]
    while left:
        folder = left.pop(0)
        if folder in done:
            continue
        done[folder] = None
        name = folder.name if folder.parent == run_dir.parent else str(folder)
        with seen_from(folder):
            config, checked = records.check_config(folder)
            left += [path.resolve() for path in parents.find_parents(folder, config)]
            yield checked.of(name)
            stage = str(section(config, "stage").get("name"))
            run = _verify_outputs if stage == "vocab" else _verify_training
            yield from (check.of(name) for check in run(folder, config, count))


def _verify_outputs(run_dir: Path, config: dict[str, Any], count: Count) -> Iterator[Check]:
    yield parents.check_outputs(run_dir)
    yield from parents.check_parents(run_dir)


def _verify_training(run_dir: Path, config: dict[str, Any], count: Count) -> Iterator[Check]:
    holder = read_holder(run_dir)
    is_alive = holder is not None and lives_now(holder)
    steps = list_steps(run_dir / CHECKPOINTS_NAME)
    yield from checkpoints.check_checkpoints(run_dir, config, count)
    yield from checkpoints.check_leftovers(run_dir, is_alive)
    yield records.check_lives(run_dir, is_alive)
    yield records.check_metrics(run_dir, config, int(steps[0].name[5:]) if steps else 0)
    yield records.check_lease(run_dir, holder, is_alive)
    yield from inputs.check_inputs(run_dir, config)
    yield inputs.check_code(run_dir)
    yield from parents.check_parents(run_dir)
    yield from exports.check_exports(run_dir, config, count)


def lives_now(holder: Holder) -> bool:
    """Return whether the holder of a lease shows any sign of life."""
    return bool(life_sign(holder, {"job": None, "restart": 0}, time.time(), job_state))


@contextmanager
def seen_from(run_dir: Path) -> Iterator[None]:
    """Work where the run was started: relative paths of its config are seen from there."""
    before = Path.cwd()
    known = [life["directory"] for life in read_lives(run_dir) if life.get("directory")]
    if known and Path(known[-1]).is_dir():
        os.chdir(known[-1])
    try:
        yield
    finally:
        os.chdir(before)


def total_bytes(run_dir: Path) -> int:
    """Return how much of the run itself there is to hash; its parents come on top."""
    return checkpoints.num_bytes(run_dir) + exports.num_bytes(run_dir)


@contextmanager
def counting(total: int, hidden: bool) -> Iterator[Count]:
    """Show how far the hashing is, on a terminal; yield what is told the bytes read."""
    console = Console(stderr=True)
    columns = (TextColumn("hashing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    off = hidden or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        task = progress.add_task("hashing", total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def show(checks: Sequence[Check]) -> None:
    """Print the table, run by run, and a count of each state."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("", "check", "found"):
        table.add_column(header, no_wrap=header != "found", overflow="fold")
    before = None
    for check in checks:
        if check.run and check.run != before:
            table.add_row("", "", Text(check.run, "bold"))
            before = check.run
        body = Text(check.what)
        if check.remedy:
            body.append(f"\nremedy: {check.remedy}", style="dim")
        table.add_row(Text(WORDS[check.state], STYLES[check.state]), check.topic, body)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else FILE_WIDTH)
    console.print(Group(table, Text(""), Text(count_states(checks))), markup=False)


def count_states(checks: Sequence[Check]) -> str:
    """Return ``12 ok, 1 problem, 2 not checkable``."""
    numbers = {state: sum(check.state == state for check in checks) for state in WORDS}
    many = "problem" if numbers["problem"] == 1 else "problems"
    words = {**WORDS, "problem": many}
    return ", ".join(f"{number} {words[state]}" for state, number in numbers.items())
