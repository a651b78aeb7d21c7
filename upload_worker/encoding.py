"""From the object's encoding to UTF-8, such that positions stay byte offsets in the object.

Where every character that CSV cares about is one byte that no other character contains, records are cut
in the object's own bytes and transcoded afterwards. UTF-16 and UTF-32 are decoded before the cut. Bytes
that the encoding does not know become bytes that are not UTF-8 either, so that the server refuses the
record that holds them, and that record alone.
"""

import codecs
import re
import string
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import charset_normalizer

# Stands for each byte of a last character that is cut off; no UTF-8 contains it.
_CUT_OFF = b"\xff"


class Decoder(Protocol):
    def decode(self, chunk: bytes, final: bool = False) -> bytes: ...


class _AsIs:
    def decode(self, chunk: bytes, final: bool = False) -> bytes:
        return chunk


class _WideDecoder:
    """UTF-16 or UTF-32 to UTF-8; lone surrogates and a cut-off last character become invalid UTF-8."""

    def __init__(self, name: str) -> None:
        self._decoder = codecs.getincrementaldecoder(name)("surrogatepass")

    def decode(self, chunk: bytes, final: bool = False) -> bytes:
        text = self._decoder.decode(chunk)
        data = text.encode("utf-8", "surrogatepass")
        return data + _CUT_OFF * len(self._decoder.getstate()[0]) if final else data


@dataclass(frozen=True)
class Encoding:
    name: str

    @cached_property
    def _is_utf8(self) -> bool:
        return codecs.lookup(self.name).name in ("utf-8", "ascii")

    @cached_property
    def is_wide(self) -> bool:
        return codecs.lookup(self.name).name.startswith(("utf-16", "utf-32"))

    @cached_property
    def is_multibyte(self) -> bool:
        """Whether a byte that looks like ASCII can be the second half of a character."""
        if self.is_wide or self._is_utf8:
            return False
        decoder = codecs.getincrementaldecoder(self.name)("ignore")
        for byte in range(128, 256):
            decoder.reset()
            decoder.decode(bytes([byte]))
            if decoder.getstate()[0]:
                return True
        return False

    def decoder(self) -> Decoder:
        """What chunks of the object go through before they are cut."""
        return _WideDecoder(self.name) if self.is_wide else _AsIs()

    def source_bytes(self, block: bytes) -> int:
        """How many bytes of the object a block that came out of `decoder` takes."""
        if not self.is_wide:
            return len(block)
        text = block.rstrip(_CUT_OFF).decode("utf-8", "surrogatepass")
        return len(text.encode(self.name, "surrogatepass")) + block.count(_CUT_OFF)

    def to_utf8(self, block: bytes) -> bytes:
        """A block of whole records as UTF-8."""
        if self._is_utf8 or self.is_wide:
            return block
        return block.decode(self.name, "surrogateescape").encode("utf-8", "surrogatepass")


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CHARSET_SAMPLE_BYTES = 32 << 10
_OTHER_SCRIPTS = [
    *("cp1251", "koi8_r", "koi8_u", "cp866", "cp1253", "cp1255", "cp1256", "cp874"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949", "cp1252"),
]
_BYTE_ORDERS = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_ESCAPED = re.compile("[\udc80-\udcff]")
_STAND_IN = re.compile(rb"\xed[\xb2\xb3][\x80-\xbf]")
_NON_ASCII = re.compile("[^\x00-\x7f\udc80-\udcff]")
_ASCII_LETTERS = string.ascii_letters.encode()
_WORD_WITH_HIGH_BYTE = re.compile(rb"[A-Za-z]*[\x80-\xff][A-Za-z\x80-\xff]+|[A-Za-z]+[\x80-\xff]")
_LINE_WITH_HIGH_BYTE = re.compile(rb"[^\r\n]*[\x80-\xff][^\r\n]*[\r\n]*")


def with_original_bytes(record: bytes) -> bytes:
    """What `to_utf8` made, with each byte that the encoding does not know as it stands in the file."""
    return _STAND_IN.sub(
        lambda match: match.group().decode("utf-8", "surrogatepass").encode("ascii", "surrogateescape"), record
    )


def guess_encoding(head: bytes, chosen: str | None, whole: bool) -> tuple[str, int, list[dict[str, Any]]]:
    """The encoding, the length of the byte order mark, and notes; `head` is how the file begins."""
    marked = next(((name, len(bom)) for bom, name in _BOMS if head.startswith(bom)), None)
    if chosen is not None:
        name = codecs.lookup(chosen).name
        name = "utf-8" if name == "utf-8-sig" else name
        if marked and marked[0].startswith(name):
            return *marked, []
        return _BYTE_ORDERS.get(name, name), 0, []
    if marked:
        return *marked, []
    wide = _wide_without_mark(head)
    if wide:
        return wide, 0, [_guessed(wide)]
    text = head.decode("utf-8", "surrogateescape")
    bad = len(_ESCAPED.findall(text)) - (0 if whole else len(_ESCAPED.findall(text[-3:])))
    if not bad:
        return "utf-8", 0, []
    good = len(_NON_ASCII.findall(text))
    if good > bad:
        return (
            "utf-8",
            0,
            [{"note": f"{bad} sampled bytes are not valid UTF-8; the server will refuse their records."}],
        )
    name = _legacy_encoding(head)
    return name, 0, [_guessed(name)]


def _guessed(name: str) -> dict[str, Any]:
    return {"note": f"The encoding was guessed to be {name}; set `encoding` if text comes out wrong."}


def _wide_without_mark(head: bytes) -> str | None:
    """UTF-16 text that is mostly ASCII has a zero in every other byte."""
    for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[0::2])):
        if len(head) >= 4 and zeros.count(0) > 0.7 * len(zeros):
            return name
    return None


def _legacy_encoding(head: bytes) -> str:
    lines = b"".join(match.group() for match in _LINE_WITH_HIGH_BYTE.finditer(head))[:_CHARSET_SAMPLE_BYTES]
    words = b"".join(_WORD_WITH_HIGH_BYTE.findall(lines))
    # Words of other scripts are high bytes all through, or half of them where characters take two bytes.
    if words and len(words.translate(None, _ASCII_LETTERS)) >= 0.5 * len(words):
        best = charset_normalizer.from_bytes(lines, cp_isolation=_OTHER_SCRIPTS).best()
        if best is not None and not _is_latin_script(str(best)):
            return codecs.lookup(best.encoding).name
    # A sample can hardly tell the single-byte encodings of Latin script apart; cp1252 is what most files hold.
    try:
        head.decode("cp1252")
    except UnicodeDecodeError:
        return "iso8859-1"
    return "cp1252"


def _is_latin_script(text: str) -> bool:
    letters = [char for char in text if char > "\x7f" and char.isalpha()]
    return sum(unicodedata.name(char, "").startswith("LATIN") for char in letters) >= 0.5 * len(letters)
