"""Find a file's layout: from the source's options, a ``dataset_info.json``, and the file itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from trainer.config import SourceConfig, nearest
from trainer.data.chats.layouts import Content, Layout, Schema
from trainer.data.chats.messages import ROLE_KEYS
from trainer.data.chats.preference_search import (
    choose_answers,
    describe_answers,
    find_answer_form,
    find_preference,
    refuse_others,
    refuse_preferences,
)
from trainer.data.chats.tool_calls import parse_json
from trainer.data.reading.answer_columns import ANSWER_NAMES
from trainer.data.reading.columns import NAMES, guess_columns, list_headers
from trainer.data.reading.files import (
    BINARY_FORMATS,
    detect_encoding,
    detect_format,
    naming_the_file,
)
from trainer.data.reading.llama_factory import Entry, find_entry, read_entries
from trainer.data.reading.nesting import find_nesting, unnest
from trainer.data.reading.raw import Row, RowError
from trainer.data.reading.records import parse_record
from trainer.data.reading.rows import iterate_rows
from trainer.errors import DataError

SAMPLE_ROWS = 1024  # looked at for columns and for what they hold
SCHEMAS: tuple[Schema, ...] = get_args(Schema)
TABLES = ("csv", "tsv", "xlsx", "xls")
LISTS: tuple[Schema, ...] = ("sharegpt", "messages")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Options:
    """What is known of a file before it is opened."""

    path: Path
    schema: str
    columns: Mapping[str, str]
    entry: Entry | None
    content: Content
    is_table: bool  # under a header line


def find_layout(path: Path, source: SourceConfig, content: Content = "conversations") -> Layout:
    """Return how the conversations of ``path`` are read.

    Args:
        path: one of ``list_files(source)``.
        source: its options.
        content: conversations to learn, preferences, or prompts: an answer is not asked for.

    Raises:
        DataError: the file is unreadable, or has no such content that could be recognised; the
            message names the columns it has.
    """
    with naming_the_file(path):
        stat = path.stat()
    asked = _Asked(path, content, stat.st_size, stat.st_mtime_ns, repr(source), source)
    return _find_layout(asked)


@dataclass(frozen=True)
class _Asked:
    """A file as it was when its layout was asked for."""

    path: Path
    content: Content
    num_bytes: int
    mtime_ns: int
    options: str
    source: SourceConfig = field(compare=False)


@lru_cache(maxsize=4096)  # preparation asks several times, and logs once
def _find_layout(asked: _Asked) -> Layout:
    path, source, content = asked.path, asked.source, asked.content
    encoding = detect_encoding(path, source.encoding)
    format_name = detect_format(path, source.format, source.encoding)
    if format_name in ("txt", "lines"):
        if content == "prompts":  # a question a line
            return Layout("prompt_response", (("prompt", "text"),), "lines", encoding, prompts=True)
        raise DataError(
            f"{path} is plain text, which holds no conversations; remove it from the source, or "
            "set the source's format if its name is wrong"
        )
    options = _options(path, source, content, format_name in TABLES)
    wanted = [name for name in options.columns.values() if name]
    with naming_the_file(path):
        rows = iterate_rows(path, format_name, None, encoding, source.sheet, wanted)
        sample = list(islice(rows, SAMPLE_ROWS))
    records = _records(sample, path)
    nested = find_nesting(records[0])
    if nested:
        records = _unnest(records, nested, path)
    schema, columns = _recognise(records, options)
    entry = options.entry
    layout = Layout(
        schema=schema,
        columns=tuple(sorted((ours, name) for ours, name in columns.items() if name)),
        format=format_name,
        encoding="" if format_name in BINARY_FORMATS else encoding,
        sheet=source.sheet if format_name in ("xlsx", "xls") else None,
        role_key=entry.role_key if entry else "",
        content_key=entry.content_key if entry else "",
        roles=tuple(sorted(entry.roles.items())) if entry else (),
        nested=nested,
        max_rows=entry.num_samples if entry else None,
        prompts=content == "prompts",
        **describe_answers(records, columns, source.ranked_pairs, content),
    )
    unread = [name for name in _headers(records) if name not in dict(layout.columns).values()]
    logger.info(
        "%s: %s; columns not read: %s", path, layout.describe(), list_headers(unread) or "-"
    )
    return layout


def _options(path: Path, source: SourceConfig, content: Content, is_table: bool) -> _Options:
    if source.schema not in ("auto", *SCHEMAS):
        raise DataError(
            f"schema={source.schema!r} is not one of auto, {', '.join(SCHEMAS)}"
            f"{nearest(source.schema, SCHEMAS)}"
        )
    explicit = source.columns or {}
    names = NAMES if content == "conversations" else (*NAMES, *ANSWER_NAMES)
    for name in explicit:
        if name not in names:
            raise DataError(
                f"columns={{{name}: ...}} is written OURS: COLUMN OF THE FILE, and ours are "
                f"{', '.join(names)}{nearest(name, names)}"
            )
    entry = find_entry(path, read_entries(source)) if source.datasets else None
    if entry is not None and entry.holds_preferences and content == "conversations":
        raise DataError(
            f"dataset {entry.name!r} holds preferences, which are no answers to learn as they "
            "stand (LLaMA-Factory refuses or drops them in supervised fine-tuning too)"
        )
    columns = {**(entry.columns if entry else {}), **explicit}
    return _Options(path, source.schema, columns, entry, content, is_table)


def _records(rows: Sequence[Row], path: Path) -> list[dict[str, Any]]:
    """Return the records among the first rows."""
    records, reason = [], ""
    for row in rows:
        try:
            records.append(parse_record(row.value))
        except RowError as error:
            reason = reason or str(error)
    if not rows:
        raise DataError(f"{path} holds no row; remove it from the source or restore it")
    if not records:
        raise DataError(
            f"{path}: none of the first {len(rows)} rows can be read; the first: {reason}"
        )
    return records


def _unnest(records: list[dict[str, Any]], nested: str, path: Path) -> list[dict[str, Any]]:
    try:
        return [inner for record in records[:1] for inner in unnest(record, nested)]
    except RowError as error:
        raise DataError(f"{path}: its first record cannot be read: {error}") from error


def _headers(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(str(name) for record in records for name in record if name))


def _recognise(records: list[dict[str, Any]], options: _Options) -> tuple[Schema, dict[str, str]]:
    """Return schema and columns."""
    headers = _headers(records)
    _check_named(headers, options)
    if options.content == "conversations":
        answers: dict[str, str] = {}
        if not options.columns:
            refuse_preferences(records, headers, options.path)
    elif options.entry is not None and options.entry.columns:
        answers = {k: v for k, v in options.columns.items() if k in ANSWER_NAMES and v in headers}
    else:
        answers = choose_answers(records, headers, options.columns)
    free = [header for header in headers if header not in answers.values()]
    columns = _choose_columns(records, free, options)
    columns = {k: v for k, v in columns.items() if k not in ANSWER_NAMES} | answers
    if options.content == "preferences" and not find_preference(records, columns):
        refuse_others(headers, options.path)
    if "messages" in columns:
        first = _first_message(records, columns["messages"])
        schema: Schema = "sharegpt" if "from" in first else "messages"
        if options.schema in LISTS:
            schema = "sharegpt" if options.schema == "sharegpt" else "messages"
        kept = ("messages", "system", "tools", *ANSWER_NAMES)
        return schema, {name: columns[name] for name in kept if name in columns}
    missing = _missing(records, columns, options)
    if options.schema in LISTS or missing:
        missing = ["messages"] if options.schema in LISTS else missing
        wanted = " and the ".join(missing)
        example = ", ".join(f'{name}: "COLUMN"' for name in missing)
        hint = "; a table needs a header line" if options.is_table else ""
        raise DataError(
            f"{options.path}: no column is known to hold the {wanted}; its columns are "
            f"{list_headers(headers)}. Name them in the source's columns: {{{example}}}{hint}"
        )
    if "prompt" not in columns:
        return "messages", columns
    return _schema_of(columns, options), columns


def _missing(
    records: list[dict[str, Any]], columns: Mapping[str, str], options: _Options
) -> list[str]:
    """Return what no column is known to hold."""
    needed = ["prompt", "response"]
    if options.content == "prompts" or "chosen" in columns:
        needed.remove("response")
    if "chosen" in columns and find_answer_form(records, columns["chosen"]) != "text":
        needed.remove("prompt")  # the answers' columns may hold whole conversations
    return [name for name in needed if name not in columns]


def _schema_of(columns: Mapping[str, str], options: _Options) -> Schema:
    for schema in SCHEMAS:
        if options.schema == schema:
            return schema
    if "context" in columns and columns["prompt"].lower() == "question":
        return "squad"
    return "alpaca" if columns["prompt"].lower() == "instruction" else "prompt_response"


def _choose_columns(
    records: list[dict[str, Any]], headers: list[str], options: _Options
) -> dict[str, str]:
    """Return what is set explicitly over what is guessed."""
    entry = options.entry
    if entry is not None and entry.columns:
        return {name: column for name, column in options.columns.items() if column}
    taken = set(options.columns.values())
    guessed = guess_columns(header for header in headers if header not in taken)
    lists_wanted = entry.keeps_messages if entry is not None else options.schema in LISTS
    table_wanted = options.schema not in ("auto", *LISTS) or "prompt" in options.columns
    table_wanted = table_wanted or (entry is not None and not lists_wanted)
    if "messages" in guessed:
        is_list = bool(_first_message(records, guessed["messages"])) or lists_wanted
        if table_wanted or not is_list:
            del guessed["messages"]
    columns = {**guessed, **options.columns}
    if not (table_wanted or {"messages", "prompt"} & set(columns)):
        lists = [name for name in headers if ROLE_KEYS & set(_first_message(records, name))]
        columns |= {"messages": lists[0]} if len(lists) == 1 else {}
    return {name: column for name, column in columns.items() if column}


def _first_message(records: list[dict[str, Any]], column: str) -> dict[str, Any]:
    """Return the first message in ``column`` of any record, {} when it holds no messages."""
    for record in records:
        try:
            value = parse_json(record.get(column), column)
        except RowError:
            continue  # judged when its row is read
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return dict(value[0])
    return {}


def _check_named(headers: list[str], options: _Options) -> None:
    for ours, name in options.columns.items():
        if options.entry is not None and ours not in ("prompt", "response", "messages"):
            continue  # entries name columns that their files need not fill
        if name and name not in headers:
            raise DataError(
                f"{options.path} has no column {name!r}, which columns.{ours} names; its columns "
                f"are {list_headers(headers)}{nearest(name, headers)}"
            )
