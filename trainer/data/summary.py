"""What a store holds, as a table to read."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from trainer.config import DataConfig
from trainer.data.merge import REJECTED
from trainer.data.store import SourceStore, TokenStore

COLUMNS = (
    *("source", "docs", "chars", "tokens", "tokens/char"),
    *("held out", "short", "rejected", "rows"),
)


def summarise(store: TokenStore, data: DataConfig) -> RenderableType:
    """Return a table with one line a source, and remarks on what was left out."""
    table = Table(box=None, padding=(0, 1, 0, 0), caption=f"token store {data.store_dir}")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "source" else "right", no_wrap=True)
    remarks = []
    for name, source in store.sources.items():
        table.add_row(name, *_cells(source))
        remarks += _remarks(name, source)
    return Group(table, *remarks)


def _cells(source: SourceStore) -> list[str]:
    manifest = source.manifest
    rows, num_special = manifest["rows"], _num_special(source) * manifest["num_documents"]
    return [
        f"{manifest['num_documents']:,}",
        f"{manifest['num_chars']:,}",
        f"{manifest['num_tokens']:,}",
        f"{(manifest['num_tokens'] - num_special) / manifest['num_chars']:.3f}",
        f"{len(source.document_ids(held_out=True)):,}",
        f"{rows['short']:,}",
        f"{rows['rejected']:,}",
        f"{rows['read']:,}",
    ]


def _num_special(source: SourceStore) -> int:
    """Return how many tokens of each document are its start and end."""
    return sum(source.manifest[key] is not None for key in ("bos_token_id", "eos_token_id"))


def _remarks(name: str, source: SourceStore) -> list[str]:
    remarks = []
    if not len(source.document_ids(held_out=True)):
        remarks.append(
            f"{name}: no document is held out, so it cannot be evaluated; raise "
            f"data.sources.{name}.holdout_share={source.holdout_share:g}"
        )
    if source.manifest["rows"]["rejected"]:
        remarks.append(f"{name}: rejected rows and their reasons are in {source.folder / REJECTED}")
    return remarks
