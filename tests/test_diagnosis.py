"""A chain of checks: what depends on a failed one is skipped, and says because of which."""

from __future__ import annotations

import json

import pytest

from tinytun_gevent.diagnosis import Chain, NotApplicable, Result, Trouble


def fails() -> str:
    raise Trouble("it is broken", "mend it")


def means_nothing() -> str:
    raise NotApplicable("there is none")


@pytest.fixture
def chain() -> Chain:
    chain = Chain()
    assert chain.run("first", lambda: "fine")
    assert not chain.run("second", fails, ["first"])
    assert not chain.run("third", lambda: pytest.fail("was made"), ["first", "second"])
    assert not chain.run("fourth", lambda: pytest.fail("was made"), ["third"])
    assert not chain.run("fifth", means_nothing)
    assert chain.run("sixth", lambda: "fine", ["first"])
    return chain


def test_what_depends_on_a_failed_check_is_skipped(chain: Chain) -> None:
    assert [(step.result, step.text) for step in chain.steps] == [
        (Result.OK, "fine"),
        (Result.FAILED, "it is broken"),
        (Result.SKIPPED, "because of: second"),
        (Result.SKIPPED, "because of: third"),
        (Result.SKIPPED, "there is none"),
        (Result.OK, "fine"),
    ]
    assert chain.failed
    assert not Chain().failed


def test_the_text_has_a_line_for_each_and_what_to_do_below(chain: Chain) -> None:
    lines = chain.text(as_json=False).splitlines()
    assert lines[:3] == [
        "ok       first   fine",
        "failed   second  it is broken",
        "                 -> mend it",
    ]
    assert len(lines) == 7


def test_as_json(chain: Chain) -> None:
    said = json.loads(chain.text(as_json=True))
    assert said["ok"] is False
    assert said["steps"][1] == {
        "name": "second",
        "result": "failed",
        "text": "it is broken",
        "advice": "mend it",
    }
    assert "advice" not in said["steps"][0]
