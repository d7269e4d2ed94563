"""What a store holds, as a table to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from trainer.config import DataConfig
from trainer.data.prepared.merge import REJECTED
from trainer.data.prepared.store import SourceStore, TokenStore
from trainer.data.reading.remarks import Remarks

Cell = Callable[[SourceStore], str]
TOO_LONG = {  # why, by what was left out
    "conversations": "not one turn of them fits",
    "pairs": "their last turn with both answers does not fit",
    "prompts": "they do not fit",
}


def summarise(store: TokenStore, data: DataConfig) -> RenderableType:
    """Return a table with one line a source, and remarks on what was left out."""
    caption = f"token store {data.store_dir}"
    remarks = [
        remark for name, source in store.sources.items() for remark in _remarks(name, source)
    ]
    return Group(source_table(store, caption), *remarks)


def source_table(store: TokenStore, caption: str | None = None) -> Table:
    """Return a table with one line a source."""
    table = Table(box=None, padding=(0, 1, 0, 0), caption=caption)
    cells = CELLS[next(iter(store.sources.values())).content]()
    for column in ("source", *cells):
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    for name, source in store.sources.items():
        table.add_row(name, *(cell(source) for cell in cells.values()))
    return table


def _text_cells() -> dict[str, Cell]:
    return {
        "docs": lambda source: f"{source.manifest['num_documents']:,}",
        "chars": lambda source: f"{source.manifest['num_chars']:,}",
        "tokens": lambda source: f"{source.manifest['num_tokens']:,}",
        "tokens/char": _tokens_per_char,
        "held out": _held_out,
        "short": _row_count("short"),
        "rejected": _row_count("rejected"),
        "twice": lambda source: f"{source.manifest['lengths']['duplicates']:,}",
        "rows": _row_count("read"),
    }


def _chat_cells() -> dict[str, Cell]:
    return {
        "chats": _chat_count("kept"),
        "turns": _chat_count("turns"),
        "tokens": lambda source: f"{source.manifest['num_tokens']:,}",
        "trained": _trained_share,
        "held out": _held_out,
        "cut": _chat_count("cut"),
        "too long": _chat_count("long"),
        "rejected": _row_count("rejected"),
        "twice": lambda source: f"{source.manifest['lengths']['duplicates']:,}",
        "rows": _row_count("read"),
    }


def _pair_cells() -> dict[str, Cell]:
    return {
        "pairs": _chat_count("kept"),
        "good": _chat_count("desirable"),
        "bad": _chat_count("undesirable"),
        "tokens": lambda source: f"{source.manifest['num_tokens']:,}",
        "trained": _trained_share,
        "held out": _held_out,
        "cut": _chat_count("cut"),
        "too long": _chat_count("long"),
        "equal": _chat_count("equal"),
        "rejected": _row_count("rejected"),
        "twice": lambda source: f"{source.manifest['lengths']['duplicates']:,}",
        "rows": _row_count("read"),
    }


def _prompt_cells() -> dict[str, Cell]:
    return {
        "prompts": _chat_count("kept"),
        "answered": _chat_count("answered"),
        "tokens": lambda source: f"{source.manifest['num_tokens']:,}",
        "held out": _held_out,
        "too long": _chat_count("long"),
        "rejected": _row_count("rejected"),
        "twice": lambda source: f"{source.manifest['lengths']['duplicates']:,}",
        "rows": _row_count("read"),
    }


CELLS: dict[str, Callable[[], dict[str, Cell]]] = {
    "documents": _text_cells,
    "conversations": _chat_cells,
    "preferences": _pair_cells,
    "prompts": _prompt_cells,
}


def _row_count(kind: str) -> Cell:
    return lambda source: f"{source.manifest['rows'][kind]:,}"


def _chat_count(kind: str) -> Cell:
    return lambda source: f"{source.manifest['chats'].get(kind, 0):,}"


def _held_out(source: SourceStore) -> str:
    return f"{len(source.document_ids(held_out=True)):,}"


def _tokens_per_char(source: SourceStore) -> str:
    manifest = source.manifest
    special = sum(manifest[key] is not None for key in ("bos_token_id", "eos_token_id"))
    num_tokens = manifest["num_tokens"] - special * manifest["num_documents"]
    return f"{num_tokens / manifest['num_chars']:.3f}"


def _trained_share(source: SourceStore) -> str:
    return f"{source.manifest['chats']['trained_tokens'] / source.manifest['num_tokens']:.1%}"


def _remarks(name: str, source: SourceStore) -> Iterator[str]:
    if not len(source.document_ids(held_out=True)):
        kind = source.content.removesuffix("s")
        yield (
            f"{name}: no {kind} is held out, so it cannot be evaluated; raise "
            f"data.sources.{name}.holdout_share={source.holdout_share:g}"
        )
    yield from (f"{name}: {line}" for line in content_remarks(source))
    if left_out(source.manifest):
        yield f"{name}: rows left out and their reasons are in {source.folder / REJECTED}"


def left_out(manifest: Any) -> int:
    """Return how many rows of a source are in its list of rejected rows."""
    chats = manifest["chats"]
    return int(manifest["rows"]["rejected"] + chats.get("long", 0) + chats.get("unlike", 0))


def content_remarks(source: SourceStore) -> Iterator[str]:
    """Yield what should be known of a source's conversations, pairs or prompts."""
    manifest = source.manifest
    chats, lengths = manifest["chats"], manifest["lengths"]
    what = "pairs" if source.content == "preferences" else source.content
    if chats.get("turns_cut"):
        turns = "old turns" if what == "pairs" else "answers"
        yield (
            f"{chats['turns_cut']:,} {turns} of {chats['cut']:,} {what} were cut off by "
            f"data.max_length; the longest of all has {lengths['longest']:,} tokens"
        )
    if chats.get("long"):
        yield (
            f"{chats['long']:,} {what} were left out: {TOO_LONG[what]} into "
            f"data.max_length; {lengths['percentile_95']:,} would hold 95 % of all"
        )
    if chats.get("unlike"):
        yield f"{chats['unlike']:,} pairs of ranked lists were left out, with others of them kept"
    if bool(chats.get("desirable")) != bool(chats.get("undesirable")):
        missing = "undesirable" if chats.get("desirable") else "desirable"
        yield f"no answer is labelled {missing}: KTO needs both labels"
    if chats.get("spells_control"):
        yield (
            f"{chats['spells_control']:,} {what} spell a special token of the tokenizer, "
            "which is read as that token, as apply_chat_template does"
        )
    if chats.get("hides_thoughts"):
        yield (
            f"{chats['hides_thoughts']:,} {what} hold thoughts that the chat template does "
            "not show: they are not learnt; data.template=qwen3 shows them"
        )
    if source.content in ("preferences", "prompts") and lengths["duplicates"]:
        yield f"{lengths['duplicates']:,} {what} occurred before, word for word: they are kept"
    yield from Remarks(manifest["remarks"]).lines()
