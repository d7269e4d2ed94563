"""What a chunk of a file has become so far, and the shard it is written to."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.prepared.store import CONTENT_ARRAYS, DOCUMENT_ARRAYS
from trainer.data.reading.records import Reject, RejectLog
from trainer.data.reading.remarks import Remarks
from trainer.data.storage import atomic_file
from trainer.disk import unique_suffix

WEIGHTS = np.dtype("<f4")
# One entry an accepted row: its tokens before any were cut, and a hash of all of it.
ROW_ARRAYS: dict[str, np.dtype[Any]] = {
    "row_lengths": np.dtype("<u4"),
    "row_hashes": np.dtype("<u8"),
}
COUNTS = "counts"  # JSON: rows by fate, chats, remarks
PAIRS, PROMPTS = CONTENT_ARRAYS["preferences"], CONTENT_ARRAYS["prompts"]
# Arrays of values, one a document or a row.
COLUMNS = {
    **DOCUMENT_ARRAYS,
    **{name: PAIRS[name] for name in ("first_lengths", "margins")},
    **{name: PROMPTS[name] for name in ("answer_lengths", "chat_lengths")},
    **ROW_ARRAYS,
}


@dataclass
class Draft:
    """Documents and conversations of one chunk.

    Attributes:
        tokens: ids of each document, as bytes.
        weights: loss weights of each document's tokens, as bytes; empty for texts and prompts.
        answers: of each prompt, as UTF-8 bytes.
        prompts: messages and tools of each, as JSON.
        columns: values by name, of ``COLUMNS``.
        short: texts below ``data.min_chars``.
        left_out: good rows that do not fit into ``data.max_length``.
        chats: counts of conversations and their turns; empty for texts.
        remarks: what was noticed about conversations.
    """

    tokens: list[bytes] = field(default_factory=list)
    weights: list[bytes] = field(default_factory=list)
    answers: list[bytes] = field(default_factory=list)
    prompts: list[bytes] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    short: int = 0
    left_out: list[Reject] = field(default_factory=list)
    chats: Counter[str] = field(default_factory=Counter)
    remarks: Remarks = field(default_factory=Remarks)

    def add(self, **values: float) -> None:
        """Append a value to each named column."""
        for name, value in values.items():
            self.columns[name].append(value)

    def write(self, path: Path, rejects: RejectLog, token_type: np.dtype[Any]) -> None:
        """Write the shard in one step; close the log of rejected rows and take it in."""
        rejects.close()
        log = rejects.path
        rejected_rows = log.read_bytes() if log is not None and rejects.num_rejected else b""
        rows = {"read": rejects.num_read, "rejected": rejects.num_rejected, "short": self.short}
        counts = {"rows": rows, "chats": dict(self.chats), "remarks": self.remarks.counts}
        left_out = "".join(json.dumps(vars(reject)) + "\n" for reject in self.left_out)
        arrays = {name: np.array(self.columns[name], dtype) for name, dtype in COLUMNS.items()}
        with atomic_file(path) as file:
            np.savez(
                file,
                tokens=np.frombuffer(b"".join(self.tokens), token_type),
                weights=np.frombuffer(b"".join(self.weights), WEIGHTS),
                answers=np.frombuffer(b"".join(self.answers), np.uint8),
                chats=np.frombuffer(b"".join(self.prompts), np.uint8),
                rejected_rows=np.frombuffer(rejected_rows, np.uint8),
                left_out_rows=np.frombuffer(left_out.encode(), np.uint8),
                counts=np.frombuffer(json.dumps(counts).encode(), np.uint8),
                **arrays,  # type: ignore[arg-type]
            )
        if log is not None:
            log.unlink(missing_ok=True)


def start_draft(path: Path, max_bad_row_share: float) -> tuple[Draft, RejectLog]:
    """Return an empty draft of the shard ``path`` and the log of the rows it rejects."""
    log_path = path.with_suffix(f".rejected-{unique_suffix()}.jsonl")
    return Draft(), RejectLog(log_path, max_bad_row_share)
