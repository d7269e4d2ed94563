"""Preferences in every layout: what is asked, what was better, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openpyxl import Workbook

from trainer.config import SourceConfig
from trainer.data.chats.conversations import walk_conversations
from trainer.data.chats.layout_search import find_layout
from trainer.data.chats.layouts import Layout
from trainer.data.chats.preferences import Preference, read_preferences
from trainer.data.chats.prompts import read_prompt
from trainer.data.chats.transcripts import is_transcript, read_transcript
from trainer.data.reading.raw import RowError
from trainer.data.reading.records import parse_record
from trainer.data.reading.remarks import Remarks
from trainer.errors import DataError

Said = list[tuple[str, str]]
ASKED: Said = [("user", "問"), ("assistant", "答"), ("user", "再問")]


def layout_of(path: Path, content: Any = "preferences", **options: Any) -> Layout:
    return find_layout(path, SourceConfig([str(path)], **options), content)


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def read_file(
    path: Path, remarks: Remarks | None = None, **options: Any
) -> tuple[list[Preference], list[tuple[int, str]]]:
    """Return the preferences of a file, and what was left out with its row."""
    source, layout = SourceConfig([str(path)], **options), layout_of(path, **options)
    found, left_out = [], []
    for row in walk_conversations(path, source, layout):
        try:
            more, reasons = read_preferences(parse_record(row.value), layout, remarks)
        except RowError as error:
            reasons, more = [error], []
        found += more
        left_out += [(row.number, str(reason)) for reason in reasons]
    return found, left_out


def read_one(tmp_path: Path, record: dict[str, Any], **options: Any) -> Preference:
    (found,), left_out = read_file(write_json(tmp_path / "one.json", [record]), **options)
    assert not left_out
    return found


def said(preference: Preference) -> tuple[Said, str | None, str | None]:
    prompt: Said = [(m.role, m.content) for m in preference.prompt.messages]
    chosen, rejected = preference.chosen, preference.rejected
    return prompt, chosen.content if chosen else None, rejected.content if rejected else None


def openai(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def sharegpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[role], "value": text} for role, text in turns]


def transcript(*turns: tuple[str, str]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[role]}: {text}" for role, text in turns)


GOOD, BAD = ("assistant", "好"), ("assistant", "壞")
RECORDS: dict[str, dict[str, Any]] = {
    "transcripts": {"chosen": transcript(*ASKED, GOOD), "rejected": transcript(*ASKED, BAD)},
    "Dahoas": {
        "prompt": transcript(*ASKED) + "\n\nAssistant:",
        "response": " 好",
        "chosen": " 好",
        "rejected": " 壞",
    },
    "LLaMA-Factory's sharegpt": {
        "conversations": sharegpt(*ASKED),
        "chosen": sharegpt(GOOD)[0],
        "rejected": sharegpt(BAD)[0],
    },
    "LLaMA-Factory's v1": {
        "chosen_messages": openai(*ASKED, GOOD),
        "rejected_messages": openai(*ASKED, BAD),
    },
    "TRL with a prompt": {
        "prompt": openai(*ASKED),
        "chosen": openai(GOOD),
        "rejected": openai(BAD),
    },
    "TRL, all in the answers": {
        "chosen": openai(*ASKED, GOOD),
        "rejected": openai(*ASKED, BAD),
    },
    "UltraFeedback": {
        "prompt": "再問",
        "chosen": openai(*ASKED, GOOD),
        "rejected": openai(*ASKED, BAD),
    },
    "OpenAI's preferences": {
        "input": {"messages": openai(*ASKED), "tools": [], "parallel_tool_calls": True},
        "preferred_output": openai(GOOD),
        "non_preferred_output": openai(BAD),
    },
    "alpaca": {
        "instruction": "再",
        "input": "問",
        "history": [["問", "答"]],
        "chosen": "好",
        "rejected": "壞",
    },
    "ranked": {"instruction": "再問", "history": [["問", "答"]], "output": ["好", "壞"]},
    "JSON text": {
        "chosen": json.dumps(openai(*ASKED, GOOD)),
        "rejected": json.dumps(openai(*ASKED, BAD)),
    },
}


@pytest.mark.parametrize("name", [name for name in RECORDS if name not in ("alpaca", "JSON text")])
def test_every_layout_says_the_same(name: str, tmp_path: Path) -> None:
    assert said(read_one(tmp_path, RECORDS[name])) == (ASKED, "好", "壞")


def test_input_follows_the_instruction(tmp_path: Path) -> None:
    asked = [*ASKED[:2], ("user", "再\n問")]
    assert said(read_one(tmp_path, RECORDS["alpaca"])) == (asked, "好", "壞")


def test_messages_as_json_text_in_a_table(tmp_path: Path) -> None:
    record = RECORDS["JSON text"]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["chosen", "rejected"])
        writer.writerow([record["chosen"], record["rejected"]])
    (found,), left_out = read_file(path)
    assert said(found) == (ASKED, "好", "壞") and not left_out


@pytest.mark.parametrize(
    "headers",
    [
        ("問題", "好", "壞"),
        ("問題", "補充", "較好的回答", "較差的回答"),
        ("prompt", "input", "positive", "negative"),
        ("提问", "好答案", "坏答案"),
        ("question", "Response (chosen)", "response_rejected"),
        ("q", "chosen_response", "rejected_response"),
        ("使用者", "偏好（必填）", "拒絕"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "xlsx"])
def test_tables_in_two_languages(headers: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    rows = [["甲", *(["乙"] if len(headers) == 4 else []), "好", "壞"]]
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([headers, *rows])
    else:
        book = Workbook()
        for row in [["客服評比表"], list(headers), *rows]:
            book.active.append(row)  # type: ignore[union-attr]
        book.save(path)
    (found,), left_out = read_file(path)
    question = "甲\n乙" if len(headers) == 4 else "甲"
    assert said(found) == ([("user", question)], "好", "壞") and not left_out


def test_named_columns_go_over_the_guess(tmp_path: Path) -> None:
    record = {"q": "問", "chosen": "x", "rejected": "y", "甲": "好", "乙": "壞"}
    columns = {"chosen": "甲", "rejected": "乙"}
    assert said(read_one(tmp_path, record, columns=columns))[1:] == ("好", "壞")
    assert said(read_one(tmp_path, record, columns={"rejected": "乙"}))[1:] == ("x", "壞")
    del record["chosen"]
    assert said(read_one(tmp_path, record, columns={"chosen": "甲"}))[1:] == ("好", "y")
    path = write_json(tmp_path / "a.json", [{"q": "問", "甲": "好", "乙": "壞"}])
    with pytest.raises(
        DataError, match=r"holds no preferences.*its columns are q, 甲, 乙.*chosen:"
    ):
        layout_of(path)
    with pytest.raises(DataError, match=r"no column '丙', which columns\.rejected names"):
        layout_of(path, columns={"chosen": "甲", "rejected": "丙"})
    with pytest.raises(DataError, match=r"ours are .*chosen, rejected, label, margin"):
        layout_of(path, columns={"better": "甲"})
    with pytest.raises(DataError, match="hold the prompt"):
        layout_of(write_json(tmp_path / "b.json", [{"chosen": "好", "rejected": "壞"}]))


def test_list_in_a_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = [{"prompt": "問", "chosen": "好", "rejected": "壞"}] * 2
    path.write_text(json.dumps({"data": rows}))
    found, left_out = read_file(path)
    assert [said(pair) for pair in found] == [([("user", "問")], "好", "壞")] * 2 and not left_out


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({"margin": 1.5}, 1.5),
        ({"margin": "0.25"}, 0.25),
        ({"margin": None}, 0.0),
        ({"score_chosen": 8, "score_rejected": 6.5}, 1.5),
        ({"chosen-rating": "3", "rejected-rating": "5"}, -2.0),
        ({"chosen_score": 8, "rejected_score": None}, 0.0),
        ({"margin": 1, "score_chosen": 8, "score_rejected": 2}, 1.0),
        ({}, 0.0),
    ],
)
def test_margins(more: dict[str, Any], margin: float, tmp_path: Path) -> None:
    remarks = Remarks()
    path = write_json(tmp_path / "a.json", [{"q": "問", "chosen": "a", "rejected": "b", **more}])
    (found,), _ = read_file(path, remarks)
    assert found.margin == margin
    assert remarks.counts == ({"negative_margins": 1} if margin < 0 else {})


@pytest.mark.parametrize("value", ["much", "nan", float("inf")])
def test_margin_that_is_no_number(value: object, tmp_path: Path) -> None:
    rows = [{"q": "問", "chosen": "a", "rejected": "b", "margin": value}]
    _, ((number, reason),) = read_file(write_json(tmp_path / "a.json", rows))
    assert number == 1 and "which is no number" in reason and "'margin'" in reason


def test_all_pairs_of_a_ranked_list_or_the_best_with_each(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [{"q": "問", "output": ["1", "2", "3", "2"]}])
    pairs, left_out = read_file(path)
    assert [said(pair)[1:] for pair in pairs] == [
        *[("1", "2"), ("1", "3"), ("1", "2")],
        *[("2", "3"), ("3", "2")],
    ]
    assert left_out == [(1, "answers 2 and 4: the chosen and the rejected answer are equal")]
    best, left_out = read_file(path, ranked_pairs="best")
    assert [said(pair)[1:] for pair in best] == [("1", "2"), ("1", "3"), ("1", "2")]
    assert not left_out
    more = write_json(tmp_path / "b.json", [{"q": "問", "output": x} for x in (["1", "2"], ["1"])])
    assert read_file(more)[1] == [(2, "column 'output' holds no list of ranked answers")]


@pytest.mark.parametrize(
    ("value", "is_good"),
    [(True, True), (0, False), ("TRUE", True), ("false", False), (1.0, True), ("否", False)],
)
def test_labels(value: object, is_good: bool, tmp_path: Path) -> None:
    records = (
        {"messages": openai(*ASKED, GOOD), "label": value},
        {"prompt": openai(*ASKED), "completion": openai(GOOD), "label": value},
    )
    for record in records:
        found = read_one(tmp_path, record)
        assert said(found) == (ASKED, *(("好", None) if is_good else (None, "好")))


def test_label_that_is_none(tmp_path: Path) -> None:
    rows = [{"q": "問", "a": "答", "label": value} for value in (True, None, False)]
    found, left_out = read_file(write_json(tmp_path / "a.json", rows))
    assert len(found) == 2
    assert left_out == [(2, "column 'label' holds 'None', which is no label (true or false)")]
    topics = [{"q": "問", "a": "答", "label": "news"}]
    with pytest.raises(DataError, match="holds no preferences"):
        layout_of(write_json(tmp_path / "b.json", topics))


REFUSED: dict[str, tuple[Said, Said]] = {
    "chosen and rejected answer different prompts, from message 2 on": (
        [("user", "問"), ("assistant", "x"), ("user", "再"), GOOD],
        [("user", "問"), ("assistant", "y"), ("user", "再"), BAD],
    ),
    "chosen and rejected answer different prompts, from message 3 on": (
        [*ASKED, GOOD],
        [*ASKED[:2], ("user", "別的"), BAD],
    ),
    "the chosen and the rejected answer are equal": ([*ASKED, GOOD], [*ASKED, GOOD]),
    "chosen: the answer in message 4 is empty": ([*ASKED, ("assistant", " ")], [*ASKED, BAD]),
    "rejected: the answer in message 4 is empty": ([*ASKED, GOOD], [*ASKED, ("assistant", "")]),
    "chosen: no question: no message is a user's": ([GOOD], [BAD]),
    "rejected: two assistant turns in a row (messages 2 and 3)": (
        [("user", "問"), GOOD],
        [("user", "問"), BAD, BAD],
    ),
}


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("reason", REFUSED)
def test_refused_pairs(reason: str, as_text: bool, tmp_path: Path) -> None:
    write = (lambda turns: transcript(*turns)) if as_text else (lambda turns: openai(*turns))
    good = {"chosen": write([*ASKED, GOOD]), "rejected": write([*ASKED, BAD])}
    bad = dict(zip(("chosen", "rejected"), map(write, REFUSED[reason]), strict=True))
    found, left_out = read_file(write_json(tmp_path / "a.json", [good, good, bad]))
    assert len(found) == 2
    assert left_out == [(3, reason)]


def test_row_of_another_form_than_its_file(tmp_path: Path) -> None:
    rows = [RECORDS["transcripts"]] * 3 + [{"chosen": "好", "rejected": "壞"}, {"chosen": "好"}]
    _, left_out = read_file(write_json(tmp_path / "a.json", rows))
    assert [number for number, _ in left_out] == [4, 5]
    assert left_out[0][1].startswith("no transcript: it begins with '好'")
    rows = [RECORDS["alpaca"], {**RECORDS["alpaca"], "chosen": ["好"]}]
    _, ((_, reason),) = read_file(write_json(tmp_path / "b.json", rows))
    assert reason == "column 'chosen' holds list, not text"
    rows = [RECORDS["UltraFeedback"], {**RECORDS["UltraFeedback"], "prompt": "別的"}]
    _, ((_, reason),) = read_file(write_json(tmp_path / "c.json", rows))
    assert reason == "column 'chosen' holds a conversation without the prompt of its row"


def test_response_is_remarked_when_it_is_neither_answer(tmp_path: Path) -> None:
    remarks = Remarks()
    rows = [RECORDS["Dahoas"], {**RECORDS["Dahoas"], "response": " 別的"}]
    read_file(write_json(tmp_path / "a.json", rows), remarks)
    assert remarks.counts == {"other_responses": 1}


def test_weights_of_messages_do_not_matter(tmp_path: Path) -> None:
    chosen = [{**m, "loss_weight": 0.0} for m in openai(*ASKED, GOOD)]
    found = read_one(tmp_path, {"chosen": chosen, "rejected": openai(*ASKED, BAD)})
    assert found.chosen is not None and found.chosen.weight == 1.0


def test_system_messages_and_tools_are_kept(tmp_path: Path) -> None:
    tools = [{"name": "f", "description": "", "parameters": {}}]
    record = {**RECORDS["LLaMA-Factory's sharegpt"], "system": "有禮", "tools": json.dumps(tools)}
    found = read_one(tmp_path, record)
    assert said(found)[0] == [("system", "有禮"), *ASKED]
    assert found.prompt.tools == tuple(tools)
    whole = {"system": "有禮", **RECORDS["TRL, all in the answers"]}
    assert said(read_one(tmp_path, whole))[0] == [("system", "有禮"), *ASKED]


def test_transcripts_are_split_at_speakers_only() -> None:
    text = "\n\nHuman: a\nHuman: b\n\nAssistant:  two\n\nspaces \n\nHuman:\n\nAssistant: "
    turns = [(m.role, m.content) for m in read_transcript(text)]
    assert turns == [
        ("user", "a\nHuman: b"),
        ("assistant", " two\n\nspaces "),
        ("user", ""),
        ("assistant", ""),
    ]
    assert is_transcript("Human: x") and not is_transcript("A Human: x")
    with pytest.raises(RowError, match="no transcript"):
        read_transcript("x\n\nHuman: y")


TURNS = st.lists(st.text("aH: \n言", min_size=1, max_size=12), min_size=2, max_size=6)


@settings(max_examples=60, deadline=None)
@given(texts=TURNS)
def test_transcripts_come_back(texts: list[str]) -> None:
    texts = [text for text in texts if "\n\n" not in f"{text}\n"]
    turns = [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    if turns:
        read = read_transcript(transcript(*turns))
        assert [(m.role, m.content) for m in read] == turns


@pytest.mark.parametrize("name", RECORDS)
def test_prompt_of_every_layout(name: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [RECORDS[name]])
    layout = layout_of(path, "prompts")
    (row,) = walk_conversations(path, SourceConfig([str(path)]), layout)
    prompt, answer = read_prompt(parse_record(row.value), layout)
    asked = [*ASKED[:2], ("user", "再\n問")] if name == "alpaca" else ASKED
    assert [(m.role, m.content) for m in prompt.messages] == asked
    assert answer == "好"


def test_prompts_of_labels_and_of_rows_without_answers(tmp_path: Path) -> None:
    def read(rows: list[dict[str, Any]], **options: Any) -> list[tuple[str, str | None]]:
        layout = layout_of(write_json(tmp_path / "a.json", rows), "prompts", **options)
        read = [read_prompt(row, layout) for row in rows]
        return [(prompt.messages[-1].content, answer) for prompt, answer in read]

    labels = [{"q": "問", "a": "答", "label": label} for label in (True, False)]
    assert read(labels) == [("問", "答"), ("問", None)]
    assert read([{"q": "問"}, {"q": "問", "a": "42"}, {"q": "問", "a": ""}]) == [
        ("問", None),
        ("問", "42"),
        ("問", None),
    ]
    assert read([{"messages": openai(*ASKED)}]) == [("再問", None)]
    bad = {"chosen": transcript(*ASKED, ("assistant", "")), "rejected": transcript(*ASKED, BAD)}
    assert read([bad]) == [("再問", None)]  # the pair is none, its prompt is one
    assert read([{"q": "問", "output": ["1", "1"]}]) == [("問", "1")]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(record=st.dictionaries(st.sampled_from(["q", "chosen", "rejected"]), JSON_VALUES))
@pytest.mark.parametrize("form", ["text", "messages", "transcripts"])
def test_any_record_is_read_or_refused(form: Any, record: dict[str, Any]) -> None:
    columns = (("chosen", "chosen"), ("prompt", "q"), ("rejected", "rejected"))
    layout = Layout("prompt_response", columns, preference="pairs", answer_form=form)
    try:
        ((found,), _) = read_preferences(record, layout)
    except RowError as error:
        assert str(error)
    else:
        assert found.chosen != found.rejected and found.prompt.messages[-1].role == "user"
