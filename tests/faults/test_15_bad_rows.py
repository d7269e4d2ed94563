"""Row 15: bad rows are counted, listed with file, line and reason, and stop a run above a share.

Each defect of a row by itself stands in tests/trainer/data/reading/test_readers.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from launch.prepare import main as prepare_main
from trainer.config import DataConfig, load_config
from trainer.data.prepared.prepare import prepare
from trainer.errors import DataError

pytestmark = pytest.mark.faults(row=15)
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
# A line, and what is said of it.
BAD: list[tuple[bytes, str]] = [
    (b"{broken", "malformed JSON"),
    (b"[]", "expected a JSON object, got list"),
    (b'{"messages": []}', "no messages"),
    (b'{"messages": null}', "holds NoneType, not a list"),
    (b'{"messages": "none"}', "column 'messages': malformed JSON"),
    (b'{"messages": [null, {"role": null}]}', "NoneType"),
    (b'{"messages": [{"role": "wizard", "content": "x"}]}', "unknown role 'wizard'"),
    (b'{"messages": [{"role": "user", "content": 7}]}', "no answer"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "invalid UTF-8: byte 0xff"),
    (b'{"messages": [{"role": "user", "content": "a\\u0000"}]}', "NUL"),
    (b'{"messages": ' + b"[" * 50_000, "JSON"),
    (b'{"text": "' + b"x" * 3_000_000 + b'"}', "no column 'messages'"),
]
TOO_LONG = {"messages": [GOOD["messages"][0], {"role": "assistant", "content": "long " * 400}]}
NUM_GOOD = 40


@pytest.fixture
def data(chat_config: dict[str, Any], tmp_path: Path) -> tuple[DataConfig, str]:
    lines = [json.dumps(GOOD | {"id": n}).encode() for n in range(NUM_GOOD)]
    lines += [json.dumps(TOO_LONG).encode(), *(line for line, _ in BAD)]
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")  # with a byte-order mark
    values = copy.deepcopy(chat_config)
    values["data"] |= {
        "sources": {"chats": {"paths": [str(path)]}},
        "store_dir": str(tmp_path / "store"),
        "max_bad_row_share": 0.3,
    }
    config = load_config(values)
    return config.data, str(config.tokenizer.path)


def test_every_bad_row_is_listed_with_its_line(data: tuple[DataConfig, str]) -> None:
    config, tokenizer = data
    source = prepare(config, tokenizer).sources["chats"]
    rows, chats = source.manifest["rows"], source.manifest["chats"]
    assert rows["read"] == NUM_GOOD + 1 + len(BAD) and rows["rejected"] == len(BAD)
    assert chats["kept"] == NUM_GOOD and chats["long"] == 1
    listed = [json.loads(x) for x in (source.folder / "rejected.jsonl").read_text().splitlines()]
    reasons = {entry["row"]: entry["reason"] for entry in listed}
    assert "longer than data.max_length" in reasons.pop(NUM_GOOD + 1)
    assert sorted(reasons) == list(range(NUM_GOOD + 2, NUM_GOOD + 2 + len(BAD)))
    for line, (content, words) in enumerate(BAD, NUM_GOOD + 2):
        assert words in reasons[line], (content[:60], reasons[line])
    assert {Path(entry["file"]).name for entry in listed} == {"chats.jsonl"}
    assert all(len(entry["excerpt"]) <= 120 for entry in listed)


def test_too_many_of_them_stop_before_training(
    data: tuple[DataConfig, str], chat_config: dict[str, Any]
) -> None:
    config = dataclasses.replace(data[0], max_bad_row_share=0.2)
    whole = dataclasses.replace(load_config(chat_config), data=config)
    with pytest.raises(DataError, match=r"12 of 53 rows rejected.*chats\.jsonl:\d+") as caught:
        prepare_main(whole, False)
    assert caught.value.exit_code == 65
    assert "data.max_bad_row_share=0.2" in str(caught.value)
    assert not list(Path(config.store_dir).glob("chats-*/manifest.json"))
