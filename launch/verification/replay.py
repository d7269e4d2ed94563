"""Steps of a run done again from a checkpoint, beside the run, and compared with its record.

The first replay goes straight on from the checkpoint, and saves in the middle. The second begins at
that save, in processes of its own. Figures of both are compared with each other and with
``metrics.jsonl``, the save with the run's own checkpoint of that step where there is one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch import ROOT, run_folder
from launch.snapshot import hash_code
from launch.verification.check import Check, ok, problem, unchecked
from launch.verification.records import Record, Span, read_spans
from launch.verification.replay_plan import Plan, num_cores, plan_replay, settle_ranks
from launch.verification.sameness import (
    TOLERANCES,
    compare_spans,
    compare_weights,
    describe_difference,
)
from trainer.errors import EXIT_RESUME, StorageError
from trainer.lives import CHECKPOINTS_NAME
from trainer.metrics.journal import JOURNAL_NAME, read_lines

TOPIC, OUTPUT = "replay", "output.log"
KEPT = ("tokenizer", "adapter")  # of the run's folder: what a life finds there besides checkpoints
FOREIGN = ("SLURM_", "OMPI_", "PMI", "TORCHELASTIC_")  # variables of a job around us
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SAME_MACHINE = ("device_name", "torch", "deepspeed", "transformers", "num_ranks", "precision")
POLL_S = 0.2
LAST_LINES = 5  # of a replay that failed
CURE = "see which of machine, code, versions and files changed since; a resumed run would differ"


@dataclass(frozen=True)
class Replayed:
    """What a replay left: its records, and the environment it noted."""

    folder: Path
    spans: list[Span]
    environment: Record

    @property
    def tolerance(self) -> float:
        """Return what figures may differ by, relatively, where sums have another order."""
        return TOLERANCES.get(str(self.environment.get("precision")), TOLERANCES["bf16"])

    @property
    def is_on_gpu(self) -> bool:
        """Return whether it ran where the order of sums is not fixed."""
        return not str(self.environment.get("device")).startswith("cpu")


def replay(
    run_dir: Path, num_steps: int, step: int | None, ranks: int | None, scratch: Path | None
) -> list[Check]:
    """Replay steps of a run and compare; relative paths of its config are seen from here.

    Args:
        run_dir: the run's folder, never written to.
        num_steps: at least so many.
        step: of the checkpoint to begin from; None: the newest that leaves enough to compare.
        ranks: how many; None: as many as the run had, as far as this machine has room.
        scratch: where to work; None: beside the run.

    Raises:
        ConfigError: nothing can be replayed as asked.
        StorageError: there is no room for it.
    """
    values = run_folder.read(run_dir / run_folder.CONFIG_FILE)
    plan = plan_replay(run_dir, num_steps, step)
    num_ranks = settle_ranks(plan, values, ranks, num_devices())
    config = plan.config(values, num_ranks)
    checks = [describe(plan, num_ranks)]
    with scratch_folder(run_dir, scratch) as place:
        try:
            first = run_again(run_dir, config, place / "first", plan.checkpoint, plan.end)
            checks += compare_with_run(run_dir, plan, first)
            if plan.middle is None:
                why = "one record was replayed: more steps are needed for a stop between two"
                return [*checks, unchecked(TOPIC, f"stop and resume: {why}")]
            save = first.folder / CHECKPOINTS_NAME / f"step_{plan.middle:08d}"
            checks += compare_save(run_dir, save, first)
            second = run_again(run_dir, config, place / "second", save, plan.end)
        except ReplayError as error:
            remedy = "mend what it says, and verify again"
            return [*checks, problem(TOPIC, str(error), remedy)]
        checks.append(compare_resumed(plan, first, second))
    return checks


class ReplayError(Exception):
    """A replay ended before it had done its steps; its message says how."""


def num_devices() -> int:
    """Return the GPUs of this machine, or its cores where there is none."""
    import torch

    return torch.accelerator.device_count() or num_cores()


def describe(plan: Plan, num_ranks: int) -> Check:
    """Say what is replayed, and what of it is not as it was."""
    start = f"checkpoint of step {plan.start}" if plan.checkpoint else "the start"
    words = f"steps {plan.start + 1} to {plan.end} from {start}, on {num_ranks} ranks"
    had = plan.life.get("world_size")
    if had not in (None, num_ranks):
        words += f" instead of {had}"
    if plan.life.get("code") not in (None, hash_code()):
        words += "; by other code than the run's"
    return ok(TOPIC, words)


@contextmanager
def scratch_folder(run_dir: Path, scratch: Path | None) -> Iterator[Path]:
    """Give a folder to replay in, removed in the end.

    Raises:
        StorageError: it cannot be made or filled.
    """
    above = scratch or run_dir.parent
    try:
        with tempfile.TemporaryDirectory(prefix=f".{run_dir.name}.verify-", dir=above) as place:
            yield Path(place)
    except OSError as error:
        raise StorageError(
            f"{above} cannot hold a replay: {error}; give --scratch FOLDER with room for a few "
            "checkpoints"
        ) from error


def run_again(
    run_dir: Path, config: Mapping[str, Any], folder: Path, checkpoint: Path | None, until: int
) -> Replayed:
    """Train in ``folder`` from ``checkpoint`` until the record of step ``until`` is there.

    Raises:
        ReplayError: it ended before.
    """
    fill_folder(run_dir, config, folder, checkpoint)
    command = [sys.executable, "-m", "launch", "run", "--config", str(folder / "config.yaml")]
    with (folder / OUTPUT).open("wb") as output:
        process = subprocess.Popen(
            command, env=own_environment(os.environ), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = wait_for_step(process, folder / JOURNAL_NAME, until)
        finally:
            if process.poll() is None:  # Ctrl-C, or an error of ours
                process.terminate()
                process.wait()
    records = list(read_lines(folder / JOURNAL_NAME))
    spans = read_spans(records)
    if code not in (0, EXIT_RESUME) or not spans or spans[-1].end < until:
        text = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace")
        last = " | ".join(text.split("\n")[-LAST_LINES - 1 :]).strip(" |")
        raise ReplayError(f"it ended with exit code {code} before step {until}: {last}")
    return Replayed(folder, spans, last_environment(records))


def fill_folder(
    run_dir: Path, config: Mapping[str, Any], folder: Path, checkpoint: Path | None
) -> None:
    """Make a run's folder that goes on from ``checkpoint``; None: from the beginning."""
    folder.mkdir()
    for name in KEPT:
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, folder / name)
    text = run_folder.HEADER + yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    (folder / run_folder.CONFIG_FILE).write_text(text, encoding="utf-8")
    if checkpoint is not None:
        target = folder / CHECKPOINTS_NAME / checkpoint.name
        # Nothing writes into a committed checkpoint, so a second name for its files is enough.
        shutil.copytree(checkpoint, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def own_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a replay: nothing of a job around us, nor of a test of faults."""
    kept = {
        key: value
        for key, value in environ.items()
        if not key.startswith(FOREIGN) and key not in (*PLACE, "KUROSHIO_FAULT")
    }
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])}


def wait_for_step(process: subprocess.Popen[bytes], journal: Path, until: int) -> int:
    """Ask a replay to stop once it has recorded step ``until``; return its exit code."""
    while process.poll() is None:
        spans = read_spans(read_lines(journal))
        if spans and spans[-1].end >= until:
            process.send_signal(signal.SIGTERM)
            return process.wait()
        time.sleep(POLL_S)
    return process.returncode


def last_environment(records: list[Record]) -> Record:
    """Return what the last life that noted it ran on."""
    found = [record for record in records if record.get("event") == "environment"]
    return found[-1] if found else {}


def compare_with_run(run_dir: Path, plan: Plan, first: Replayed) -> list[Check]:
    """Compare a replay with what the run recorded of the same steps."""
    tolerance = first.tolerance
    num, found = compare_spans(plan.spans, first.spans)
    what = f"{num} records of steps {plan.start + 1} to {plan.end}"
    before = list(read_lines(run_dir / JOURNAL_NAME))
    environment = last_environment([r for r in before if r.get("step", 0) <= plan.start])
    other = [key for key in SAME_MACHINE if environment.get(key) != first.environment.get(key)]
    if num == 0:
        return [unchecked(TOPIC, f"the run has no record of the same steps as the replay: {what}")]
    if found is None:
        return [ok(TOPIC, f"the run's {what} are reproduced to the last bit")]
    why = f"another {', '.join(other)}" if other else "a GPU" if first.is_on_gpu else ""
    if why and found.largest <= tolerance:
        words = f"the run's {what} are reproduced within {tolerance:g} (on {why})"
        return [ok(TOPIC, f"{words}: {describe_difference(found)}")]
    limit = f"more than {tolerance:g} on {why}" if why else "on the same machine and ranks"
    return [problem(TOPIC, f"the run's {what}: {describe_difference(found)} ({limit})", CURE)]


def compare_save(run_dir: Path, save: Path, first: Replayed) -> Iterator[Check]:
    """Compare the save in the middle with the run's own checkpoint of that step, if it has one."""
    own = run_dir / CHECKPOINTS_NAME / save.name
    if not own.is_dir():
        return
    largest, where = compare_weights(own, save)
    if not largest:
        yield ok(TOPIC, f"{save.name} of the run and of the replay hold the same weights")
    elif not first.is_on_gpu and _same_ranks(own, first):
        yield problem(TOPIC, f"{save.name}: {where} differs by {largest:.1e}", CURE)
    else:
        yield ok(TOPIC, f"{save.name}: weights differ by at most {largest:.1e}, in {where}")


def _same_ranks(own: Path, first: Replayed) -> bool:
    from trainer.engine.manifest import read_manifest

    return read_manifest(own)["world_size"] == first.environment.get("num_ranks")


def compare_resumed(plan: Plan, first: Replayed, second: Replayed) -> Check:
    """Compare the replay that began in the middle with the one that went straight through."""
    assert plan.middle is not None
    after = [s for s in first.spans if s.start >= plan.middle and s.end <= plan.end]
    num, found = compare_spans(after, second.spans)
    what = f"stopped at step {plan.middle} and resumed: {num} records"
    if num == 0:
        return unchecked(TOPIC, f"stop and resume: no record lies after step {plan.middle} in full")
    if found is None:
        return ok(TOPIC, f"{what} equal those of the unbroken replay to the last bit")
    if first.is_on_gpu and found.largest <= first.tolerance:
        return ok(TOPIC, f"{what} equal within {first.tolerance:g} (on a GPU)")
    return problem(TOPIC, f"{what}: {describe_difference(found)}", CURE)
