"""LLaMA-Factory's ``dataset_info.json``: which file a dataset's name stands for, and how it reads.

The keys are described in data/README.md of https://github.com/hiyouga/LLaMA-Factory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import SourceConfig, nearest
from trainer.errors import DataError

INFO_FILE = "dataset_info.json"
HUBS = {"hf_hub_url": "huggingface.co", "ms_hub_url": "modelscope.cn", "om_hub_url": "modelers.cn"}
MEDIA = ("images", "videos", "audios")
PREFERENCES = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools")
ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Entry:
    """One dataset of a ``dataset_info.json``.

    Attributes:
        name: its key.
        path: its file, or a folder of files.
        keeps_messages: ShareGPT's or OpenAI's form; else a question and its answer.
        columns: our column names with the file's; empty = to be guessed.
        role_key: where a message keeps its speaker; empty = to be guessed.
        content_key: where it keeps its text; empty = to be guessed.
        roles: names of speakers with ours.
        num_samples: rows to use at most.
        holds_preferences: whether its answers are ranked, or labelled as good or bad.
    """

    name: str
    path: Path
    keeps_messages: bool
    columns: Mapping[str, str] = field(default_factory=dict)
    role_key: str = ""
    content_key: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)
    num_samples: int | None = None
    holds_preferences: bool = False


def read_entries(source: SourceConfig) -> list[Entry]:
    """Return the entries that ``source.datasets`` names, in that order.

    Raises:
        DataError: no such file or name, or a dataset that is not here or holds media.
    """
    info, folder = _find_info(source)
    try:
        described = json.loads(info.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{info} cannot be read as JSON: {error}") from error
    if not isinstance(described, dict):
        raise DataError(f"{info} holds {type(described).__name__}, not an object of datasets")
    entries = []
    for name in source.datasets:
        if name not in described:
            local = [key for key, value in described.items() if "file_name" in str(value)]
            raise DataError(
                f"{info} has no dataset {name!r} (those with files of their own are "
                f"{', '.join(local) or 'none'}){nearest(name, list(described))}"
            )
        entries.append(parse_entry(name, described[name], folder, info))
    return entries


def _find_info(source: SourceConfig) -> tuple[Path, Path]:
    """Return the description and the folder that its file names are relative to."""
    if len(source.paths) != 1:
        raise DataError(
            f"datasets={source.datasets} needs exactly one folder (or {INFO_FILE}) in paths, got "
            f"{source.paths}"
        )
    path = Path(source.paths[0]).expanduser()
    folder = path if path.is_dir() else path.parent
    if source.dataset_info is not None:
        return Path(source.dataset_info).expanduser(), folder
    info = path / INFO_FILE if path.is_dir() else path
    if not info.is_file():
        raise DataError(
            f"{info} does not exist, but datasets={source.datasets} are described there; set "
            "paths to LLaMA-Factory's data folder, or dataset_info to the file"
        )
    return info, folder


def parse_entry(name: str, value: Any, folder: Path, info: Path) -> Entry:
    """Return one entry of ``info``; raises as ``read_entries`` does."""
    where = f"dataset {name!r} of {info}"
    if not isinstance(value, dict):
        raise DataError(f"{where} is {type(value).__name__}, not an object")
    columns, tags = value.get("columns") or {}, value.get("tags") or {}
    formatting = value.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where} has the unknown formatting {formatting!r}")
    if not isinstance(columns, dict) or not isinstance(tags, dict):
        raise DataError(f"{where}: columns and tags must be objects")
    media = [key for key in MEDIA if columns.get(key)]
    if media:
        raise DataError(f"{where} holds {', '.join(media)}; only text can be trained")
    keeps_messages = formatting != "alpaca"
    known = {key: str(columns[key]) for key in COLUMNS if columns.get(key)}
    answers = {ours: str(columns[key]) for key, ours in PREFERENCES.items() if columns.get(key)}
    needed = {"prompt"} if "chosen" in answers else {"prompt", "response"}
    if columns and not keeps_messages and not needed <= set(known):
        raise DataError(
            f"{where} names no {'response' if 'prompt' in known else 'prompt'} column: it is a "
            "text for pretraining; read its file as documents"
        )
    return Entry(
        name,
        _find_file(name, value, folder, where),
        keeps_messages,
        {} if keeps_messages and "messages" not in known else known | answers,
        str(tags.get("role_tag") or ""),
        str(tags.get("content_tag") or ""),
        {str(tags[tag]): role for tag, role in ROLE_TAGS.items() if tags.get(tag)},
        _num_samples(value.get("num_samples"), where),
        bool(value.get("ranking") or answers),
    )


def _find_file(name: str, value: dict[str, Any], folder: Path, where: str) -> Path:
    file_name = value.get("file_name")
    try:
        if isinstance(file_name, str) and (folder / file_name).exists():
            return folder / file_name
    except (OSError, ValueError) as error:  # too long for a name, or with a NUL in it
        raise DataError(f"{where}: its file_name is none: {str(error)[:200]}") from error
    hubs = [f"{value[key]} on {site}" for key, site in HUBS.items() if value.get(key)]
    if isinstance(file_name, str):
        raise DataError(f"{where}: its file {folder / file_name} does not exist; put it there")
    if hubs:
        subset = "".join(f", {k} {value[k]}" for k in ("subset", "folder", "split") if k in value)
        raise DataError(
            f"{where} is not on this machine: download {' or '.join(hubs)}{subset}, put the file "
            f"in {folder} and add its file_name to the entry"
        )
    raise DataError(
        f"{where} names neither a file nor a hub (a script_url or a cloud is not read): "
        "add a file_name"
    )


def _num_samples(value: object, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"{where}: num_samples={value!r} is no number of rows")
    return value


def find_entry(path: Path, entries: list[Entry]) -> Entry:
    """Return the entry that ``path`` belongs to.

    Raises:
        DataError: none does, or several do and read it in different ways.
    """
    found = [entry for entry in entries if entry.path == path or entry.path in path.parents]
    if not found:
        raise DataError(f"{path} is of none of the datasets {', '.join(e.name for e in entries)}")
    for other in found[1:]:
        if _reading(other) != _reading(found[0]):
            raise DataError(
                f"datasets {found[0].name!r} and {other.name!r} read {path} in different ways; "
                "give them a source each"
            )
    return found[0]


def _reading(entry: Entry) -> tuple[object, ...]:
    roles = sorted(entry.roles.items())
    columns = sorted(entry.columns.items())
    keys = (entry.role_key, entry.content_key, entry.num_samples)
    return entry.keeps_messages, columns, roles, *keys
