"""Error codes of our own: what begins an answer, and the document that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.wire.answer_codes import AnswerCode, start_code

PROTOCOL = Path(__file__).parent.parent / "docs" / "protocol.md"


@pytest.mark.parametrize(
    ("received", "code"),
    [
        (b"", None),
        (b"H", None),
        (b"HTTP/1.1 200 OK\r\n\r\n", None),
        (b"\r\n\nHTTP/1.1 200 OK", None),
        (b"\r\n", None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", AnswerCode.NOT_HTTP),
        (b"S", AnswerCode.NOT_HTTP),
        (b"-ERR wrong number of arguments\r\n", AnswerCode.NOT_HTTP),
        (b"HTTQ", AnswerCode.NOT_HTTP),
        (b"\x15", AnswerCode.NOT_HTTP),
        (b"\x15\x03\x01\x00\x02\x02\x46", AnswerCode.TLS),
        (b"\x00\x00\x12\x04\x00\x00", AnswerCode.NOT_HTTP),
    ],
)
def test_how_an_answer_begins(received: bytes, code: AnswerCode | None) -> None:
    assert start_code(received) is code


@given(st.binary(max_size=40), st.integers(0, 40))
def test_more_bytes_never_make_a_wrong_beginning_right(received: bytes, cut: int) -> None:
    if start_code(received[:cut]) is not None:
        assert start_code(received) is not None


def test_every_code_is_in_the_protocols_document() -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(0x[0-9a-f]{8})` \|", PROTOCOL.read_text("utf-8"), re.MULTILINE)
    assert listed == [(code.name, f"0x{code:08x}") for code in AnswerCode]
