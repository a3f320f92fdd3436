"""When a change of a file counts."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.filechange import EMPTY_SECONDS, FileChange, Mark, Verdict, mark_of

OLD = Mark(1, 10, 500, 1, 1)
EDITED = replace(OLD, size=600, modified=2, changed=2)
RENAMED = replace(OLD, inode=11, modified=2, changed=2)
EMPTY = replace(OLD, size=0, modified=2, changed=2)

READ, WAIT, WARN = Verdict.READ, Verdict.WAIT, Verdict.EMPTY


def looks(*marks: Mark | None, taken: Mark | None = OLD) -> list[Verdict]:
    """What comes of looks at these marks, a second apart; whatever is to be read is taken."""
    change, verdicts = FileChange(taken), []
    for now, mark in enumerate(marks):
        verdicts.append(change.look(mark, float(now)))
        if verdicts[-1] is READ:
            change.take(mark)
    return verdicts


def test_what_has_not_changed_is_not_read() -> None:
    assert looks(OLD, OLD, OLD) == [WAIT] * 3


def test_a_file_that_was_renamed_into_its_place_counts_at_once() -> None:
    assert looks(OLD, RENAMED, RENAMED) == [WAIT, READ, WAIT]
    assert looks(replace(RENAMED, inode=10, device=2)) == [READ]


def test_a_file_that_was_changed_in_place_counts_when_it_was_the_same_at_two_looks() -> None:
    growing = [replace(EDITED, size=size, modified=size) for size in (600, 700, 800)]
    assert looks(*growing, growing[-1], growing[-1]) == [WAIT, WAIT, WAIT, READ, WAIT]


def test_one_that_is_back_as_it_was_is_not_read() -> None:
    assert looks(EDITED, OLD, OLD) == [WAIT] * 3


def test_a_change_in_place_after_a_rename_waits_again() -> None:
    still_written = replace(RENAMED, size=900)
    assert looks(RENAMED, still_written, still_written) == [READ, WAIT, READ]


def test_an_empty_file_counts_after_its_time_and_warns_once() -> None:
    seconds = int(EMPTY_SECONDS)
    assert looks(*[EMPTY] * (seconds + 2)) == [WARN, *[WAIT] * (seconds - 1), READ, WAIT]


def test_an_empty_file_that_was_renamed_into_its_place_waits_as_well() -> None:
    assert looks(replace(EMPTY, inode=11), replace(EMPTY, inode=11)) == [WARN, WAIT]


def test_a_file_that_is_truncated_again_and_again_is_empty_all_the_while() -> None:
    touched = [replace(EMPTY, modified=second) for second in range(int(EMPTY_SECONDS) + 1)]
    assert looks(*touched)[-2:] == [WAIT, READ]


def test_time_with_content_in_between_begins_the_time_of_an_empty_one_anew() -> None:
    seconds = int(EMPTY_SECONDS)
    verdicts = looks(*[EMPTY] * (seconds - 1), EDITED, *[EMPTY] * seconds)
    assert READ not in verdicts
    assert verdicts.count(WARN) == 2


def test_an_empty_file_that_is_written_counts_as_any_other() -> None:
    assert looks(EMPTY, EDITED, EDITED) == [WARN, WAIT, READ]
    assert looks(EMPTY, RENAMED) == [WARN, READ]


def test_a_line_end_is_nothing() -> None:
    assert looks(replace(EMPTY, size=1)) == [WARN]
    assert looks(replace(EMPTY, size=3), replace(EMPTY, size=3)) == [WAIT, READ]


def test_a_missing_file_counts_at_the_second_look_and_a_new_one_likewise() -> None:
    """It may be removed and made anew, and is then written in place."""
    assert looks(None, None, None) == [WAIT, READ, WAIT]
    assert looks(None, RENAMED, RENAMED) == [WAIT, WAIT, READ]
    assert looks(None, OLD) == [WAIT, WAIT]


def test_a_file_that_was_never_read_may_go_missing() -> None:
    assert looks(OLD, None, None, None, taken=None) == [WAIT, WAIT, READ, WAIT]
    assert looks(OLD, OLD, taken=None) == [WAIT, READ]
    assert looks(EMPTY, None, None, taken=None) == [WARN, WAIT, READ]


def test_what_could_not_be_read_whole_is_to_be_read_again() -> None:
    change = FileChange(OLD)
    assert [change.look(RENAMED, 0.0), change.look(RENAMED, 1.0)] == [READ, READ]
    assert change.taken == OLD
    change.take(RENAMED)
    assert change.look(RENAMED, 2.0) is WAIT


def test_a_first_look_tells_by_the_calendar_how_old_a_change_is() -> None:
    mark = replace(OLD, modified=100 * 10**9, changed=103 * 10**9)
    assert mark.is_new(104, 2)
    assert not mark.is_new(105, 2)
    assert replace(mark, modified=103 * 10**9, changed=0).is_new(104, 2), "whatever the system calls changed"
    assert mark.is_new(90, 2), "a clock is wrong"


def test_the_mark_of_a_real_file(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    assert mark_of(path) is None
    path.write_bytes(b"one")
    first = mark_of(link)
    assert first == mark_of(path)
    assert first is not None
    assert not first.is_empty
    assert first.is_new(time.time(), 60)
    os.truncate(path, 0)
    emptied = mark_of(path)
    assert emptied is not None
    assert emptied.is_empty
    draft = tmp_path / "draft"
    draft.write_bytes(b"one")
    os.replace(draft, path)
    replaced = mark_of(path)
    assert replaced is not None
    assert replaced.inode != first.inode


MARKS = st.sampled_from([None, OLD, EDITED, RENAMED, EMPTY, replace(EMPTY, inode=11)])


@given(st.lists(st.tuples(MARKS, st.floats(0.5, 4)), max_size=40))
def test_nothing_is_read_that_was_not_whole(steps: list[tuple[Mark | None, float]]) -> None:
    change, now, seen = FileChange(OLD), 0.0, [(0.0, OLD)]
    for mark, pause in steps:
        now += pause
        verdict = change.look(mark, now)
        before = seen[-1][1]
        seen.append((now, mark))
        if verdict is not READ:
            continue
        assert mark != change.taken
        if mark is not None and mark.is_empty:
            assert all(m is not None and m.is_empty for when, m in seen if when > now - EMPTY_SECONDS)
        elif mark != before:
            assert mark is not None
            assert before is not None
            assert mark.inode != before.inode
        change.take(mark)
