"""Records of every schema, and each reason for which one is no conversation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from trainer.data.chats.chat_rows import read_conversation
from trainer.data.chats.conversation import Conversation, Message
from trainer.data.chats.layouts import Layout
from trainer.data.reading.raw import RowError
from trainer.data.reading.remarks import SENTENCES, Remarks

ALPACA = Layout(
    "alpaca",
    (
        ("history", "history"),
        ("prompt", "instruction"),
        ("query", "input"),
        ("response", "output"),
        ("system", "system"),
    ),
)
SHAREGPT = Layout(
    "sharegpt", (("messages", "conversations"), ("system", "system"), ("tools", "tools"))
)
MESSAGES = Layout("messages", (("messages", "messages"), ("tools", "tools")))
SQUAD = Layout("squad", (("context", "context"), ("prompt", "question"), ("response", "answers")))
CALL = {"name": "weather", "arguments": {"city": "台北"}}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


def sharegpt(*turns: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in turns], **columns}


def messages(*turns: tuple[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": [{"role": who, "content": what} for who, what in turns], **columns}


def test_alpaca_with_input_system_and_history() -> None:
    record = {
        "instruction": "翻譯",
        "input": "sea",
        "output": "海",
        "system": "你是譯者。",
        "history": [["一", "one"], ["二", "two"]],
    }
    assert said(read_conversation(record, ALPACA)) == [
        ("system", "你是譯者。"),
        *(("user", "一"), ("assistant", "one"), ("user", "二"), ("assistant", "two")),
        *(("user", "翻譯\nsea"), ("assistant", "海")),
    ]


def test_empty_columns_say_nothing_and_json_texts_of_tables_are_parsed() -> None:
    record = {"instruction": "問", "input": None, "output": 7.0, "system": " ", "history": ""}
    assert said(read_conversation(record, ALPACA)) == [("user", "問"), ("assistant", "7")]
    record = {
        "instruction": "問",
        "output": "答",
        "history": '[["前", "後"]]',
        "input": float("nan"),
    }
    assert len(read_conversation(record, ALPACA).messages) == 4


def test_squad_takes_the_context_and_the_first_answer() -> None:
    record = {"context": "文", "question": "問", "answers": [{"text": "甲"}, {"text": "乙"}]}
    expected = [("user", "文\n\n問"), ("assistant", "甲")]
    assert said(read_conversation(record, SQUAD)) == expected
    of_datasets = {**record, "answers": {"text": ["甲", "乙"], "answer_start": [0, 4]}}
    assert said(read_conversation(of_datasets, SQUAD)) == expected
    with pytest.raises(RowError, match="the answer is empty"):
        read_conversation({**record, "answers": []}, SQUAD)


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ("human", "gpt"),
        ("user", "assistant"),
        ("Human", "chatgpt"),
        ("prompter", "bot"),
        ("user", "bing"),
    ],
)
def test_sharegpt_and_the_other_names_of_its_roles(user: str, assistant: str) -> None:
    record = sharegpt(("system", "人設"), (user, "問"), (assistant, "答"))
    expected = [("system", "人設"), ("user", "問"), ("assistant", "答")]
    assert said(read_conversation(record, SHAREGPT)) == expected
    assert said(read_conversation({**record, "system": "另一個"}, SHAREGPT)) == expected
    plain = sharegpt((user, "問"), (assistant, "答"), system="欄位")
    assert said(read_conversation(plain, SHAREGPT))[0] == ("system", "欄位")


def test_sharegpt_calls_results_and_tools() -> None:
    record = sharegpt(
        ("human", "台北天氣？"),
        ("gpt", "我查一下。"),
        ("function_call", json.dumps(CALL)),
        ("function_call", json.dumps([CALL, CALL])),
        ("observation", "晴"),
        ("observation", "雨"),
        ("gpt", "晴。"),
        tools=json.dumps([TOOL]),
    )
    conversation = read_conversation(record, SHAREGPT)
    assert conversation.tools == (TOOL,)
    assert [m.role for m in conversation.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert conversation.messages[1] == Message("assistant", "我查一下。", (CALL, CALL, CALL))


def test_openai_messages_with_wrapped_calls_and_weights() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
    record = {
        "messages": [
            {"role": "developer", "content": "規則"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "問"}, {"type": "text", "text": "題"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "結果", "tool_call_id": "1"},
            {"role": "assistant", "content": "答", "reasoning_content": "想", "loss_weight": 0.5},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    }
    read = read_conversation(record, MESSAGES)
    assert read.messages == (
        Message("system", "規則"),
        Message("user", "問題"),
        Message("assistant", "", ({"name": "weather", "arguments": {"a": 1}},), weight=0.0),
        Message("tool", "結果"),
        Message("assistant", "答", reasoning="想", weight=0.5),
    )
    assert read.tools == (TOOL,)


def test_typed_parts_with_reasoning_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "想"},
        {"type": "tool_call", "value": json.dumps(CALL)},
        {"type": "tool_call", "value": json.dumps(CALL)},
    ]
    read = read_conversation(messages(("user", "問"), ("assistant", parts)), MESSAGES)
    assert read.messages[-1] == Message("assistant", "", (CALL, CALL), "想")


def test_nulls_that_a_table_added_are_left_out() -> None:
    tool = {"name": "weather", "parameters": {"city": None, "day": {"type": "string"}}}
    call = {"name": "weather", "arguments": {"city": "台北", "day": None}}
    record = messages(("user", "問"), ("assistant", ""), tools=[tool])
    record["messages"][1]["tool_calls"] = [{"function": call}]
    arrow = read_conversation(record, replace(MESSAGES, format="parquet"))
    assert arrow.messages[1].tool_calls[0]["arguments"] == {"city": "台北"}
    assert arrow.tools[0]["parameters"] == {"day": {"type": "string"}}
    assert read_conversation(record, MESSAGES).messages[1].tool_calls == (call,)


def parallel(*results: str) -> dict[str, Any]:
    calls = [{"id": i, "function": {"name": "weather", "arguments": {"city": i}}} for i in "ab"]
    record = messages(("user", "問"), ("assistant", None), *(("tool", r) for r in results))
    record["messages"][1]["tool_calls"] = calls
    for message in record["messages"][2:]:
        message["tool_call_id"] = message["content"]
    record["messages"].append({"role": "assistant", "content": "答"})
    return record


def test_results_come_in_the_order_of_their_calls() -> None:
    read = read_conversation(parallel("b", "a"), MESSAGES)
    assert [m.content for m in read.messages] == ["問", "", "a", "b", "答"]
    with pytest.raises(RowError, match="message 4 is the result of 'c', not called"):
        read_conversation(parallel("a", "c"), MESSAGES)


def test_objects_of_question_and_answer_are_two_messages() -> None:
    pairs = [{"human": "一", "assistant": "1"}, {"答": "2", "問": "二"}]
    read = read_conversation({"conversations": pairs}, SHAREGPT)
    assert [m.content for m in read.messages] == ["一", "1", "二", "2"]


def test_bare_texts_take_turns() -> None:
    record = {"conversations": ["問", "答", "再問", "再答"]}
    roles = ["user", "assistant", "user", "assistant"]
    assert said(read_conversation(record, SHAREGPT)) == list(
        zip(roles, ["問", "答", "再問", "再答"], strict=True)
    )


def test_messages_that_ask_and_messages_that_answer_in_two_columns() -> None:
    layout = Layout("prompt_response", (("prompt", "prompt"), ("response", "completion")))
    asked = [{"role": "system", "content": "規"}, {"role": "user", "content": "問"}]
    answered = [{"role": "assistant", "content": "答"}]
    record = {"prompt": asked, "completion": answered}
    expected = [("system", "規"), ("user", "問"), ("assistant", "答")]
    assert said(read_conversation(record, layout)) == expected
    prompts = replace(layout, prompts=True)
    assert said(read_conversation({"prompt": asked}, prompts)) == expected[:2]
    with pytest.raises(RowError, match="'completion' is none"):
        read_conversation({"prompt": asked, "completion": "答"}, layout)


def test_a_greeting_before_the_first_question_is_left_out() -> None:
    remarks = Remarks()
    record = sharegpt(("system", "規"), ("gpt", "您好"), ("human", "問"), ("gpt", "答"))
    expected = [("system", "規"), ("user", "問"), ("assistant", "答")]
    assert said(read_conversation(record, SHAREGPT, remarks)) == expected
    assert remarks.counts["greetings"] == 1


def test_roles_and_keys_of_the_files_own() -> None:
    layout = Layout(
        "sharegpt",
        (("messages", "turns"),),
        role_key="speaker",
        content_key="said",
        roles=(("客服", "assistant"), ("顧客", "user")),
    )
    record = {"turns": [{"speaker": "顧客", "said": "問"}, {"speaker": "客服", "said": "答"}]}
    assert said(read_conversation(record, layout)) == [("user", "問"), ("assistant", "答")]
    with pytest.raises(RowError, match="message 1 has no speaker; its keys are from, value"):
        read_conversation({"turns": [{"from": "顧客", "value": "問"}]}, layout)


def test_prompts_end_before_the_answer() -> None:
    prompts = replace(ALPACA, prompts=True)
    for record in ({"instruction": "問", "output": "答"}, {"instruction": "問"}):
        assert said(read_conversation(record, prompts)) == [("user", "問")]
    chat = replace(SHAREGPT, prompts=True)
    record = sharegpt(("human", "一"), ("gpt", "二"), ("human", "三"), ("gpt", "四"))
    assert [text for _, text in said(read_conversation(record, chat))] == ["一", "二", "三"]
    with pytest.raises(RowError, match="no prompt"):
        read_conversation(sharegpt(("system", "規則")), chat)


REJECTED: dict[str, tuple[Layout, dict[str, Any]]] = {
    "unknown role 'narrator'": (SHAREGPT, sharegpt(("narrator", "x"), ("gpt", "y"))),
    r"two user turns in a row \(messages 1 and 2\)": (
        SHAREGPT,
        sharegpt(("human", "a"), ("human", "b"), ("gpt", "c")),
    ),
    r"two assistant turns in a row \(messages 2 and 3\)": (
        MESSAGES,
        messages(("user", "a"), ("assistant", "b"), ("assistant", "c")),
    ),
    "no question: no message is a user's": (SHAREGPT, sharegpt(("gpt", "a"))),
    "message 3 is a system message": (
        MESSAGES,
        messages(("user", "a"), ("assistant", "b"), ("system", "c")),
    ),
    r"the answer is empty \(column 'output'\)": (ALPACA, {"instruction": "a", "output": " \n"}),
    "the answer in message 2 is empty": (
        SHAREGPT,
        sharegpt(("human", "a"), ("gpt", ""), ("human", "b"), ("gpt", "c")),
    ),
    "message 1, the user's, is empty": (ALPACA, {"instruction": "", "output": "b"}),
    "message 3 is a tool result without a call": (
        SHAREGPT,
        sharegpt(("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")),
    ),
    "message 4 is a tool result without a call": (
        SHAREGPT,
        sharegpt(
            *(("human", "a"), ("function_call", json.dumps(CALL))),
            *(("observation", "b"), ("observation", "c"), ("gpt", "d")),
        ),
    ),
    "a user turn where a tool result must come": (
        SHAREGPT,
        sharegpt(("human", "a"), ("function_call", json.dumps(CALL)), ("human", "b")),
    ),
    "a user turn where the answer to a tool result": (
        SHAREGPT,
        sharegpt(
            ("human", "a"),
            ("function_call", json.dumps(CALL)),
            ("observation", "b"),
            ("human", "c"),
        ),
    ),
    "message 2: a tool call: malformed JSON": (
        SHAREGPT,
        sharegpt(("human", "a"), ("function_call", '{"name": "x"')),
    ),
    "message 2: the tool call .* has no name": (
        SHAREGPT,
        sharegpt(("human", "a"), ("function_call", '{"arguments": {}}')),
    ),
    "the arguments of x: malformed JSON": (
        SHAREGPT,
        sharegpt(("human", "a"), ("function_call", '{"name": "x", "arguments": "{"}')),
    ),
    "the arguments of x are 7, not an object": (
        SHAREGPT,
        sharegpt(("human", "a"), ("function_call", '{"name": "x", "arguments": 7}')),
    ),
    "tools: malformed JSON": (SHAREGPT, sharegpt(("human", "a"), ("gpt", "b"), tools="[{")),
    "tools hold 'x', which is no function with a name": (
        SHAREGPT,
        sharegpt(("human", "a"), ("gpt", "b"), tools=["x"]),
    ),
    "no answer: no message is an assistant's": (SHAREGPT, sharegpt(("human", "a"))),
    "no column 'output'; the row has instruction, messages": (
        ALPACA,
        {"instruction": "a", "messages": []},
    ),
    "no column 'conversations'; the row has text": (SHAREGPT, {"text": "a"}),
    "no messages": (SHAREGPT, {"conversations": []}),
    "column 'conversations' holds str|malformed JSON": (SHAREGPT, {"conversations": "a"}),
    "message 1 is str, not an object": (SHAREGPT, {"conversations": ["a", {"from": "gpt"}]}),
    "message 1 has no role or from; its keys are a": (SHAREGPT, {"conversations": [{"a": 1}]}),
    "history is str|history: malformed": (
        ALPACA,
        {"instruction": "a", "output": "b", "history": "x"},
    ),
    "history holds .* not a pair": (
        ALPACA,
        {"instruction": "a", "output": "b", "history": [["x"]]},
    ),
    "the answer is a list of 2": (ALPACA, {"instruction": "a", "output": ["b", "c"]}),
    "column 'instruction' holds dict, not text": (ALPACA, {"instruction": {}, "output": "b"}),
    "NUL character at offset 1": (ALPACA, {"instruction": "a\x00", "output": "b"}),
    r"lone surrogate U\+D800": (ALPACA, {"instruction": "\ud800", "output": "b"}),
    "byte 0xff is not of the file's encoding": (ALPACA, {"instruction": "\udcff", "output": "b"}),
    r"tools: lone surrogate U\+D800": (
        SHAREGPT,
        sharegpt(("human", "a"), ("gpt", "b"), tools=[{"name": "\ud800"}]),
    ),
    "message 2: loss weight -1 is no number|loss weight '-1'": (
        MESSAGES,
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "weight": -1}]},
    ),
    "every answer has the loss weight 0": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "loss_weight": 0},
            ]
        },
    ),
    "message 1 holds image_url: only text": (
        MESSAGES,
        messages(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "b")),
    ),
    "a part of the unknown type 'poem'": (
        MESSAGES,
        messages(("user", [{"type": "poem", "text": "x"}]), ("assistant", "b")),
    ),
    "column 'images' is filled": (
        SHAREGPT,
        sharegpt(("human", "a"), ("gpt", "b"), images=["1.png"]),
    ),
    "a user message calls functions": (
        MESSAGES,
        {"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": CALL}]}]},
    ),
}


@pytest.mark.parametrize("reason", REJECTED)
def test_each_reason_to_reject(reason: str) -> None:
    layout, record = REJECTED[reason]
    remarks = Remarks()
    with pytest.raises(RowError, match=reason):
        read_conversation(record, layout, remarks)
    assert remarks.counts == {}  # remarks are on accepted rows only


REMARKED: dict[str, tuple[Layout, dict[str, Any]]] = {
    "trailing_turns": (SHAREGPT, sharegpt(("human", "a"), ("gpt", "b"), ("human", "c"))),
    "placeholders": (ALPACA, {"instruction": "你是誰", "output": "我是 {{ name }}"}),
    "outer_space": (ALPACA, {"instruction": "a", "output": "\n\nb"}),
    "replacement_characters": (ALPACA, {"instruction": "a\ufffd", "output": "b"}),
    "user_weights": (
        MESSAGES,
        {
            "messages": [
                {"role": "user", "content": "a", "loss_weight": 1},
                {"role": "assistant", "content": "b", "loss_weight": 1},
            ]
        },
    ),
    "unread_columns": (
        Layout("alpaca", (("prompt", "instruction"), ("response", "output"))),
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    ),
    "undeclared_tools": (
        SHAREGPT,
        sharegpt(("human", "a"), ("function_call", json.dumps(CALL)), tools=[{"name": "other"}]),
    ),
}


@pytest.mark.parametrize("kind", REMARKED)
def test_each_remark(kind: str) -> None:
    layout, record = REMARKED[kind]
    remarks = Remarks()
    conversation = read_conversation(record, layout, remarks)
    assert remarks.counts == {kind: 1}
    assert conversation.messages[-1].role == "assistant"
    assert list(remarks.lines()) == [f"1 {SENTENCES[kind]}"]


def test_braces_of_code_are_no_placeholder() -> None:
    remarks = Remarks()
    record = {"instruction": "latex", "output": r"\frac{{1}}{2} {{ a + b }} {{}}"}
    read_conversation(record, ALPACA, remarks)
    assert remarks.counts == {}


def test_remarks_add_up_over_processes() -> None:
    remarks = Remarks({"placeholders": 2})
    remarks.merge({"placeholders": 3, "duplicates": 1})
    assert remarks.counts == {"placeholders": 5, "duplicates": 1}
    with pytest.raises(KeyError):
        remarks.note("plaecholders")
