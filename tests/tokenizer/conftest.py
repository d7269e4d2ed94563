"""Real tokenizers and texts beside the repository; without them their tests skip."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sentencepiece import SentencePieceTrainer

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
CHINESE = ("tang_poems", "tw_laws", "archive_tw", "react_zh_hant", "rust_book_tw")

SENTENCES = [
    "the quick brown fox jumps over the lazy dog and runs away from the big bad wolf",
    "we sell 1234 apples and 5678 pears in 90 boxes, for 12.50 a box (or less)",
    "def main(argv):    return 0    # four spaces, twice",
    "中 文 也 有 一 點 ： 山 水 之 間 ， 人 有 情 。",
]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return ../shared/data, or skip."""
    if not (DATA / "tokenizers").is_dir():
        pytest.skip(f"no real data at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def llama2(data_dir: Path) -> bytes:
    """Return LLaMA-2's model."""
    return (data_dir / "tokenizers/llama2/tokenizer.model").read_bytes()


@pytest.fixture(scope="session")
def chinese_sp(data_dir: Path) -> bytes:
    """Return the Chinese unigram donor."""
    return (data_dir / "tokenizers/chinese_sp/chinese_sp.model").read_bytes()


@pytest.fixture(scope="session")
def small_base() -> bytes:
    """Return a small BPE model with byte fallback and dummy prefix, trained here."""
    writer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=writer,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return writer.getvalue()


def read_texts(path: Path, step: int = 1, max_chars: int = 20_000) -> Iterator[str]:
    """Yield every ``step``-th text of a JSONL file, cut to ``max_chars`` (0: whole)."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for index, line in enumerate(file):
            if index % step == 0:
                text = json.loads(line)["text"]
                yield text[:max_chars] if max_chars else text


@pytest.fixture(scope="session")
def sampled_texts(data_dir: Path) -> dict[str, list[str]]:
    """Return some texts of every source."""
    return real_texts(data_dir, whole=False)


@pytest.fixture(scope="session")
def whole_texts(data_dir: Path) -> dict[str, list[str]]:
    """Return all texts of every source."""
    return real_texts(data_dir, whole=True)


def real_texts(data_dir: Path, whole: bool) -> dict[str, list[str]]:
    """Return texts per source: Chinese ones, and the English ones under names with ``en_``."""
    step = {"tang_poems": 50, "tw_laws": 40, "archive_tw": 12, "rust_book_tw": 4}
    texts = {
        name: list(
            read_texts(
                data_dir / f"pretrain/{name}.jsonl.gz",
                1 if whole else step.get(name, 1),
                0 if whole else 20_000,
            )
        )
        for name in CHINESE
    }
    texts["en_c4"] = list(read_texts(data_dir / "pretrain/lf_c4_demo.jsonl", 1 if whole else 2))
    wiki = (data_dir / "pretrain/lf_wiki_demo.txt").read_text(encoding="utf-8")
    articles = [line for line in wiki.split("\n") if line.strip()]
    texts["en_wiki"] = articles if whole else [article[:5000] for article in articles]
    return texts
