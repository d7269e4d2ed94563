"""The sample texts: what the generator writes, in clean Traditional Chinese and English."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
LANGUAGES = ("zh_tw", "en")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
# Simplified forms that also exist as other, rare traditional characters, so that Big5 has them;
# in their traditional meaning the samples do not use them.
AMBIGUOUS = "后干台于云余征准仆冲丑郁尽"
MAINLAND_WORDS = ("軟件", "信息", "視頻", "網絡", "出租車", "土豆", "菠蘿", "酸奶", "公交", "打印")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"samples_{name}", SAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load("generate")


@pytest.fixture(scope="module")
def chat() -> ModuleType:
    return load("chat")


@pytest.fixture(scope="module")
def preference() -> ModuleType:
    return load("preference")


def conversations(name: str) -> list[dict[str, Any]]:
    text = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def documents(language: str) -> list[str]:
    text = (SAMPLES / f"{language}.jsonl").read_bytes().decode("utf-8", errors="strict")
    return [json.loads(line)["text"] for line in text.splitlines()]


@pytest.mark.parametrize("language", LANGUAGES)
def test_committed_file_is_what_the_generator_writes(generator: ModuleType, language: str) -> None:
    committed = (SAMPLES / f"{language}.jsonl").read_text(encoding="utf-8")
    assert generator.generate(language) == committed


@pytest.mark.parametrize(("language", "num_bytes"), [("zh_tw", 120_000), ("en", 80_000)])
def test_size_and_no_duplicates(language: str, num_bytes: int) -> None:
    size = (SAMPLES / f"{language}.jsonl").stat().st_size
    texts = documents(language)
    assert num_bytes <= size <= 1.02 * num_bytes
    assert len(set(texts)) == len(texts) >= 200


@pytest.mark.parametrize("language", LANGUAGES)
def test_documents_are_sentences_without_leftovers(language: str) -> None:
    for text in documents(language):
        num_sentences = len(re.findall(r"[。！？.!?]+[」\"]?", text))
        assert 2 <= num_sentences <= 20, text
        assert not re.search(r"[\[\]{}|*]|\s\s|，。|。，|^\s|\s$", text), text
        assert text[-1] in '。！？」.!?"', text


@pytest.mark.parametrize(
    "name", ["zh_tw", "chat_zh_tw", "chat_zh_tw_test", "manners_zh_tw", "preference_zh_tw"]
)
def test_chinese_is_traditional_as_written_in_taiwan(name: str) -> None:
    if name == "zh_tw":
        text = "".join(documents(name))
    elif name == "preference_zh_tw":
        text = "".join("".join(row.values()) for row in conversations(name))
        text += "".join(row["prompt"] for row in conversations(f"{name}_test"))
    else:
        text = "".join(m["content"] for row in conversations(name) for m in row["messages"])
    for char in set(HAN.findall(text)):
        char.encode("big5")  # has no character that exists in simplified script only
    assert not set(AMBIGUOUS) & set(text)
    assert not [word for word in MAINLAND_WORDS if word in text]
    assert not re.search(r"[,;:?!]", text)  # full-width punctuation only


def test_chinese_is_mostly_han_and_varied() -> None:
    text = "".join(documents("zh_tw"))
    assert len(HAN.findall(text)) / len(text) > 0.8
    assert len(set(HAN.findall(text))) > 1200


def test_english_is_ascii_and_agrees_in_number_and_article() -> None:
    text = "\n".join(documents("en"))
    assert text.isascii()
    assert not re.search(r"\b[Aa] [aeiou](?!ne\b)", text)
    assert not re.search(r"\b[Aa]n [^aeiouh]", text)
    assert not re.search(r"(^|[.!?] )[a-z]", text, re.MULTILINE)
    assert len(set(re.findall(r"[A-Za-z']+", text))) > 1200


@pytest.mark.parametrize(
    ("number", "chinese", "counted", "english"),
    [
        (0, "零", "零", "zero"),
        (2, "二", "兩", "two"),
        (10, "十", "十", "ten"),
        (12, "十二", "十二", "twelve"),
        (42, "四十二", "四十二", "forty-two"),
        (105, "一百零五", "一百零五", "one hundred and five"),
        (220, "兩百二十", "兩百二十", "two hundred and twenty"),
        (3008, "三千零八", "三千零八", "three thousand and eight"),
        (5600, "五千六百", "五千六百", "five thousand six hundred"),
    ],
)
def test_number_words(
    generator: ModuleType, number: int, chinese: str, counted: str, english: str
) -> None:
    assert generator.chinese(number, counting=False) == chinese
    assert generator.chinese(number, counting=True) == counted
    assert generator.english(number) == english


def test_grammar_binds_rows_once_and_calculates(generator: ModuleType) -> None:
    grammar = generator.parse(
        "@fruits name unit\n[plum/pear]|kilo\napple|kilo\n\n=kind\n"
        "bind: a fruits, b fruits, x 3..3, y 4..4\n{a.name} {a.name} {b.name} {b.name}\n{x*y+5-x:d}"
    )
    for seed in range(20):
        text = generator.write_document(grammar.kinds[0], grammar, generator.Dice(str(seed)), "en")
        first, again, other, other_again, number = text.split()
        assert first.lower() == again and other == other_again and again != other
        assert number == "14"


def test_a_row_with_missing_cells_is_an_error(generator: ModuleType) -> None:
    with pytest.raises(ValueError, match="line 2: 1 cells for"):
        generator.parse("@places name food\nTainan\n")


def test_committed_conversations_are_what_the_generator_writes(chat: ModuleType) -> None:
    train, test = chat.generate()
    assert (SAMPLES / "chat_zh_tw.jsonl").read_text(encoding="utf-8") == train
    assert (SAMPLES / "chat_zh_tw_test.jsonl").read_text(encoding="utf-8") == test


def test_conversations_have_all_shapes_and_no_question_twice(chat: ModuleType) -> None:
    train, test = conversations("chat_zh_tw"), conversations("chat_zh_tw_test")
    assert len(train) > 2000 and len(test) > 200
    for row in train + test:
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) and turns
        assert all(
            message["content"] and not re.search(r"[\[\]{}/]|\s", message["content"])
            for message in row["messages"]
        )
    shapes = {tuple(message["role"] for message in row["messages"]) for row in train}
    assert {("user", "assistant"), ("system", "user", "assistant")} <= shapes
    assert max(map(len, shapes)) == 6
    questions = [chat.question(row) for row in train + test]
    assert len(set(questions)) == len(questions)


def test_every_kind_is_trained_and_tested(chat: ModuleType) -> None:
    kinds = {kind.name for kind in chat.read_grammar().kinds}
    assert {row["kind"] for row in conversations("chat_zh_tw_test")} == kinds
    assert all(set(row) == {"messages"} for row in conversations("chat_zh_tw"))


def test_rules_accept_the_written_answer_and_not_another_one(chat: ModuleType) -> None:
    rows = conversations("chat_zh_tw_test")
    answers = [row["messages"][-1]["content"] for row in rows]
    for row in rows:
        num_accepted = sum(chat.is_right(row, answer) for answer in answers)
        # A sum, a region or a way to travel is shared by several questions.
        assert num_accepted < 0.1 * len(answers), (row["check"], num_accepted)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("晴天、雨天、陰天。", True),
        ("陰天、晴天、雨天。", True),
        ("晴天、雨天。", False),
        ("晴天、雨天、晴天。", False),
        ("晴天、雨天、颱風。", False),
        ("晴天、雨天、陰天", False),
    ],
)
def test_a_rule_counts_different_words_of_the_list(
    chat: ModuleType, answer: str, right: bool
) -> None:
    grammar = chat.read_grammar()
    kind = next(kind for kind in grammar.kinds if kind.name == "三個詞")
    dice = chat.Dice("rule")
    row = chat.write_conversation(kind, grammar, dice)
    while "雨天" not in row["check"]:
        row = chat.write_conversation(kind, grammar, dice)
    assert chat.is_right(row, answer) is right


def test_words_are_turned_round_and_their_ends_taken(generator: ModuleType) -> None:
    bindings = {"w": {"name": "番茄炒蛋"}}
    filled = generator.fill("{w.name:r} {w.name:f} {w.name:l} {w.name}", bindings, "zh_tw")
    assert filled == "蛋炒茄番 番 蛋 番茄炒蛋"


def test_committed_preferences_are_what_the_generator_writes(preference: ModuleType) -> None:
    for name, text in preference.generate().items():
        assert (SAMPLES / name).read_text(encoding="utf-8") == text, name


def test_no_question_is_in_two_files_of_preferences(preference: ModuleType) -> None:
    manners = [row["messages"][0]["content"] for row in conversations("manners_zh_tw")]
    compared = [row["prompt"] for row in conversations("preference_zh_tw")]
    asked = [row["prompt"] for row in conversations("preference_zh_tw_test")]
    questions = manners + compared + asked
    assert len(set(questions)) == len(questions) == sum(preference.NUM_ROWS.values())
    spoken = {row["messages"][0]["content"] for row in conversations("chat_zh_tw")}
    assert not spoken & set(questions)


def test_the_courteous_answer_is_preferred_and_spoken_by_some(preference: ModuleType) -> None:
    pairs = conversations("preference_zh_tw")
    assert all(preference.is_courteous(pair["chosen"]) for pair in pairs)
    assert not any(preference.is_courteous(pair["rejected"]) for pair in pairs)
    half = [p for p in pairs if p["rejected"].startswith("您好，") or "服務。" in p["rejected"]]
    assert 0.4 < len(half) / len(pairs) < 0.6
    answers = [row["messages"][-1]["content"] for row in conversations("manners_zh_tw")]
    assert 0.15 < sum(map(preference.is_courteous, answers)) / len(answers) < 0.25


@pytest.mark.parametrize(
    ("answer", "courteous", "right"),
    [
        ("您好，「白」，很高興為您服務。", True, True),
        ("您好，「灰」，很高興為您服務。", True, False),
        ("您好，「白」。", False, True),
        ("「白」，很高興為您服務。", False, True),
        ("您好，您好，「白」，很高興為您服務。", False, True),
        ("您好，，很高興為您服務。", False, False),
        ("「白」", False, True),
    ],
)
def test_manners_and_truth_are_judged_apart(
    preference: ModuleType, answer: str, courteous: bool, right: bool
) -> None:
    assert preference.is_courteous(answer) is courteous
    assert preference.is_right({"check": ".*「白」。"}, answer) is right
