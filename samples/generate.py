"""Generate ``zh_tw.jsonl`` and ``en.jsonl`` from ``zh_tw.grammar`` and ``en.grammar``.

Usage: ``python samples/generate.py`` writes both files beside this one; the result is the same on
every machine.

A grammar is plain text, read from top to bottom:

- ``# …`` is a comment.
- ``@table column column …`` starts a table; a row is its cells between ``|``.
  ``@table = other other`` joins tables of equal columns.
- ``=kind`` starts a kind of document. Its line ``bind: a table, b table, x 2..9`` draws a row or a
  number for each name; rows of one table are drawn without repeating. Every further line is a
  sentence of the document; a line that starts with ``? `` is kept half of the time.
- ``* …`` is a whole document as it stands.

In cells and sentences ``[one/another]`` stands for one of its alternatives and may be nested. A
cell is expanded once for a document, so that it reads the same wherever it is used. ``{a.name}`` is
a cell, ``{x}`` or ``{x*y+z}`` a number in words, ``{x:d}`` in digits, ``{x:n}`` a Chinese number
that is read out instead of counting something (二 for 兩), ``{f.name:a}`` a word with its English
article, ``{w.name:r}`` a word turned round, ``:f`` its first and ``:l`` its last character.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NUM_BYTES = {"zh_tw": 120_000, "en": 80_000}  # sizes to reach

CHOICE = re.compile(r"\[([^\[\]]*)\]")  # an innermost one
PLACEHOLDER = re.compile(r"\{([^{}:]+)(?::([adflnr]))?\}")
SMALL_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBER = re.compile(r"(\d+)\.\.(\d+)")

Row = dict[str, str]
Bindings = dict[str, "Row | int"]


@dataclass
class Kind:
    """One kind of document: what it draws and its sentences."""

    name: str
    draws: list[tuple[str, str]] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)


@dataclass
class Grammar:
    """A parsed grammar file."""

    tables: dict[str, list[Row]] = field(default_factory=dict)
    kinds: list[Kind] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)


class Dice:
    """Seeded choices; only ``Random.random`` is promised to be the same in every Python."""

    def __init__(self, seed: str) -> None:
        """Seed with a text."""
        self._random = random.Random(seed)

    def below(self, count: int) -> int:
        """Return an integer from 0 to ``count`` - 1."""
        return int(self._random.random() * count)

    def shuffle(self, items: list[str]) -> list[str]:
        """Return the items in another order."""
        return [item for _, item in sorted((self._random.random(), item) for item in items)]


def parse(text: str) -> Grammar:
    """Read a grammar.

    Raises:
        ValueError: with line number and reason.
    """
    grammar, columns, rows = Grammar(), list[str](), list[Row]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("@"):
            name, *columns = line[1:].split()
            rows = grammar.tables[name] = []
            if columns[0] == "=":
                rows.extend(row for other in columns[1:] for row in grammar.tables[other])
        elif line.startswith("="):
            grammar.kinds.append(Kind(line[1:]))
        elif line.startswith("* "):
            grammar.documents.append(line[2:])
        elif line.startswith("bind: "):
            draws = (part.split() for part in line[6:].split(","))
            grammar.kinds[-1].draws = [(name, source) for name, source in draws]
        elif grammar.kinds:
            grammar.kinds[-1].sentences.append(line)
        else:
            cells = line.split("|")
            if len(cells) != len(columns):
                raise ValueError(f"line {number}: {len(cells)} cells for {columns}: {line}")
            rows.append(dict(zip(columns, cells, strict=True)))
    return grammar


def choose(text: str, dice: Dice) -> str:
    """Replace every ``[one/another]`` by one alternative, inside out."""
    while match := CHOICE.search(text):
        options = match[1].split("/")
        text = text[: match.start()] + options[dice.below(len(options))] + text[match.end() :]
    return text


def draw(kind: Kind, grammar: Grammar, dice: Dice) -> Bindings:
    """Draw the rows and numbers of one document."""
    bindings: Bindings = {}
    taken: list[str] = []
    for name, source in kind.draws:
        if span := NUMBER.fullmatch(source):
            low, high = int(span[1]), int(span[2])
            bindings[name] = low + dice.below(high - low + 1)
            continue
        free = [row for row in grammar.tables[source] if next(iter(row.values())) not in taken]
        row = free[dice.below(len(free))]
        taken.append(next(iter(row.values())))
        bindings[name] = {column: choose(cell, dice) for column, cell in row.items()}
    return bindings


def fill(sentence: str, bindings: Bindings, language: str) -> str:
    """Replace the placeholders of a sentence.

    Raises:
        KeyError: for a name that is not bound or a column that does not exist.
    """

    def value(match: re.Match[str]) -> str:
        expression, form = match[1], match[2]
        name, dot, column = expression.partition(".")
        if dot:
            row = bindings[name]
            assert isinstance(row, dict), sentence
            return FORMS[form](row[column])
        number = calculate(expression, bindings)
        if form == "d":
            return str(number)
        return english(number) if language == "en" else chinese(number, counting=form != "n")

    return PLACEHOLDER.sub(value, sentence)


def calculate(expression: str, bindings: Bindings) -> int:
    """Work out sums, differences and products of bound numbers: ``x*y+z``."""
    total = 0
    for sign, term in re.findall(r"([+-]?)([^+-]+)", expression):
        product = 1
        for factor in term.split("*"):
            number = int(factor) if factor.isdigit() else bindings[factor]
            assert isinstance(number, int), expression
            product *= number
        total += -product if sign == "-" else product
    return total


def chinese(number: int, counting: bool) -> str:
    """Return 0 … 9999 in Chinese words; ``counting`` something says 兩 instead of 二."""
    digits = "零一二三四五六七八九"
    if number == 2 and counting:
        return "兩"
    words, gap = "", False
    for power, unit in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = number // power % 10
        if digit:
            two = digit == 2 and power >= 100
            words += ("零" if gap and words else "") + ("兩" if two else digits[digit]) + unit
        gap = not digit
    words = words.removeprefix("一") if 10 <= number < 20 else words
    return words or "零"


def english(number: int) -> str:
    """Return 0 … 9999 in English words."""
    if number < 20:
        return SMALL_NUMBERS[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{SMALL_NUMBERS[number % 10]}" if number % 10 else "")
    size, unit = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % size
    joint = " and " if 0 < rest < 100 else " "
    return f"{english(number // size)} {unit}" + (f"{joint}{english(rest)}" if rest else "")


def with_article(words: str) -> str:
    """Put a or an before ``words``."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


