"""Look at data before training on it: what is read how, what is left out and why."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trainer.config import DataConfig
from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec, EncodedChat
from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.conversations import describe_file, walk_conversations
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.layouts import Layout
from trainer.data.chats.pair_encoder import PairEncoder
from trainer.data.chats.preferences import read_preferences
from trainer.data.chats.prompt_encoder import PromptEncoder
from trainer.data.chats.prompts import read_prompt
from trainer.data.prepared.check_pairs import describe_pairs
from trainer.data.prepared.merge import REJECTED
from trainer.data.prepared.prepare import describe_encoder, prepare
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.data.prepared.summary import content_remarks, left_out, source_table
from trainer.data.reading.files import list_files
from trainer.data.reading.raw import RowError
from trainer.data.reading.records import parse_record
from trainer.data.storage import naming_the_disk
from trainer.disk import unique_suffix
from trainer.errors import DataError

BAR_WIDTH = 40
MAX_FILES_SHOWN = 5
MAX_EXAMPLE_CHARS = 1500


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        report: to print.
        problems: why the data cannot be used as they are, one for each source.
    """

    report: RenderableType
    problems: list[str]


def check(data: DataConfig, tokenizer_path: str | Path) -> Checked:
    """Prepare every source aside, as for training, and describe it; nothing but lists is kept.

    Args:
        data: sources and options.
        tokenizer_path: tokenizer folder or SentencePiece model.

    Raises:
        ConfigError: no source, or a chat template that cannot be used.
        StorageError: the disk is full or not writable.
    """
    store_dir = Path(data.store_dir).expanduser()
    aside = store_dir / f"check-{unique_suffix()}"
    with naming_the_disk(aside):
        aside.mkdir(parents=True, exist_ok=True)
    try:
        return _check_all(data, tokenizer_path, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_all(data: DataConfig, tokenizer_path: str | Path, aside: Path) -> Checked:
    whole = dataclasses.replace(data, store_dir=str(aside), max_bad_row_share=1.0)
    describe_encoder(data, tokenizer_path)  # a template that does not fit concerns all sources
    if not data.sources:
        prepare(whole, tokenizer_path)  # says so
    store: TokenStore | None = None
    sections: list[RenderableType] = []
    problems: list[str] = []
    for name, config in data.sources.items():
        listed = Path(data.store_dir).expanduser() / f"{name}.{REJECTED}"
        try:
            one = prepare(dataclasses.replace(whole, sources={name: config}), tokenizer_path)
        except DataError as error:
            found = _keep_list(aside, listed)
            problems.append(f"{name}: {error}".replace(str(found), str(listed)))
            continue
        store = one if store is None else _join(store, one)
        source = one.sources[name]
        _keep_list(source.folder, listed)
        problems += _problems(name, source, data.max_bad_row_share, listed)
        sections.append(_section(source, data, listed))
    parts: list[RenderableType] = [] if store is None else [source_table(store), *sections]
    if data.content != "documents" and store is not None:
        good = {name: data.sources[name] for name in store.sources}
        parts += _example(dataclasses.replace(data, sources=good), tokenizer_path)
    return Checked(Group(*parts), problems)


def _join(store: TokenStore, more: TokenStore) -> TokenStore:
    return dataclasses.replace(store, sources={**store.sources, **more.sources})


def _keep_list(folder: Path, listed: Path) -> Path | None:
    """Copy the list of rows that were left out to where it stays; return where it was."""
    listed.unlink(missing_ok=True)
    found = [path for path in sorted(folder.glob(f"*{REJECTED}")) if path.stat().st_size]
    if found:
        with naming_the_disk(listed):
            shutil.copyfile(found[0], listed)
    return found[0] if found else None


def _problems(name: str, source: SourceStore, limit: float, listed: Path) -> Iterator[str]:
    rows = source.manifest["rows"]
    if rows["rejected"] > limit * rows["read"]:
        yield (
            f"{name}: {rows['rejected']} of {rows['read']} rows rejected, "
            f"{rows['rejected'] / rows['read']:.2%}, above data.max_bad_row_share={limit:g}; all "
            f"of them are in {listed}. Repair the files, or raise data.max_bad_row_share if these "
            "rows may be left out"
        )


def _section(source: SourceStore, data: DataConfig, listed: Path) -> RenderableType:
    lines: list[RenderableType] = [Text(f"\n{source.name}", style="bold")]
    lines += map(_indent, _reading(source.name, data))
    manifest = source.manifest
    lengths = manifest["lengths"]
    lines.append(
        Text(
            f"  tokens a row: median {lengths['median']:,}, 95 % up to "
            f"{lengths['percentile_95']:,}, longest {lengths['longest']:,}; data.max_length="
            f"{data.max_length:,}"
        )
    )
    lines.append(Padding(_histogram(lengths), (0, 0, 0, 2), expand=False))
    if source.content == "preferences":
        lines.append(Padding(describe_pairs(source), (0, 0, 0, 2), expand=False))
    notes = list(content_remarks(source))
    notes += [_reason(reason, number) for reason, number in manifest["reasons"]]
    if left_out(manifest):
        notes.append(f"rows left out are listed in {listed}")
    return Group(*lines, *map(_indent, notes))


def _reason(reason: str, number: int) -> str:
    """Return a line on rows left out for reasons that differ in numbers at most."""
    example = ", for example" if number > 1 and re.search(r"\d", reason) else ""
    return f"left out {number:,} times{example}: {reason}"


def _indent(line: str) -> Padding:
    return Padding(Text(line), (0, 0, 0, 2), expand=False)


def _reading(name: str, data: DataConfig) -> Iterator[str]:
    """Yield how a source's files are read."""
    source = data.sources[name]
    paths = list_files(source)
    for path in paths[:MAX_FILES_SHOWN]:
        if data.content != "documents":
            first, *more = describe_file(path, find_layout(path, source, data.content))
            yield f"{path.name}: {first}"
            yield from (f"  {line}" for line in more)
        else:
            yield path.name
    if len(paths) > MAX_FILES_SHOWN:
        yield f"and {len(paths) - MAX_FILES_SHOWN:,} files more"


def _histogram(lengths: dict[str, Any]) -> RenderableType:
    """Return rows by length in tokens, before any were cut, as bars."""
    counts = {int(edge): number for edge, number in lengths["up_to"].items()}
    occurring = [edge for edge, number in counts.items() if number]
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        show_header=False,
    )
    for justify in ("right", "left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    for edge in counts:
        if min(occurring) <= edge <= max(occurring):
            bar = Bar(max(counts.values()), 0, counts[edge], width=BAR_WIDTH)
            table.add_row(f"≤ {edge:,}", bar, f"{counts[edge]:,}")
    return table


def _example(data: DataConfig, tokenizer_path: str | Path) -> Iterator[RenderableType]:
    """Yield the first conversation, pair or prompt as the model sees it."""
    spec = describe_encoder(data, tokenizer_path)
    if not isinstance(spec, ChatSpec) or data.content == "documents":
        return
    encoder = spec.build()
    for source in data.sources.values():
        for path in list_files(source):
            layout = find_layout(path, source, data.content)
            for row in walk_conversations(path, source, layout):
                try:
                    shown = list(_show(parse_record(row.value), layout, encoder))
                except (RowError, RecursionError):
                    continue  # listed already
                place = f"{path.name}:{row.number}"
                yield Text(f"\n{place} as the model sees it; what it learns is ⟦marked⟧", "bold")
                yield from shown
                return


def _show(record: dict[str, Any], layout: Layout, encoder: ChatEncoder) -> Iterator[Text]:
    """Yield what one record becomes; raises RowError when it becomes nothing."""
    if isinstance(encoder, PairEncoder):
        pair = encoder.encode_pair(read_preferences(record, layout)[0][0])
        for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if side is not None:
                yield Text(f"{name}:", "bold")
                yield highlight(side)
    elif isinstance(encoder, PromptEncoder):
        prompt, answer = read_prompt(record, layout)
        yield Text(_shorten(encoder.render_prompt(prompt)), "dim")
        if answer is not None:
            yield Text(f"answer of the file: {_shorten(answer)}")
    else:
        yield highlight(encoder.encode(read_conversation(record, layout)).chats[0])


def highlight(chat: EncodedChat) -> Text:
    """Return a rendered conversation with what is learnt of it marked by brackets and colour."""
    text, at = Text(), 0
    for start, end in chat.learnt:
        text.append(_shorten(chat.text[at:start]), "dim")
        text.append("⟦", "bold green").append(_shorten(chat.text[start:end]), "green")
        text.append("⟧", "bold green")
        at = end
    return text.append(_shorten(chat.text[at:]), "dim")


def _shorten(text: str) -> str:
    half = MAX_EXAMPLE_CHARS // 2
    return text if len(text) <= MAX_EXAMPLE_CHARS else f"{text[:half]} […] {text[-half:]}"
