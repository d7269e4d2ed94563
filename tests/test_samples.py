"""The sample texts: what the generator writes, in clean Traditional Chinese and English."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
LANGUAGES = ("zh_tw", "en")
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
# Simplified forms that also exist as other, rare traditional characters, so that Big5 has them;
# in their traditional meaning the samples do not use them.
AMBIGUOUS = "后干台于云余征准仆冲丑郁尽"
MAINLAND_WORDS = ("軟件", "信息", "視頻", "網絡", "出租車", "土豆", "菠蘿", "酸奶", "公交", "打印")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("samples_generate", SAMPLES / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


def test_chinese_is_traditional_as_written_in_taiwan() -> None:
    text = "".join(documents("zh_tw"))
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
