"""The encoding of a text file: by its mark, by the zeros of UTF-16 and UTF-32, UTF-8, or found among those of office programs.

charset-normalizer finds the script, but often holds several code pages of one script equally likely, as they share most letters. Of
those for Latin letters one is taken in which the letters are those of a language that it was made for.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Mapping
from itertools import islice

from fedloom.core.errors import Refused

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of the next
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
)
WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
USUAL = "cp1252"
LIKELY = (USUAL, "cp1250", "cp1251", "cp1253", "cp1254")
"""Encodings of office programs, among which one is chosen; others have to be given."""
WESTERN = (
    "äöüß",
    "àâæçéèêëîïôœùûüÿ",
    "áéíñóúü",
    "áâãàçéêíóôõú",
    "àèéìíîòóùú",
    "åäöé",
    "æøåé",
    "éëïíóúèêö",
    "àçèéíïòóú",
)
CENTRAL = ("ąćęłńóśźż", "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîşţ", "čćđšž")
"""Letters beyond a to z, a word for each language: main exemplar characters of Unicode's CLDR. Icelandic is left to the detector: its
letters are Turkish ones in cp1254.
"""
ALPHABETS: Mapping[str, tuple[str, ...]] = {
    USUAL: WESTERN,
    "cp1250": CENTRAL,
    "cp1254": ("çğıöşüâîû",),
    "iso8859-15": WESTERN,
    "iso8859-2": CENTRAL,
    "mac-roman": WESTERN,
    "cp850": WESTERN,
}
"""Languages for which an encoding of Latin letters was made, the likelier encodings first."""
FOREIGN_SHARE = 0.1
"""Share of the characters beyond ASCII that may be foreign to a language, or stand where its words have none."""
SAMPLE = 20_000
"""Characters beyond ASCII that are looked at."""
JOINS = "'’‘´`\xad\xa0·"
"""What stands between two letters beside letters and dashes."""
ORDINALS = "ªº"
"""What stands behind numbers and words, not before a letter."""
SIGNS = f"µ{ORDINALS}"
"""Signs that count as letters in Unicode, and belong to no alphabet."""
APART = "¬¶±"
"""What stands at no letter; letters of iso8859-2 are these in other encodings."""
PADDING = bytes(8)
"""Zeros at the end of a file that belong to no character."""


def decode_text(content: bytes, where: str, encoding: str | None = None) -> tuple[str, str]:
    """Return the text of a file without its byte order mark and what DOS put at ends, and the encoding: as given, or found.

    Raises:
        Refused: bytes that the encoding does not have, or none that fits.
    """
    content = content.rstrip(b"\0") if content.endswith(PADDING) else content
    marked = next((name for mark, name in MARKS if content.startswith(mark)), None)
    encoding = encoding or marked or _unicode_form(content) or detect_encoding(content, where)
    try:
        return content.decode(encoding).lstrip("\ufeff").rstrip("\0\x1a"), encoding
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        remedy = f"line {line} of {where} is not in it; save the file as UTF-8, or give its encoding with --set data.encoding=..."
        raise Refused("data.encoding", encoding, remedy) from None
    except (LookupError, ValueError):
        raise Refused("data.encoding", encoding, "Python knows no such encoding; cp1252 and utf-16 are some") from None


def _unicode_form(content: bytes) -> str | None:
    """Return which form of Unicode bytes without a mark are. None: none.

    Only the wide forms have zeros in each line end and each letter from a to z; read in the wrong one these become other characters.
    """
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        narrow = None
    else:
        narrow = "utf-8"
    start = content[:4096]
    controls = sum(byte < ord("\t") or ord("\r") < byte < ord(" ") for byte in start)
    if narrow is None or controls > len(start) / 10:
        plain = {name: _share_of_ascii(start, name) for name in WIDE if 0 in start}
        best = max(plain, key=plain.__getitem__, default="")
        if plain.get(best, 0) > 1 / 50:
            return best
    return narrow


def _share_of_ascii(content: bytes, encoding: str) -> float:
    """Return the share of characters that are ASCII and not zero, where bytes are read in this encoding; 0 where there is a zero."""
    text = content[: len(content) // 4 * 4].decode(encoding, "replace")
    return 0.0 if "\0" in text.rstrip("\0") or not text else sum("\0" < sign < "\x7f" for sign in text) / len(text)


def detect_encoding(content: bytes, where: str) -> str:
    """Find the encoding of text that is not UTF-8; of those that fit equally, cp1252 is the usual one.

    Raises:
        Refused: UTF-8 with a few broken characters, no encoding that fits, or none in which a language is recognised.
    """
    from charset_normalizer import from_bytes

    lenient = content.decode("utf-8", "replace")
    broken = lenient.count("\ufffd")
    line = lenient[: lenient.find("\ufffd")].count("\n") + 1
    remedy = "save it as UTF-8, or give its encoding with --set data.encoding=cp1252 (or another)"
    if sum(character > "\x7f" for character in lenient) > 2 * broken:
        raise Refused(
            "data.encoding", "utf-8", f"{broken} characters of {where} are broken, the first in line {line}; {remedy}"
        )
    if (latin := _latin_encoding(content)) is not None:
        return latin
    fitting = [match for match in from_bytes(content, cp_isolation=list(LIKELY)) if not _is_broken(str(match))]
    best = fitting[0] if fitting else None
    equal = [match for match in fitting if best and (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    if best and best.coherence:  # a language is recognised
        return USUAL if USUAL in [match.encoding for match in equal] else best.encoding
    names = [match.encoding for match in equal or from_bytes(content)][:3]
    may_be = f"may be {' or '.join(names)}, or differ from line to line" if names else "was not found"
    example = names[0] if names else USUAL
    remedy = f"save it as UTF-8, or give its encoding as in --set data.encoding={example} (or another)"
    raise Refused("data.path", where, f"it is not UTF-8 (line {line}), and its encoding {may_be}; {remedy}")


def _latin_encoding(content: bytes) -> str | None:
    """Return the first encoding of Latin letters in which the text has the letters of one of its languages."""
    for encoding, alphabets in ALPHABETS.items():
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        foreign = [match[0].lower()[0] for match in islice(re.finditer(r"[^\x00-\x7f]", text), SAMPLE)]
        letters = [sign for sign in foreign if sign.isalpha() and sign > "\x7f" and sign not in SIGNS]
        known = max(sum(sign in alphabet for sign in letters) for alphabet in alphabets)
        if known >= (1 - FOREIGN_SHARE) * len(letters) and not _is_broken(text):
            return encoding
    return None


def _is_broken(text: str) -> bool:
    """Whether many characters stand where no language has them: signs and capitals inside words, as text in a wrong encoding has."""
    foreign = [match.start() for match in islice(re.finditer(r"[^\x00-\x7f]", text), SAMPLE)]
    strange = sum(_is_strange(text[max(at - 1, 0) : at], text[at], text[at + 1 : at + 2]) for at in foreign)
    return strange > FOREIGN_SHARE * len(foreign)


def _is_strange(before: str, sign: str, after: str) -> bool:
    if sign == "¤" or unicodedata.category(sign) == "Cc":
        return True
    if sign in ORDINALS:
        return after.isalpha()
    if sign.isalpha():
        return sign.isupper() and before.islower()
    if sign in APART:
        return before.isalpha() or after.isalpha()
    dash = unicodedata.category(sign) == "Pd" or sign in JOINS
    return before.isalpha() and after.isalpha() and not dash
