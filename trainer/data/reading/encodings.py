"""The encoding of text files: detected once a file, undone on the way to the readers.

All readers work on UTF-8. A file in another encoding is transcoded as it is read; bytes that do not
decode become lone surrogates U+DC00 + byte, which spoil their row and no other.
"""

from __future__ import annotations

import codecs
import io
import re
from typing import IO

from charset_normalizer import from_bytes

from trainer.errors import DataError

BOMS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
# What text is in when it is neither UTF-8 nor UTF-16. The last decodes nearly anything.
CANDIDATES = ("cp950", "big5hkscs", "gb18030", "cp1252")
BIG5 = ("cp950", "big5hkscs")
# Printable ASCII and white space, Han, kana, and the signs of both widths.
USUAL = re.compile("[\t\n\r -~\u2010-\u203b\u3000-\u30ff\u3400-\u9fff\uff00-\uff65]")
USUAL_SHARE, SURE_SHARE, MIN_WIDE_BYTES = 0.85, 0.95, 24
SIGNS = re.compile(rb'[\s",:;]+')  # never the second byte of a character
MIN_FOREIGN_BYTES = 4  # two characters; fewer are more likely damaged UTF-8
WIDE_MARKS = {
    "utf-16": (b"\xff\xfe", b"\xfe\xff"),
    "utf-32": (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff"),
}
PIECE_BYTES = 1 << 20
KEEP_BYTES, KEEP_INVALID = "kuroshio-keep-bytes", "kuroshio-keep-invalid"  # error handlers


def check_encoding(name: str) -> str:
    """Return Python's name of an encoding.

    Raises:
        DataError: there is no such text encoding.
    """
    try:
        found = codecs.lookup(name).name
        "".encode(found)  # refuses codecs that are no text encodings, such as base64
    except (LookupError, UnicodeError) as error:
        raise DataError(
            f"encoding={name!r} is not an encoding that Python knows; use auto, utf-8, cp950, "
            "big5hkscs, utf-16 or gb18030"
        ) from error
    return found.removesuffix("-sig")


def guess_encoding(sample: bytes, is_whole: bool) -> str:
    """Return the encoding of a text by a sample of it.

    Args:
        sample: raw bytes; with non-ASCII characters if the text has any.
        is_whole: the text ends where the sample ends; else its last character may be cut.

    Returns:
        The mark's encoding if there is a byte-order mark; UTF-16 by its zero bytes; UTF-8 unless
        most pieces of other than ASCII characters are no UTF-8; else the Chinese encoding that the
        characters look most like. What fits nothing is UTF-8, and its bad rows are rejected.
    """
    for mark, name in BOMS.items():
        if sample.startswith(mark):
            return name
    wide = _guess_wide(sample)
    if wide is not None:
        return wide
    pieces = [piece for piece in SIGNS.split(sample) if not piece.isascii()]
    if not is_whole and pieces and sample.endswith(pieces[-1]):
        pieces[-1] = _without_cut_end(pieces[-1])
    foreign = [piece for piece in pieces if not _looks_utf8(piece)]
    num_foreign_bytes = sum(byte > 0x7F for piece in foreign for byte in piece)
    if 2 * len(foreign) <= len(pieces) or num_foreign_bytes < MIN_FOREIGN_BYTES:
        return "utf-8"
    return _likeliest(foreign)


def _without_cut_end(piece: bytes) -> bytes:
    """Return a piece without the part of a character at its end."""
    for cut in range(4):
        kept = piece[: len(piece) - cut]
        if any(_decodes(kept, name) for name in ("utf-8", *CANDIDATES[:-1])):
            return kept
    return piece


def _looks_utf8(piece: bytes) -> bool:
    """Tell UTF-8, perhaps with a few bad bytes, from another encoding's double bytes."""
    text = piece.decode("utf-8", errors="replace")
    num_bad = text.count("\ufffd")
    return num_bad * 4 <= sum(not character.isascii() for character in text) - num_bad


def _guess_wide(sample: bytes) -> str | None:
    """Tell UTF-16 without a mark, by zero bytes and by the characters that it would hold."""
    even = sample[: len(sample) // 2 * 2]
    zeros = {"utf-16-be": even[0::2].count(0), "utf-16-le": even[1::2].count(0)}
    num_zeros, num_high = sum(zeros.values()), sum(byte > 0x7F for byte in even)
    if _looks_utf8(sample) and num_zeros * 4 < len(even):
        return None  # with a stray zero byte at most
    if not num_zeros and (num_high * 4 < len(even) or len(even) < MIN_WIDE_BYTES):
        return None  # pairs of ASCII letters would look like Han
    shares = {name: _usual_share(even.decode(name, errors="replace")) for name in zeros}
    # ASCII characters in the wrong order look like Han, so that zeros decide between equals.
    name = max(zeros, key=lambda name: (round(shares[name], 1), zeros[name]))
    return name if shares[name] > (USUAL_SHARE if num_zeros else SURE_SHARE) else None


def _usual_share(text: str) -> float:
    """Return the share of characters that Chinese or English texts are made of."""
    return len(USUAL.findall(text)) / max(len(text), 1)


def _likeliest(pieces: list[bytes]) -> str:
    """Return the encoding in which the pieces make sense; UTF-8 when none is."""
    counts = {name: sum(_decodes(piece, name) for piece in pieces) for name in CANDIDATES}
    enough = max(0.5 * len(pieces), 0.95 * max(counts[name] for name in CANDIDATES[:-1]))
    possible = [name for name in CANDIDATES if counts[name] > enough]
    if not possible:
        return "utf-8"
    shared = [piece for piece in pieces if all(_decodes(piece, name) for name in possible)]
    match = from_bytes(b"\n".join(shared), cp_isolation=possible).best() if shared else None
    best = possible[0] if match is None else match.encoding
    if best in BIG5:  # one contains the other: the narrower unless it lacks characters
        return max(BIG5, key=lambda name: counts[name])
    return best


def _decodes(piece: bytes, encoding: str) -> bool:
    try:
        piece.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def as_utf8(stream: IO[bytes], encoding: str) -> IO[bytes]:
    """Return ``stream`` in UTF-8; a stream that is UTF-8 is returned as it is."""
    if encoding == "utf-8":
        return stream
    return io.BufferedReader(_Transcoder(stream, encoding), buffer_size=PIECE_BYTES)


def _keep_bytes(error: UnicodeError) -> tuple[str, int]:
    """Turn undecodable bytes into lone surrogates."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    spoilt = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in spoilt), error.end


def keep_invalid() -> str:
    """Return an error handler for reading ``as_utf8``: bad bytes become lone surrogates."""
    codecs.register_error(KEEP_INVALID, _keep_invalid)
    return KEEP_INVALID


def _keep_invalid(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    triple = error.object[error.start : error.start + 3]
    if len(triple) == 3 and triple[0] == 0xED and triple[1] >= 0xA0:  # left by the transcoder
        return triple.decode("utf-8", "surrogatepass"), error.start + 3
    return _keep_bytes(error)


def _decoder(encoding: str) -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder(encoding)(errors=KEEP_BYTES)


class _Transcoder(io.RawIOBase):
    """A stream of another encoding, read as UTF-8 with lone surrogates where it is broken."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        codecs.register_error(KEEP_BYTES, _keep_bytes)
        self._stream = stream
        self._encoding, self._decoder = encoding, _decoder(encoding)
        self._ready = b""
        self._ended = self._begun = False

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill ``buffer`` and return how far; 0 at the end."""
        while not self._ready and not self._ended:
            piece = self._stream.read(PIECE_BYTES)
            self._ended = not piece
            marks = () if self._begun else WIDE_MARKS.get(self._encoding, ())
            if marks and not piece.startswith(marks):  # the order of most machines
                self._decoder = _decoder(f"{self._encoding}-le")
            text = self._decoder.decode(piece, self._ended)
            if not self._begun:
                self._begun, text = True, text.removeprefix("\ufeff")
            self._ready = text.encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        """Close the stream below as well."""
        self._stream.close()
        super().close()
