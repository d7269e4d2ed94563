"""What a column holds, guessed from its Chinese or English header; columns that are missing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from trainer.data.reading.raw import printable

# Our column -> headers that mean it, the likeliest first; compared without case, space and signs.
HEADERS: dict[str, tuple[str, ...]] = {
    "messages": (
        *("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "chat"),
        *("對話", "对话", "多輪對話", "多轮对话"),
    ),
    "prompt": (
        *("instruction", "指令", "指示", "prompt", "question", "提問", "提问", "問題", "问题"),
        *("題目", "题目", "問句", "问句", "詢問", "询问", "用戶問題", "用户问题", "使用者問題"),
        *("使用者", "用戶", "用户", "query", "user", "human", "problem", "q", "問", "问"),
        "inputs",
    ),
    "query": ("input", "輸入", "输入", "補充", "补充", "補充說明", "补充说明"),
    "context": (
        *("context", "上下文", "passage", "paragraph", "背景", "背景資料", "背景资料"),
        *("文章", "段落", "內文", "参考资料", "參考資料"),
    ),
    "response": (
        *("output", "輸出", "输出", "response", "answer", "answers", "回答", "答案", "答覆"),
        *("回覆", "答复", "回复", "回應", "回应", "解答", "completion", "target", "reply"),
        *("assistant", "gpt", "a", "答", "targets"),
    ),
    "system": (
        *("system", "systemprompt", "系統", "系统", "系統提示", "系统提示", "系統提示詞"),
        *("系统提示词", "人設", "人设", "persona", "角色", "角色設定", "角色设定"),
    ),
    "history": ("history", "歷史", "历史", "歷史對話", "历史对话", "對話紀錄", "对话记录"),
    "tools": ("tools", "functions", "工具", "函式", "函数"),
}
NAMES = tuple(HEADERS)
MAX_NAMES, MAX_NAME_CHARS = 30, 60  # shown of a file's columns


def guess_columns(headers: Iterable[str]) -> dict[str, str]:
    """Return our column names with the headers that mean them.

    Every header is used once. A longer header (客戶常見問題) counts for prompt or response when it
    is the only one with such a word in it.
    """
    left = {header: fold_header(header) for header in headers}
    found: dict[str, str] = {}
    for name, words in HEADERS.items():
        for word in words:
            match = next((header for header, folded in left.items() if folded == word), None)
            if match is not None:
                found[name] = match
                del left[match]
                break
    for name in ("prompt", "response"):
        if name not in found and (match := _containing(HEADERS[name], left)) is not None:
            found[name] = match
            del left[match]
    if "prompt" not in found and "query" in found and "response" in found:
        found["prompt"] = found.pop("query")  # a lone "input" is the question itself
    return found


def name_columns(cells: Iterable[object]) -> list[str]:
    """Return a name for each cell of a header, no two the same: "x", "x.2"; "" for no text."""
    names: list[str] = []
    for cell in cells:
        name = cell.strip() if isinstance(cell, str) else ""
        copies = sum(other == name or other.startswith(f"{name}.") for other in names)
        names.append(f"{name}.{copies + 1}" if name and name in names else name)
    return names


def list_headers(headers: list[str]) -> str:
    """Return headers in a list to show, not all of an object that is keyed by number."""
    more = f" and {len(headers) - MAX_NAMES} more" if len(headers) > MAX_NAMES else ""
    return printable(", ".join(h[:MAX_NAME_CHARS] for h in headers[:MAX_NAMES]) + more)


def _containing(words: tuple[str, ...], left: dict[str, str]) -> str | None:
    """Return the only header with one of the words of two or more Han characters in it."""
    longer = [word for word in words if len(word) > 1 and not word.isascii()]
    matches = [h for h, folded in left.items() if any(word in folded for word in longer)]
    return matches[0] if len(matches) == 1 else None


def fold_header(header: str) -> str:
    """Return a header in its simplest form: no width, case, space, signs, or remark in brackets."""
    header = unicodedata.normalize("NFKC", header).casefold()
    header = re.sub(r"[(\[【].*?[)\]】]", "", header)
    return re.sub(r"[\W_]", "", header)


def missing_column(path: Path, name: str, present: list[str]) -> str:
    """Say that ``path`` has no column ``name``, and which it has."""
    return (
        f"{path} has no column {name!r}; its columns are {printable(', '.join(present))}: "
        "set the source's text_columns"
    )
