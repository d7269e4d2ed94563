"""Offline preparation: sources to a token store that training only maps into memory.

Tokenising inside a distributed job would hold the other ranks in a collective until its timeout;
so it is done before, once for each content of files, options and tokenizer, by any number of
processes on any number of machines that share ``data.store_dir``. There are no locks: work is cut
into shards that are written in one step, and the first to finish a source gives it its name.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tokenizer.load import fingerprint, load_tokenizer
from trainer.config import DataConfig
from trainer.data.chats.chat_encoder import ChatSpec
from trainer.data.chats.pair_encoder import PairSpec
from trainer.data.chats.prompt_encoder import PromptSpec
from trainer.data.chats.templates import resolve_template
from trainer.data.encode import EncoderSpec
from trainer.data.prepared.fingerprints import HASHES, SourcePlan, hash_file, plan_source
from trainer.data.prepared.merge import REJECTED, commit_source
from trainer.data.prepared.shards import Task
from trainer.data.prepared.store import MANIFEST, SourceStore, TokenStore, verify
from trainer.data.prepared.summary import left_out
from trainer.data.prepared.workers import Spec, run_tasks
from trainer.data.reading.files import list_files
from trainer.data.storage import naming_the_disk
from trainer.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SPECS: dict[str, type[ChatSpec]] = {
    "conversations": ChatSpec,
    "preferences": PairSpec,
    "prompts": PromptSpec,
}
TASKS_PER_PROCESS = 4  # more parts than processes, so that all end at about the same time


def prepare(
    data: DataConfig,
    tokenizer_path: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
) -> TokenStore:
    """Prepare every source that is not in the store yet, and open the store.

    Call it on every rank; ranks share ``data.store_dir``. Sources that are there already are
    verified by their hashes.

    Args:
        data: sources, reading options, ``store_dir`` and ``num_processes``.
        tokenizer_path: tokenizer folder or SentencePiece model.
        rank: this process's rank.
        world_size: ranks that work together.
        barrier: waits for all ranks; needed with more than one.

    Returns:
        The store, on every rank.

    Raises:
        ConfigError: several ranks without a barrier.
        DataError: unreadable input or too many bad rows.
        StorageError: the disk is full or not writable.
    """
    if world_size > 1 and barrier is None:
        raise ConfigError(f"preparing with {world_size} ranks needs a barrier")
    wait = barrier or (lambda: None)
    if world_size > 1:  # each rank hashes a share of the files, and finds the other hashes noted
        for source in data.sources.values():
            for path in list_files(source)[rank::world_size]:
                hash_file(path, Path(data.store_dir).expanduser() / HASHES)
        wait()
    plans = plan_sources(data, tokenizer_path)
    missing = [plan for plan in plans if not _is_committed(plan)]
    wait()  # nobody commits before everybody has looked
    if missing:
        spec = describe_encoder(data, tokenizer_path)
        num_processes = data.num_processes or len(os.sched_getaffinity(0))
        for plan in missing:
            with naming_the_disk(plan.work_folder):
                plan.work_folder.mkdir(parents=True, exist_ok=True)
        tasks = deal(missing, num_processes * world_size, data.max_bad_row_share)
        run_tasks(tasks[rank::world_size], spec, num_processes)
        _refuse_changed_files(plans, Path(data.store_dir).expanduser())
        wait()
        for plan in missing[rank::world_size]:
            commit_source(plan, spec.encoder, data.max_bad_row_share)
    for plan in plans[rank::world_size]:
        if plan not in missing:
            verify(plan.folder)
    wait()
    return _open(plans, data)


def _refuse_changed_files(plans: list[SourcePlan], store_dir: Path) -> None:
    """Raise when a file was changed while it was read: its tokens would go by a wrong name."""
    changed = [plan for plan in plans if _differs(plan, store_dir)]
    if changed:
        for plan in changed:
            shutil.rmtree(plan.work_folder, ignore_errors=True)
        raise DataError(
            f"files of {', '.join(plan.name for plan in changed)} changed while they were being "
            "prepared; start the same command again when they are complete"
        )


def _differs(plan: SourcePlan, store_dir: Path) -> bool:
    now = [(path, hash_file(path, store_dir / HASHES)) for path in list_files(plan.source)]
    return now != [(file.path, file.sha256) for file in plan.files]


def describe_encoder(data: DataConfig, tokenizer_path: str | Path) -> Spec:
    """Return what encodes the sources, as plain data.

    Raises:
        ConfigError: the chat template cannot be found or used with this tokenizer.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    if data.content == "documents":
        return EncoderSpec.of(tokenizer)
    spec = SPECS[data.content]
    return spec.of(
        tokenizer,
        resolve_template(tokenizer, data.template),
        # Of a pair only the answers that are compared are learnt.
        train_on=data.train_on if data.content == "conversations" else "last",
        system=data.system,
        max_length=data.max_length,
    )


