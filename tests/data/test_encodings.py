"""Encodings: text comes out as it was written, or is refused with encodings to choose from; never as other letters in silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.encodings import decode_text
from tests.support.storms import tries

GERMAN = "text;label\nDer Patient ist müde;0\ngrößer als üblich, Ödem;1\n"
LATIN = {
    "German": ("cp1252 latin-1 mac-roman cp850", "müde und größer als üblich\nÖdem links"),
    "French": ("cp1252 latin-1 mac-roman", "J'ai été très déçu\nl'hôtel était génial, où est-ce\ndéjà à côté"),
    "Spanish": ("cp1252 latin-1", "¿Qué tal? El niño está enfermo\n¡mañana!"),
    "Portuguese": ("cp1252", "A criança não está bem\nexcelente atenção"),
    "Swedish": ("cp1252", "välkommen till sjukhuset å\nmår bra"),
    "Icelandic": ("cp1252", "Það er gott að vera hér\nÞetta var mjög slæmt"),
    "Polish": ("cp1250 iso8859-2", "Źle się czuję, proszę o pomoc\nŁóżko było niewygodne"),
    "Czech": ("cp1250", "Příliš žluťoučký kůň\nvelmi špatné"),
    "Hungarian": ("cp1250", "Őszintén szólva rossz volt\nnagyon jó, gyönyörű"),
    "Romanian": ("cp1250", "Pacientul are febră şi tuse\nfoarte bine"),
    "Turkish": ("cp1254", "Hasta ateşli ve öksürüyor\nçok kötü, ışıklar sönük"),
    "signs alone": ("cp1252", "it’s “fine” – 5 €"),
    "a currency": ("iso8859-15", "schöne Grüße für 5 €"),
    "units": ("cp1252 latin-1", "38 °C, 5 µg ±2, §5, größer, x²"),
    "several": ("cp1252", "müde\ntrès déçu\nEl niño\nsjukhuset å\nnão está\nsygehus ø\n“naïve”"),
}
RUSSIAN = "Пациент жалуется на боль в животе\nВсе хорошо, спасибо большое за помощь\nУжасное обслуживание"


@pytest.mark.parametrize("language", LATIN)
def test_the_code_page_is_one_whose_languages_have_these_letters(language: str) -> None:
    encodings, text = LATIN[language]
    for encoding in encodings.split():
        assert decode_text(f"text;label\n{text};0\n".encode(encoding), "a.csv")[0] == f"text;label\n{text};0\n"


@tries(60)
@given(st.sampled_from(list(LATIN)), st.integers(1, 40))
def test_however_long_the_text(language: str, times: int) -> None:
    encodings, text = LATIN[language]
    encoding = encodings.split()[0]
    whole = f"{text}\n" * times
    assert decode_text(whole.encode(encoding), "a.csv")[0] == whole


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("患者は発熱があります\n問題ありません\nとても良い病院です", "shift_jis"),
        ("病人发烧了\n没有问题\n非常好的医院", "gb18030"),
        (RUSSIAN, "koi8-r"),
        ("المريض يعاني من الحمى\nكل شيء على ما يرام", "cp1256"),
    ],
)
def test_what_is_not_told_is_refused_and_can_be_given(text: str, encoding: str) -> None:
    whole = "text;label\n" + "".join(f"{line};0\n" for line in text.splitlines())
    with pytest.raises(Refused, match=r"it is not UTF-8 \(line 2\).*--set data\.encoding="):
        decode_text(whole.encode(encoding), "a.csv")
    assert decode_text(whole.encode(encoding), "a.csv", encoding) == (whole, encoding)
    assert decode_text(f"{RUSSIAN}\n{RUSSIAN}".encode("cp1251"), "a.csv")[1] == "cp1251"


@pytest.mark.parametrize("parts", [("utf-8", "cp1252"), ("cp1252", "utf-8")])
def test_lines_in_two_encodings_are_refused(parts: tuple[str, str]) -> None:
    many, one = parts
    with pytest.raises(Refused, match=r"are broken|differ from line to line"):
        decode_text(GERMAN.encode(many) * 2 + "Größe;1\n".encode(one), "a.csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    [GERMAN, f"text;label\n{RUSSIAN};0\n", "text;label\n病人发烧了而且咳嗽很厉害需要住院上上;0\n好;1\n", '[{"a": 1}]'],
)
def test_unicode_is_read_with_marks_and_without(encoding: str, text: str) -> None:
    for marks in range(3):
        assert decode_text(("\ufeff" * marks + text).encode(encoding), "a.csv")[0] == text


def test_zeros_are_characters_and_what_dos_puts_at_the_end_is_none() -> None:
    assert decode_text(b"text;label\na\0b;0\nc;1\n", "a.csv") == ("text;label\na\0b;0\nc;1\n", "utf-8")
    assert decode_text(GERMAN.encode() + b"\x1a", "a.csv")[0] == GERMAN
    assert decode_text(GERMAN.encode() + b"\0" * 99, "a.csv")[0] == GERMAN


@tries(300)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_in_one_sentence(content: bytes) -> None:
    said = _refusal(content)
    assert said is None or ("--set data.encoding=" in said and "\n" not in said)


def _refusal(content: bytes) -> str | None:
    try:
        decode_text(content, "a.csv")
    except Refused as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("content", "encoding", "said"),
    [
        (
            "größere Änderungen für über\nzweite\n".encode() + b"\xff,0\n",
            None,
            "1 characters of .* the first in line 3",
        ),
        (b"text\n\xe4\n", "utf-8", "line 2 of a.csv is not in it"),
        (b"text\n", "klingon", "Python knows no such encoding"),
        (b"text\n", "base64", "Python knows no such encoding"),
        (b"\xff\xfea\x00b", None, "line 1 of a.csv is not in it"),
    ],
)
def test_text_that_is_in_no_encoding_is_refused(content: bytes, encoding: str | None, said: str) -> None:
    with pytest.raises(Refused, match=said):
        decode_text(content, "a.csv", encoding)
