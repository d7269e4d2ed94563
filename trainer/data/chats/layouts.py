"""Where a file keeps its conversations: schema, columns and roles, found once for each file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from trainer.data.reading.answer_columns import ANSWER_NAMES
from trainer.data.reading.raw import printable

Schema = Literal["alpaca", "sharegpt", "messages", "prompt_response", "squad"]
Content = Literal["conversations", "preferences", "prompts"]  # what is wanted of a file
Preference = Literal["", "pairs", "ranked", "labels"]
AnswerForm = Literal["text", "messages", "transcripts"]


@dataclass(frozen=True)
class Layout:
    """How to read the records of one file.

    Plain data: it goes into the key of a store and to worker processes.

    Attributes:
        schema: sharegpt and messages keep a list of messages, the others a question and its answer.
        columns: our column names with the file's, sorted.
        format: of the file, see ``FORMATS``.
        encoding: of its text; empty for binary formats.
        sheet: of a workbook.
        role_key: where a message keeps its speaker; empty = ``role`` or ``from``.
        content_key: where it keeps its text; empty = ``content``, ``value`` or ``text``.
        roles: speakers by names of the file's own, beside those everybody uses.
        nested: where a record keeps several: data, paragraphs, qas (SQuAD) or instances (seeds).
        max_rows: rows to read at most.
        prompts: conversations end before the answer, which need not be there.
        preference: how a record says which answer is better: two answers, a list from best to
            worst, or a label on one answer; empty = it does not.
        answer_form: what the columns of two answers hold; transcripts are HH-RLHF's.
        ranked_pairs: pairs made of a ranked list: all, or best (the first with each other one).
    """

    schema: Schema
    columns: tuple[tuple[str, str], ...]
    format: str = "json"
    encoding: str = "utf-8"
    sheet: str | None = None
    role_key: str = ""
    content_key: str = ""
    roles: tuple[tuple[str, str], ...] = ()
    nested: str = ""
    max_rows: int | None = None
    prompts: bool = False
    preference: Preference = ""
    answer_form: AnswerForm = "text"
    ranked_pairs: str = ""

    def column(self, name: str) -> str | None:
        """Return the file's name of our column ``name``, None when it has none."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return dict(self.columns)

    @cached_property
    def asking(self) -> Layout:
        """This layout without its answers: what reads the prompt of a preference."""
        hidden = {*ANSWER_NAMES, "response"}
        columns = tuple(pair for pair in self.columns if pair[0] not in hidden)
        return replace(self, columns=columns, prompts=True, preference="")

    @property
    def keeps_messages(self) -> bool:
        """Tell whether a record holds a list of messages."""
        return self.schema in ("sharegpt", "messages")

    @property
    def drop_nulls(self) -> bool:
        """Tell whether nulls in nested values come from the file's one type for all rows."""
        return self.format in ("parquet", "arrow")

    def describe(self) -> str:
        """Return the layout in one line, for a person to check."""
        columns = ", ".join(
            name if name == ours else f"{ours}={name}" for ours, name in self.columns
        )
        parts = [self.schema, columns, self.format, self.encoding]
        if self.preference:
            parts.insert(
                0,
                self.preference + (f" ({self.answer_form})" if self.preference == "pairs" else ""),
            )
        if self.sheet is not None:
            parts.append(f"sheet {self.sheet}")
        if self.max_rows is not None:
            parts.append(f"first {self.max_rows} rows")
        return printable("; ".join(part for part in parts if part))
