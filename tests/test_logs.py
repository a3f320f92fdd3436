"""Log lines as text and as JSON: one an event, its fields as keys, and nothing foreign breaks out of them."""

from __future__ import annotations

import json
import logging
import os
import re
from typing import Any

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import MessageError
from tinytun_gevent.lines import LineHandler
from tinytun_gevent.server import logs
from tinytun_gevent.server.logs import JsonFormatter, TextFormatter, formatter, visible

FOREIGN = "\x1b[31mred\n2026-01-01 00:00:00+0000 INFO    forged\r\u2028\u202e\x7f\x9b"


@pytest.fixture(params=["text", "json"])
def form(request: pytest.FixtureRequest) -> logging.Formatter:
    return formatter(request.param)


def record(
    message: str, *args: object, error: BaseException | None = None, **fields: Any
) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("tinytun_gevent.server", logging.INFO, __file__, 1, message, args, info)
    made.__dict__.update(fields)
    return made


def raised(error: BaseException) -> BaseException:
    """``error`` with a trace."""
    try:
        raise error
    except BaseException as caught:
        return caught


# -- one line ----------------------------------------------------------------------------------------


@given(st.text())
def test_foreign_text_stays_on_its_line(text: str) -> None:
    assert visible(text).isprintable()
    for form in (TextFormatter(), JsonFormatter()):
        line = form.format(record("tunnel %s", text, tunnel=text))
        assert line.isprintable()
        if isinstance(form, JsonFormatter):
            assert json.loads(line)["tunnel"] == text


def test_foreign_text_cannot_forge_a_line(form: logging.Formatter) -> None:
    line = form.format(record("refused %s: %s", FOREIGN, FOREIGN, error=raised(MessageError(FOREIGN))))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", line)
    assert all(more.startswith("    ") for more in line.split("\n")[1:])


def test_text_has_the_form_that_it_always_had() -> None:
    line = TextFormatter().format(record("tunnel %s opened", "app", tunnel="app"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} INFO    tunnel app opened", line)


def test_json_has_time_level_logger_message_and_fields() -> None:
    made = record("tunnel %s opened", "app", tunnel="app", status=7, duration=0.25)
    made.created, made.msecs = 1_700_000_000.123, 123.0
    assert json.loads(JsonFormatter().format(made)) == {
        "time": "2023-11-14T22:13:20.123Z",
        "level": "info",
        "logger": "tinytun_gevent.server",
        "message": "tunnel app opened",
        "tunnel": "app",
        "status": 7,
        "duration": 0.25,
    }


def test_fields_cannot_replace_what_every_line_has() -> None:
    assert (
        json.loads(JsonFormatter().format(record("x", level="none", time=1, object=object())))["level"]
        == "info"
    )


# -- stack traces ------------------------------------------------------------------------------------


def test_a_trace_has_no_foreign_exception_s_words(form: logging.Formatter) -> None:
    word = "sec" + "ret"
    try:
        try:
            int(word)
        except ValueError as error:
            raise KeyError(word) from error
    except KeyError as caught:
        line = form.format(record("failed", error=caught))
    assert "KeyError" in line
    assert "caused by" in line
    assert "ValueError" in line
    assert "test_logs.py" in line
    assert "secret" not in line


def test_a_trace_has_our_own_words_and_the_system_s(form: logging.Formatter) -> None:
    assert "the head is odd" in form.format(record("failed", error=raised(MessageError("the head is odd"))))
    assert "No such file" in form.format(record("failed", error=raised(FileNotFoundError(2, "No such file"))))


def test_a_chain_that_goes_round_ends() -> None:
    error = raised(ValueError())
    error.__cause__ = error
    assert TextFormatter().format(record("failed", error=error)).count("ValueError") == logs.CAUSES


def test_a_greenlet_s_error_is_a_line_like_others(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError("secret")

    hub = gevent.get_hub()
    logs.adopt(hub)
    try:
        gevent.spawn(fail).join(60)
    finally:
        del hub.print_exception
    assert [made.getMessage() for made in caplog.records] == ["a greenlet failed"]
    assert "secret" not in capfd.readouterr().err


# -- the handler's own lines -------------------------------------------------------------------------


def test_lines_of_the_handler_s_own_are_json_too() -> None:
    read, write = os.pipe()
    handler = LineHandler(write)
    handler.setFormatter(JsonFormatter())
    handler._lost, handler._reason = 3, "nobody read them"
    handler.emit(record("hello"))
    handler.emit(record("%d", "no number"))
    lines = os.read(read, 65536).decode().splitlines()
    os.close(read)
    os.close(write)
    missing, hello, mistake = map(json.loads, lines)
    assert missing["message"] == "3 log lines are missing: nobody read them"
    assert (missing["level"], hello["message"]) == ("warning", "hello")
    assert mistake["message"] == "a log line could not be put together: TypeError"
