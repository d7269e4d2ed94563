"""``kuroshio generate MODEL INPUT OUTPUT``: answer a file of prompts, on one rank or several."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from launch import local, rendezvous
from launch.options import read_options, split_words
from launch.rendezvous import Rendezvous
from launch.world import check_world
from trainer.config import ClusterConfig, SourceConfig
from trainer.errors import EXIT_RESUME, ConfigError, DataError

if TYPE_CHECKING:
    from rich.progress import Progress

    from trainer.data.reading.records import RejectLog
    from trainer.inference.answer_files import AnswerFiles
    from trainer.inference.chat_model import Answer, ChatModel
    from trainer.inference.decoding import Decoding
    from trainer.inference.loading import Loading
    from trainer.inference.prompts import Prompt

PLACES = ["MODEL", "INPUT", "OUTPUT"]


@dataclass(frozen=True)
class Generation:
    """What is answered, how often, by how many.

    Attributes:
        num_samples: answers to each prompt.
        micro_batch_size: prompts a rank answers at once.
        system: system prompt of conversations that have none.
        cluster: ranks.

    The others are those of ``SourceConfig``.
    """

    num_samples: int = 1
    micro_batch_size: int = 8
    system: str | None = None
    format: str = "auto"
    encoding: str = "auto"
    sheet: str | None = None
    schema: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    dataset_info: str | None = None
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self) -> list[str]:
        """Return values that make no sense."""
        lowest = {
            "num_samples": self.num_samples,
            "micro_batch_size": self.micro_batch_size,
            "cluster.nodes": self.cluster.nodes,
            "cluster.gpus_per_node": self.cluster.gpus_per_node,
            "cluster.timeout_s": self.cluster.timeout_s,
        }
        return [f"{k}={value}: expected 1 or more" for k, value in lowest.items() if value < 1]

    def source(self, path: Path) -> SourceConfig:
        """Return how ``path`` is read."""
        keys = {f.name for f in dataclasses.fields(SourceConfig)} - {"paths"}
        given = {key: value for key, value in vars(self).items() if key in keys}
        return SourceConfig(paths=[str(path)], **given)


def main(arguments: Sequence[str]) -> int:
    """Answer the prompts as one rank of a job, or start the ranks; return the exit code.

    Raises:
        ConfigError: a word, a key or the model is wrong, or OUTPUT exists.
        DataError: INPUT cannot be read, or holds no prompt.
        CheckpointError: a run without a complete checkpoint.
        StorageError: OUTPUT cannot be written.
    """
    _leave_on_signals()
    local.follow_parent(os.environ)
    (model, source, output), overrides = split_words("generate", arguments, PLACES)
    from trainer.inference.decoding import Decoding
    from trainer.inference.loading import Loading

    classes = (Generation, Loading, Decoding)
    generation, loading, decoding = read_options("generate", overrides, *classes)
    _refuse_repetition(generation, decoding)
    found = rendezvous.detect(os.environ)
    cluster = generation.cluster
    if found.launcher == "plain" and cluster.nodes == 1 and cluster.gpus_per_node > 1:
        command = [sys.executable, "-m", "launch", "generate", *arguments]
        return local.run_ranks(command, cluster.gpus_per_node, "")
    check_world(found, cluster)
    if found.world_size > 1:
        found.export(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(local.threads_per_rank(found.local_world_size)))
    _run((model, source, output), generation, loading, decoding, found)
    return 0


def _refuse_repetition(generation: Generation, decoding: Decoding) -> None:
    if generation.num_samples > 1 and not decoding.samples:
        raise ConfigError(
            f"num_samples={generation.num_samples} with temperature=0 would give the same answer "
            f"{generation.num_samples} times; set a temperature above 0"
        )
    if decoding.seed is None:
        raise ConfigError("seed=null: a job that was stopped could not go on alike; give a number")


def _run(
    paths: tuple[Path, Path, Path],
    generation: Generation,
    loading: Loading,
    decoding: Decoding,
    found: Rendezvous,
) -> None:
    """Do this rank's share; rank 0 puts the whole together."""
    from launch import agreement
    from launch.loaded_model import load
    from trainer.data.reading.records import RejectLog
    from trainer.engine import collectives
    from trainer.inference.answer_files import AnswerFiles
    from trainer.inference.prompts import read_prompts

    model, source, output = paths
    files = AnswerFiles(output)
    files.refuse_output()
    device = rendezvous.device_index(found.local_rank, os.environ)
    chat_model = load(model, loading, device, found.rank)
    rejected = output.with_name(f"{output.name}.rejects.jsonl")
    rejects = RejectLog(rejected if found.rank == 0 else None, 1.0)
    named = generation.source(source)
    prompts = read_prompts(named, generation.system, chat_model, decoding, rejects)
    if not prompts:
        last = f"; the last: row {rejects.last.row}: {rejects.last.reason}" if rejects.last else ""
        raise DataError(f"INPUT={source}: none of {rejects.num_read} rows is a prompt{last}")
    settings = _settings(chat_model, prompts, generation, decoding)
    together = found.world_size > 1
    with agreement.among_ranks(found.rank):
        if together:
            agreement.join(generation.cluster.timeout_s)
        if found.rank == 0:
            files.claim(settings)
        if together:
            facts = {key: json.dumps(value) for key, value in settings.items()}
            agreement.refuse_disagreement({**facts, "code": agreement.hash_code()})
        _answer_share(chat_model, prompts, generation, decoding, files, found)
        collectives.barrier()
        if found.rank == 0:
            _report(files.finish(prompts, generation.num_samples), output, rejects)
        if together:
            agreement.part()