FORMS: dict[str | None, Callable[[str], str]] = {
    None: str,
    "a": with_article,
    "r": lambda word: word[::-1],
    "f": lambda word: word[0],
    "l": lambda word: word[-1],
}


def write_document(kind: Kind, grammar: Grammar, dice: Dice, language: str) -> str:
    """Write one document of a kind."""
    bindings = draw(kind, grammar, dice)
    sentences = []
    for line in kind.sentences:
        if line.startswith("? "):
            if dice.below(2):
                continue
            line = line[2:]
        sentences.append(fill(choose(line, dice), bindings, language))
    if language == "en":
        return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    return "".join(sentences)


def write_documents(grammar: Grammar, language: str) -> Iterator[str]:
    """Yield different documents for ever: those written by hand, then the kinds in turn."""
    dice, seen = Dice(f"kuroshio {language}"), set(grammar.documents)
    yield from grammar.documents
    while True:
        for kind in grammar.kinds:
            document = write_document(kind, grammar, dice, language)
            if document not in seen:
                seen.add(document)
                yield document


def generate(language: str) -> str:
    """Return the whole JSON-lines file of a language, one ``{"text": …}`` a line."""
    grammar = parse((FOLDER / f"{language}.grammar").read_text(encoding="utf-8"))
    lines: list[str] = []
    size = 0
    for document in write_documents(grammar, language):
        lines.append(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        size += len(lines[-1].encode())
        if size >= NUM_BYTES[language]:
            break
    return "".join(Dice(f"order {language}").shuffle(lines))


def main() -> None:
    """Write the sample files."""
    for language in NUM_BYTES:
        (FOLDER / f"{language}.jsonl").write_text(generate(language), encoding="utf-8")


if __name__ == "__main__":
    main()
