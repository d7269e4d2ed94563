"""The run folder's frozen config and the record of every life of the run."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from launch.snapshot import hash_code
from trainer.config import RunConfig, build
from trainer.disk import sync_path, unique_suffix, write_synced
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.lives import append_line, newest_step, read_lives, slurm_life, utc_now

CONFIG_FILE = "config.yaml"
# What a later life may change: where and how fast a run computes, what it keeps and shows. A
# checkpoint is independent of ZeRO stage, offload and world size, and the loss of micro_batch_size.
CHANGEABLE = (
    "cluster.*",
    "engine.*",
    "guard.*",
    "log.*",
    "data.store_dir",
    "data.num_processes",
    "loop.micro_batch_size",
    "loop.log_every",
    "loop.save_every",
    "loop.keep_last",
    "loop.keep_every",
    "loop.keep_gb",
    "loop.save_async",
    "loop.staging_dir",
    "loop.damaged",
)
CompleteSection = Callable[[dict[str, Any]], dict[str, Any]]
HEADER = "# The run's whole configuration; resume, export and report read it. Do not edit.\n"


def claim(
    run_dir: Path,
    config: RunConfig,
    asked: RunConfig | None = None,
    complete_stage: CompleteSection | None = None,
) -> dict[str, list[Any]]:
    """Freeze ``config`` in ``run_dir``, or find there the same one from an earlier life.

    Args:
        run_dir: the run's folder.
        config: of this life.
        asked: ``config`` before it was settled: what the folder of a submitted run holds until
            its first life.
        complete_stage: see ``check_same_run``.

    Returns:
        Keys that changed since the last life, each with its old and new value.

    Raises:
        ConfigError: when the folder belongs to a run of another config, listing what differs.
        CheckpointError: when it holds checkpoints of a run that nothing describes.
        StorageError: when the folder cannot be written.
    """
    path = run_dir / CONFIG_FILE
    refuse_other_run(run_dir, config, asked, complete_stage)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{unique_suffix()}")
        try:
            write_synced(temporary, freeze(config).encode())
            os.link(temporary, path)  # fails if another life, or another job just now, was first
            return {}
        except FileExistsError:
            changes = refuse_other_run(run_dir, config, asked, complete_stage)
            if freeze(config) != path.read_text(encoding="utf-8"):
                temporary.replace(path)
            return changes
        finally:
            temporary.unlink(missing_ok=True)
            sync_path(run_dir)


def refuse_other_run(
    run_dir: Path,
    config: RunConfig,
    asked: RunConfig | None = None,
    complete_stage: CompleteSection | None = None,
) -> dict[str, list[Any]]:
    """Do what ``claim`` does, but write nothing: the checks and what they find changed."""
    if not (run_dir / CONFIG_FILE).exists():
        if any((run_dir / "checkpoints").glob("step_*")):
            raise CheckpointError(
                f"run_dir={run_dir} holds checkpoints but no {CONFIG_FILE}, so nobody can tell "
                "what run they are of; bring the file back, delete the folder, or give another "
                "run_dir"
            )
        return {}
    lived = any("started" in life for life in read_lives(run_dir))
    return check_same_run(run_dir, config if lived else asked or config, complete_stage)


def check_same_run(
    run_dir: Path, config: RunConfig, complete_stage: CompleteSection | None = None
) -> dict[str, list[Any]]:
    """Return the keys of the frozen config that ``config`` changes, if all of them may change.

    A key that the schema got since the config was frozen had its default then.

    Args:
        run_dir: the run's folder.
        config: of this life.
        complete_stage: fills in the defaults of the ``stage`` section. Without it, as on a login
            node that must not load a stage, keys of that section which only one of the two has
            are left to the ranks.

    Raises:
        ConfigError: when another key differs.
    """
    frozen = read(run_dir / CONFIG_FILE)
    changes = differences(_completed(frozen, complete_stage), plain(config))
    if complete_stage is None:
        sections = (frozen.get("stage", {}), config.stage)
        both = set.intersection(*(set(dict(_leaves({"stage": s}))) for s in sections))
        changes = {k: v for k, v in changes.items() if k in both or k.split(".")[0] != "stage"}
    changeable = changeable_keys(plain(config))
    refused = {k: v for k, v in changes.items() if not matches(k, changeable)}
    if refused:
        lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items()]
        if "loop.max_steps" in refused and config.loop.epochs is not None:
            lines.append(
                "  (loop.epochs counts loop.max_steps from the prepared data: unless you set it, "
                "the data, or how it is read, has changed)"
            )
        raise ConfigError(
            f"run_dir={run_dir} belongs to a run with another config:\n"
            + "\n".join(lines)
            + "\ngive another run_dir, or the old values to resume it"
        )
    return {key: value for key, value in changes.items() if key != "run_dir"}


def changeable_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return which keys of a config a later life may change, as patterns."""
    schedule = values.get("schedule") or {}
    if schedule.get("name") == "constant" and not schedule.get("warmup_share"):
        # No learning rate of the past depends on them.
        return (*CHANGEABLE, "run_dir", "loop.max_steps", "loop.epochs")
    return (*CHANGEABLE, "run_dir")


def identify(values: Mapping[str, Any]) -> str:
    """Return a hash of everything in a config that no life may change."""
    keys = changeable_keys(values)
    fixed = {key: value for key, value in _leaves(values) if not matches(key, keys)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()


def _completed(frozen: dict[str, Any], complete_stage: CompleteSection | None) -> dict[str, Any]:
    """Return a frozen config with the defaults of keys that are newer than it."""
    config = build(RunConfig, frozen, "", [])
    if config is None:
        return frozen  # of a schema that knew other keys: the comparison names them
    whole = plain(config)
    return whole | {"stage": complete_stage(whole["stage"])} if complete_stage else whole


def record_life(
    run_dir: Path,
    launcher: str,
    world_size: int,
    changes: Mapping[str, Any],
    token: int | None = None,
) -> None:
    """Append when, where and with which changes this life of the run started."""
    life = {
        "started": utc_now(),
        "token": token,
        "host": socket.gethostname(),
        **slurm_life(os.environ),
        "launcher": launcher,
        "world_size": world_size,
        "directory": str(Path.cwd()),  # what relative paths of the config mean
        "first_step": newest_step(run_dir),
        "changes": dict(changes),
        "code": hash_code(),
        "config": identify(read(path)) if (path := run_dir / CONFIG_FILE).exists() else None,
    }
    with writing(run_dir):
        append_line(run_dir, life)


def read(path: Path) -> dict[str, Any]:
    """Return the plain data of a frozen config.

    Raises:
        CheckpointError: when the file is missing or is no YAML mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no configuration; restore it or give another run_dir")
    return values


def plain(config: RunConfig) -> dict[str, Any]:
    """Return ``config`` as nested dicts, lists and scalars."""
    return dataclasses.asdict(config)


def freeze(config: RunConfig) -> str:
    """Return ``config`` as YAML text."""
    return HEADER + yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the dotted keys whose values differ, each with its old and new value."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = dict.fromkeys([*before, *after])
    pairs = {key: [before.get(key, "absent"), after.get(key, "absent")] for key in keys}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{key}.{inner}", leaf) for inner, leaf in _leaves(value))
        else:
            yield str(key), value


def matches(key: str, patterns: tuple[str, ...]) -> bool:
    """Say whether a dotted key is one of ``patterns``, in which ``*`` stands for anything."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """Turn an error of writing into one that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"run_dir={run_dir} cannot be written: {error}; free space there, or choose a folder "
            "that you may write with run_dir=FOLDER"
        ) from error