def _settings(
    chat_model: ChatModel, prompts: list[Prompt], generation: Generation, decoding: Decoding
) -> dict[str, Any]:
    """Return what decides the answers."""
    from trainer.inference.prompts import hash_prompts

    return {
        "model": chat_model.identity,
        "precision": str(chat_model.model.dtype),
        "prompts": hash_prompts(prompts),
        "num_samples": generation.num_samples,
        **dataclasses.asdict(decoding),
    }


def _answer_share(
    chat_model: ChatModel,
    prompts: list[Prompt],
    generation: Generation,
    decoding: Decoding,
    files: AnswerFiles,
    found: Rendezvous,
) -> None:
    """Answer this rank's batches, less those that are done, showing progress on rank 0."""
    from trainer.inference.batches import answer_batch, plan_batches

    batches = plan_batches(prompts, generation.num_samples, generation.micro_batch_size)
    mine, done = batches[found.rank :: found.world_size], files.done()
    with _progress(found) as progress:
        task = progress.add_task("answering", total=sum(map(len, mine)))
        for batch in mine:
            missing = [key for key in batch if key not in done]
            if missing:
                answers = answer_batch(chat_model, prompts, batch, decoding)
                files.append(found.rank, missing, [answers[key] for key in missing])
            progress.advance(task, len(batch))


def _progress(found: Rendezvous) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    share = "" if found.world_size == 1 else f" (rank 0 of {found.world_size})"
    return Progress(
        TextColumn(f"{{task.description}}{share}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=found.rank > 0,
    )


def _report(answers: list[Answer], output: Path, rejects: RejectLog) -> None:
    cut = sum(answer.finish_reason == "length" for answer in answers)
    tokens = sum(answer.num_tokens for answer in answers)
    line = f"{output}: {len(answers)} answers, {tokens:,} tokens, {cut} cut at the longest length"
    if rejects.num_rejected:
        line += f"; {rejects.num_rejected} of {rejects.num_read} rows rejected: {rejects.path}"
    print(line)


def _leave_on_signals() -> None:
    """Let a signal end this rank as "resume me": every batch that was answered is on disk."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_RESUME)

    for number in local.FORWARDED:
        signal.signal(number, leave)
    local.accept_signals()
