"""Tasks over the processes of one machine, with a progress bar."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from trainer.data.encode import Encoder, EncoderSpec
from trainer.data.prepared.shards import Task, run_task
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec

Spec: TypeAlias = "EncoderSpec | ChatSpec"

POLL_SECONDS = 0.2
BYTES_PER_PROCESS = 1 << 22  # on disk; a process costs as long to start as these take to prepare
LOG_EVERY_SECONDS = 15.0

logger = logging.getLogger(__name__)


class Meter:
    """Bytes and documents so far, as a bar on a terminal and as log lines elsewhere."""

    def __init__(self, num_tasks: int) -> None:
        self._began = self._logged = time.monotonic()
        self._num_tasks = num_tasks
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("prepare"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]:.1f} MB/s  {task.fields[documents]:,} documents"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=num_tasks, speed=0.0, documents=0)

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, tasks_done: int, num_bytes: int, num_documents: int) -> None:
        """Show the state of the work."""
        now = time.monotonic()
        speed = num_bytes / 1e6 / max(now - self._began, 1e-9)
        self._progress.update(self._bar, completed=tasks_done, speed=speed, documents=num_documents)
        if self._progress.disable and now - self._logged >= LOG_EVERY_SECONDS:
            self._logged = now
            logger.info(
                "prepare: %d of %d parts, %d documents, %.1f MB, %.1f MB/s",
                tasks_done,
                self._num_tasks,
                num_documents,
                num_bytes / 1e6,
                speed,
            )


def run_tasks(tasks: Sequence[Task], spec: Spec, num_processes: int) -> None:
    """Run every task, in this process or in up to ``num_processes`` new ones.

    Raises:
        DataError: from a task, or because a process was killed.
        StorageError: from a task.
    """
    if not tasks:
        return
    total = sum(task.file.num_bytes // task.num_parts for task in tasks)
    num_processes = min(num_processes, len(tasks), -(-total // BYTES_PER_PROCESS))
    with Meter(len(tasks)) as meter:
        if num_processes <= 1:
            _run_here(tasks, spec, meter)
        else:
            _run_in_pool(tasks, spec, num_processes, meter)


def _run_here(tasks: Sequence[Task], spec: Spec, meter: Meter) -> None:
    encoder, done, num_bytes, num_documents = spec.build(), 0, 0, 0

    def report(more_bytes: int, more_documents: int) -> None:
        nonlocal num_bytes, num_documents
        num_bytes, num_documents = num_bytes + more_bytes, num_documents + more_documents
        meter.show(done, num_bytes, num_documents)

    for done, task in enumerate(tasks):  # noqa: B007 (read by report)
        run_task(task, encoder, report)
    meter.show(len(tasks), num_bytes, num_documents)


def _run_in_pool(tasks: Sequence[Task], spec: Spec, num_processes: int, meter: Meter) -> None:
    # Spawned, not forked: this process has threads (progress, torch) that a fork would tear.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", [0, 0, 0])  # bytes, documents, 1 = stop
    pool = ProcessPoolExecutor(num_processes, context, _start_worker, (spec, counters))
    try:
        pending: set[Future[None]] = {pool.submit(_work, task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
            meter.show(len(tasks) - len(pending), counters[0], counters[1])
            for future in done:
                future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that was preparing data was killed, most likely for lack of memory; lower "
            f"data.num_processes={num_processes} and start the same command again: finished "
            "chunks are kept"
        ) from error
    finally:
        counters[2] = 1
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """Another task has failed."""


_encoder: Encoder | ChatEncoder
_counters: Any


def _start_worker(spec: Spec, counters: Any) -> None:
    """Set a worker process up: its tokenizer, and its end when the parent ends."""
    global _encoder, _counters
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder, _counters = spec.build(), counters


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task) -> None:
    try:
        run_task(task, _encoder, _report)
    except _Stopped:
        return


def _report(num_bytes: int, num_documents: int) -> None:
    with _counters.get_lock():
        _counters[0] += num_bytes
        _counters[1] += num_documents
    if _counters[2]:
        raise _Stopped
