"""Train SentencePiece pieces on a corpus that is read once, as a stream."""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from random import Random
from typing import Literal

from sentencepiece import SentencePieceTrainer

from tokenizer.scripts import DEFAULT_SCRIPTS, run_pattern
from trainer.errors import DataError

NUM_THREADS = 4  # fixed: the sums of unigram training, and so its pieces, depend on it
MAX_SENTENCE_BYTES = 1 << 20  # SentencePiece silently skips longer ones
MAX_RUN_CHARS = 200_000
MAX_TEXT_CHARS = 20_000


class TextSample:
    """A random sample of the texts of a stream; holds no more than the sample.

    Every text gets a random key; those with the smallest keys are kept while their characters
    fit. The same stream and seed give the same sample. Long documents (a whole file may be one)
    are cut at line ends into texts of at most ``MAX_TEXT_CHARS``, each drawn for itself.
    """

    def __init__(self, max_chars: int, seed: int = 0) -> None:
        self.max_chars = max_chars
        self.num_seen = 0
        self._random = Random(seed)
        self._num_chars = 0
        self._heap: list[tuple[float, int, str]] = []  # largest key first

    def add(self, text: str) -> None:
        """Offer the next document."""
        for part in cut_text(text, min(MAX_TEXT_CHARS, max(1, self.max_chars))):
            heapq.heappush(self._heap, (-self._random.random(), self.num_seen, part))
            self.num_seen += 1
            self._num_chars += len(part)
            while self._num_chars > self.max_chars:
                self._num_chars -= len(heapq.heappop(self._heap)[2])

    def texts(self) -> list[str]:
        """Return the kept texts in the order of the stream."""
        return [text for _, _, text in sorted(self._heap, key=itemgetter(1))]


def cut_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into parts of at most ``max_chars``, after a line end where there is one."""
    start = 0
    while len(text) - start > max_chars:
        end = text.rfind("\n", start, start + max_chars) + 1 or start + max_chars
        yield text[start:end]
        start = end
    yield text[start:]


def script_runs(texts: Iterable[str], scripts: Sequence[str]) -> Iterator[str]:
    """Yield the longest runs of characters of ``scripts``, cut at spaces and line ends.

    Trained on runs, every piece is one that the merge can use: none is spent on other scripts.
    """
    pattern = run_pattern(tuple(scripts))
    for text in texts:
        for run in pattern.findall(text):
            for start in range(0, len(run), MAX_RUN_CHARS):
                yield run[start : start + MAX_RUN_CHARS]


def train_pieces(
    texts: Iterable[str],
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    scripts: Sequence[str] = DEFAULT_SCRIPTS,
    character_coverage: float = 0.9995,
) -> bytes:
    """Train a SentencePiece model on the runs of ``scripts`` in ``texts``.

    The normaliser is the identity: a piece is spelt as the text is. There is no dummy prefix,
    because the pieces continue a base that has its own.

    Args:
        texts: documents (see ``TextSample``).
        vocab_size: pieces to train, the three control pieces of SentencePiece included.
        model_type: ``bpe`` (no dead pieces when merged) or ``unigram``.
        scripts: classes of ``tokenizer.scripts``.
        character_coverage: share of the characters that get a piece; the rarest are spelt in bytes.

    Returns:
        Bytes of the model.

    Raises:
        DataError: too little text for the size, naming the largest size that works.
    """
    runs = script_runs(texts, scripts)
    first = next(runs, None)
    if first is None:
        raise DataError(
            f"the sample holds no text in scripts {', '.join(scripts)}; "
            "choose other data.sources or stage.scripts"
        )
    writer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_chain(first, runs),
            model_writer=writer,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix="all" in scripts,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _too_small(vocab_size, model_type, str(error)) from error
    return writer.getvalue()


def train_base(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a tokenizer for a model from scratch, with LLaMA's conventions.

    BPE with byte fallback, single digits, a dummy prefix, the identity normaliser, and the ids 0,
    1, 2 for unknown, start and end.

    Args:
        texts: documents.
        vocab_size: pieces in all: control pieces, 256 bytes, and the rest.

    Raises:
        DataError: too little text for the size, naming the largest size that works.
    """
    writer = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _too_small(vocab_size, "bpe", str(error)) from error
    return writer.getvalue()


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _too_small(vocab_size: int, model_type: str, message: str) -> DataError:
    """Put SentencePiece's own check of the size into the words of the config."""
    if largest := re.search(r"value <= (\d+)", message):
        return DataError(
            f"stage.vocab_size={vocab_size}: the sample is too small for that many {model_type} "
            f"pieces; the largest size that works is {largest[1]}, or give more text "
            "(data.sources, stage.sample_chars)"
        )
    if smallest := re.search(r"required_chars. \d+ vs (\d+)", message):
        return DataError(
            f"stage.vocab_size={vocab_size}: the sample has more different characters than that; "
            f"the smallest size that works is {smallest[1]}, or lower stage.character_coverage"
        )
    return DataError(f"stage.vocab_size={vocab_size}: SentencePiece could not train: {message}")