def plan_sources(data: DataConfig, tokenizer_path: str | Path) -> list[SourcePlan]:
    """Return the plan of every source, in the configuration's order.

    Raises:
        ConfigError: no source.
        DataError: a file is missing, empty or unreadable.
    """
    if not data.sources:
        raise ConfigError(
            "data.sources is empty; choose a data option (data=samples) or add a source: "
            "+data.sources.NAME.paths=[FILE]"
        )
    tokenizer_key, chat = fingerprint(tokenizer_path), None
    spec = describe_encoder(data, tokenizer_path) if data.content != "documents" else None
    if isinstance(spec, ChatSpec):
        chat = spec.identity()
    return [
        plan_source(
            name,
            source,
            store_dir=Path(data.store_dir).expanduser(),
            tokenizer_key=tokenizer_key,
            min_chars=data.min_chars,
            content=data.content,
            chat=chat,
        )
        for name, source in data.sources.items()
    ]


def deal(plans: list[SourcePlan], num_workers: int, max_bad_row_share: float) -> list[Task]:
    """Cut the files of ``plans`` into tasks of about equal size, the largest first.

    A part of a file is every n-th chunk: its worker reads past the others. So a file is cut only
    as far as the number of workers asks for.
    """
    total = sum(file.num_bytes for plan in plans for file in plan.files)
    target = max(1, total // (num_workers * TASKS_PER_PROCESS))
    tasks = []
    for plan in plans:
        for file_id, file in enumerate(plan.files):
            num_parts = min(num_workers, -(-file.num_bytes // target))
            for part in range(num_parts):
                tasks.append(Task(plan, file_id, part, num_parts, max_bad_row_share))
    return sorted(tasks, key=lambda task: -task.file.num_bytes / task.num_parts)


def open_store(data: DataConfig, tokenizer_path: str | Path) -> TokenStore:
    """Open the store of a run whose sources have been prepared.

    Raises:
        DataError: a source is not prepared; the message names the command.
    """
    plans = plan_sources(data, tokenizer_path)
    missing = [plan.name for plan in plans if not _is_committed(plan)]
    if missing:
        raise DataError(
            f"data.store_dir={data.store_dir} holds no tokens of {', '.join(missing)} for "
            f"tokenizer {tokenizer_path} and these files and options; run `kuroshio prepare` with "
            "the overrides of this run first"
        )
    return _open(plans, data)


def ensure_prepared(data: DataConfig, tokenizer_path: str | Path) -> TokenStore:
    """Open the store; prepare first what is missing. For one process, before ranks start."""
    plans = plan_sources(data, tokenizer_path)
    missing = [plan for plan in plans if not _is_committed(plan)]
    if not missing:
        return _open(plans, data)
    store = prepare(data, tokenizer_path)
    for plan in missing:
        _warn(store.sources[plan.name])
    return store


def _warn(source: SourceStore) -> None:
    """Say what was left out, where nobody looks at the table of ``kuroshio prepare``."""
    num_left_out = left_out(source.manifest)
    if num_left_out:
        logger.warning(
            "%s: %d of %d rows were left out; most often: %s; all are in %s",
            source.name,
            num_left_out,
            source.manifest["rows"]["read"],
            source.manifest["reasons"][0][0],
            source.folder / REJECTED,
        )


def _is_committed(plan: SourcePlan) -> bool:
    return (plan.folder / MANIFEST).exists()


def _open(plans: list[SourcePlan], data: DataConfig) -> TokenStore:
    sources = {}
    for plan in plans:
        share = plan.source.holdout_share
        sources[plan.name] = SourceStore.open(
            plan.folder, plan.name, data.holdout_share if share is None else share
        )
    manifest = next(iter(sources.values())).manifest
    return TokenStore(
        sources=sources,
        bos_token_id=manifest["bos_token_id"],
        eos_token_id=manifest["eos_token_id"],
        pad_token_id=manifest["pad_token_id"],
    )
