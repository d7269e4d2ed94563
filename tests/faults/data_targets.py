"""Every reader of training data, with valid files of every format."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from broken_bytes import Rows, Target
from chat_tokenizers import sentencepiece_tokenizer

from trainer.config import SourceConfig
from trainer.data.chats.chat_encoder import ChatEncoder, ChatSpec
from trainer.data.chats.conversations import walk_conversations
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.pair_encoder import PairSpec
from trainer.data.chats.prompt_encoder import PromptSpec
from trainer.data.chats.templates import resolve_template
from trainer.data.prepared.chat_shards import add_chats
from trainer.data.prepared.drafts import start_draft
from trainer.data.reading.files import open_bytes
from trainer.data.reading.readers import decode_row, walk_file
from trainer.data.reading.records import RejectLog

TEXTS = ["海流 Kuroshio flows north", "line one\nline two", "U+2028\u2028stays", "𠮷 " * 20]
CHAT = [{"role": "user", "content": "海?"}, {"role": "assistant", "content": "流 yes"}]
PAIR = {"prompt": "which?", "chosen": "this one", "rejected": "that one"}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def as_jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: Any) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_csv(rows: Sequence[dict[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return out.getvalue().encode()


def as_xlsx(rows: Sequence[dict[str, Any]]) -> bytes:
    book, out = openpyxl.Workbook(), io.BytesIO()
    assert book.active is not None
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append(list(row.values()))
    book.save(out)
    return out.getvalue()


def as_xls(rows: Sequence[dict[str, Any]]) -> bytes:
    import xlwt

    book, out = xlwt.Workbook(), io.BytesIO()
    sheet = book.add_sheet("a")
    for y, cells in enumerate([list(rows[0]), *(list(row.values()) for row in rows)]):
        for x, cell in enumerate(cells):
            sheet.write(y, x, cell)
    book.save(out)
    return out.getvalue()


def as_parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()


def as_arrow(rows: Sequence[dict[str, Any]], stream: bool) -> bytes:
    out, table = io.BytesIO(), pa.Table.from_pylist(list(rows))
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def read_texts(path: Path) -> Rows:
    """Read a file as documents; lines are counted apart from the reader."""
    is_lines = path.name.startswith("lines")
    source = SourceConfig([str(path)], format="lines" if is_lines else "auto")
    rejects = RejectLog(path.with_name("rejected"), 1.0)
    texts = rows = 0
    for row in walk_file(path, source):
        rows += 1
        texts += decode_row(row, path, source, rejects) is not None
    rejects.close()
    written = rejects.path.read_bytes().count(b"\n") if rejects.num_rejected else 0
    assert (texts, written) == (rejects.num_accepted, rejects.num_rejected)
    return Rows(count_lines(path, rows), rejects.num_accepted, rejects.num_rejected)


def count_lines(path: Path, counted: int) -> int:
    """Return the lines that are not blank of UTF-8 files of lines; else what the reader counted."""
    if not path.name.startswith(("lines", "a.jsonl")):
        return counted
    with open_bytes(path) as stream:
        content = stream.read()
    is_other = content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in content
    try:
        content.decode()
    except UnicodeDecodeError:
        is_other = True  # perhaps read as another encoding
    if is_other or content.lstrip().startswith(b"["):
        return counted
    return sum(not line.isspace() and line != b"" for line in content.split(b"\n"))


def chat_reader(content: Any, encoder: ChatEncoder) -> Callable[[Path], Rows]:
    """Return a reader of conversations, preferences or prompts, encoded as preparation does."""

    def read(path: Path) -> Rows:
        source = SourceConfig([str(path)])
        layout = find_layout(path, source, content)
        rows = list(walk_conversations(path, source, layout))
        draft, rejects = start_draft(path.with_name("0.npz"), 1.0)
        add_chats(draft, iter(rows), path, layout, encoder, rejects, lambda *_: None)
        draft.write(path.with_name("0.npz"), rejects, encoder.dtype)
        return Rows(len(rows), rejects.num_accepted, rejects.num_rejected)

    return read


def table_seeds(rows: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Return rows of texts in every format and compression."""
    plain = {
        "a.jsonl": as_jsonl(rows),
        "a.json": as_json(rows),
        "a.csv": as_csv(rows),
        "a.tsv": as_csv(rows, "\t"),
        "a.parquet": as_parquet(rows),
        "a.arrow": as_arrow(rows, stream=False),
    }
    packed = {
        f"{name}{suffix}": COMPRESS[suffix](content)
        for name, content in plain.items()
        for suffix in (".gz", ".zst")
    }
    others = {
        "b.arrow": as_arrow(rows, stream=True),
        "a.xlsx": as_xlsx(rows),
        "a.xls": as_xls(rows),
    }
    return plain | packed | others


def one_by_one(seeds: dict[str, bytes], read: Callable[[Path], Rows | None]) -> list[Target]:
    """Return a target a format, so that splices stay within it; compressed ones together."""
    kinds: dict[str, dict[str, bytes]] = {}
    for name, content in seeds.items():
        kind = name.rpartition(".")[2]
        kinds.setdefault("gz and zst" if kind in ("gz", "zst") else kind, {})[name] = content
    return [Target(f"texts {kind}", files, read) for kind, files in kinds.items()]


def data_targets() -> list[Target]:
    """Return the readers of training data."""
    tokenizer = sentencepiece_tokenizer()
    template = resolve_template(tokenizer, "chatml")
    texts = [{"id": str(n), "text": text} for n, text in enumerate(TEXTS)]
    seeds = table_seeds(texts) | {
        "a.txt": "\n".join(TEXTS).encode(),
        "lines.txt": "\n".join(TEXTS).encode("cp950", "replace"),
        "lines16.txt": "\n".join(TEXTS).encode("utf-16"),
    }
    chats: list[dict[str, Any]] = [{"messages": CHAT * n} for n in (1, 2, 3)]
    asked = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(4)]
    shared = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    chat_seeds = table_seeds(asked) | {"m.jsonl": as_jsonl(chats), "s.json": as_json(shared * 3)}
    pair_seeds = table_seeds([PAIR] * 3) | {
        "c.jsonl": as_jsonl([{"chosen": CHAT, "rejected": [CHAT[0], CHAT[1] | {"content": "no"}]}]),
        "k.jsonl": as_jsonl([{"prompt": "q", "completion": "a", "label": n > 1} for n in range(4)]),
    }
    chat = ChatSpec.of(tokenizer, template, train_on="all", max_length=120).build()
    pair = PairSpec.of(tokenizer, template, train_on="last", max_length=120).build()
    prompt = PromptSpec.of(tokenizer, template, max_length=60).build()
    return [
        *one_by_one(seeds, read_texts),
        Target("conversations", chat_seeds, chat_reader("conversations", chat)),
        Target("preferences", pair_seeds, chat_reader("preferences", pair)),
        Target("prompts", chat_seeds, chat_reader("prompts", prompt)),
    ]
