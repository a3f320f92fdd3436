"""The search: inputs are mutated, and those that reach new code are kept and mutated further.

No compiled fuzzer is needed: `sys.settrace` follows the few modules that a target names, line by line.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

CORPUS = Path(__file__).with_name("corpus")
MAX_INPUT = 4096
"""Bytes of an input that is kept: no rule of these parsers needs more, their limits are tested elsewhere."""

_NUMBERS = (b"0", b"1", b"-1", b"255", b"65535", b"65536", b"4294967296", b"9223372036854775807", b"1" * 40)
_BYTES = bytes((0, 1, 9, 10, 13, 32, 34, 44, 58, 59, 95, 127, 128, 255))


@dataclass(frozen=True)
class Target:
    """A parser to be fuzzed; see the package's docstring."""

    name: str
    one: Callable[[bytes], None]
    seeds: Sequence[bytes]
    tokens: Sequence[bytes]
    files: frozenset[str]

    @classmethod
    def of(cls, module: Any) -> Target:
        code: Iterable[ModuleType] = module.CODE
        files = frozenset(str(part.__file__) for part in code)
        return cls(module.__name__.rpartition(".")[2], module.one, module.SEEDS, module.TOKENS, files)

    @property
    def folder(self) -> Path:
        return CORPUS / self.name

    def kept(self) -> list[bytes]:
        """The corpus, in a fixed order."""
        return [path.read_bytes() for path in sorted(self.folder.glob("*"))]

    def keep(self, data: bytes, prefix: str = "") -> Path:
        """Writes an input into the corpus."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{prefix}{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        return path


class Arcs:
    """Which line followed which, in some files, while a function ran.

    A loop over many bytes shows nothing new: after `MOST` lines nobody looks any more.
    """

    MOST = 3000

    def __init__(self, files: frozenset[str]) -> None:
        self._files = files
        self._numbers: dict[CodeType, int] = {}
        self._last = self._left = 0
        self._seen: set[int] = set()

    def of(self, function: Callable[[bytes], None], data: bytes) -> set[int]:
        """The arcs of ``function(data)``; raises what it raises."""
        self._seen, self._last, self._left = set(), 0, self.MOST
        sys.settrace(self._call)
        try:
            function(data)
        finally:
            sys.settrace(None)
        return self._seen

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self._left <= 0 or frame.f_code.co_filename not in self._files:
            return None
        self._note(frame)
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._note(frame)
        return self._line if self._left > 0 else None

    def _note(self, frame: FrameType) -> None:
        number = self._numbers.setdefault(frame.f_code, len(self._numbers) + 1)
        here = number << 16 | (frame.f_lineno or 0)
        self._seen.add(self._last << 32 | here)
        self._last = here
        self._left -= 1


class Mutator:
    """Makes new inputs of old ones. The same random numbers make the same inputs."""

    def __init__(self, tokens: Sequence[bytes], numbers: random.Random) -> None:
        self._tokens = tokens
        self._random = numbers
        self._ways = (
            *(self._flip, self._byte, self._insert_token, self._insert_token, self._replace, self._delete),
            *(self._repeat, self._number, self._lines, self._cut, self._splice),
        )

    def mutate(self, pool: Sequence[bytes]) -> bytes:
        """One of ``pool``, rather a short one, with one change or several."""
        data = min(self._random.choice(pool), self._random.choice(pool), key=len)
        for _ in range(self._random.choice((1, 1, 1, 2, 2, 3, 5))):
            data = self._random.choice(self._ways)(data, pool)
        return data[:MAX_INPUT]

    def _span(self, data: bytes, most: int = 32) -> tuple[int, int]:
        start = self._random.randint(0, len(data))
        return start, min(len(data), start + self._random.randint(0, most))

    def _flip(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        if not data:
            return data
        at = self._random.randrange(len(data))
        return data[:at] + bytes((data[at] ^ 1 << self._random.randrange(8),)) + data[at + 1 :]

    def _byte(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        start, end = self._span(data, 1)
        value = self._random.choice(_BYTES) if self._random.random() < 0.7 else self._random.randrange(256)
        return data[:start] + bytes((value,)) + data[end:]

    def _insert_token(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        at = self._random.randint(0, len(data))
        return data[:at] + self._random.choice(self._tokens) + data[at:]

    def _replace(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        start, end = self._span(data)
        return data[:start] + self._random.choice(self._tokens) + data[end:]

    def _delete(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[end:]

    def _repeat(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        start, end = self._span(data)
        return data[:end] + data[start:end] * self._random.choice((1, 1, 2, 8, 64)) + data[end:]

    def _number(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        """Another number where one stands, or a big-endian one of 1 to 4 bytes."""
        digits = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
        if digits and self._random.random() < 0.6:
            at = end = self._random.choice(digits)
            while data[end : end + 1].isdigit():
                end += 1
            return data[:at] + self._random.choice(_NUMBERS) + data[end:]
        size = self._random.randint(1, 4)
        at = self._random.randint(0, len(data))
        value = self._random.choice((0, 1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1))
        return data[:at] + (value & 2 ** (8 * size) - 1).to_bytes(size, "big") + data[at + size :]

    def _lines(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        """Lines change places, or one is there twice."""
        lines = data.split(b"\r\n")
        one, other = self._random.randrange(len(lines)), self._random.randrange(len(lines))
        if self._random.random() < 0.5:
            lines[one], lines[other] = lines[other], lines[one]
        else:
            lines.insert(one, lines[other])
        return b"\r\n".join(lines)

    def _cut(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        return data[: self._random.randint(0, len(data))]

    def _splice(self, data: bytes, pool: Sequence[bytes]) -> bytes:
        other = self._random.choice(pool)
        return data[: self._random.randint(0, len(data))] + other[self._random.randint(0, len(other)) :]


@dataclass
class Found:
    """What a search has brought so far."""

    runs: int = 0
    arcs: set[int] = field(default_factory=set)
    #: Inputs that reached new code, with what they reach.
    reaching: list[tuple[bytes, frozenset[int]]] = field(default_factory=list)
    #: Inputs that broke an invariant, one for each place where it showed, with the error.
    broken: dict[str, tuple[bytes, BaseException]] = field(default_factory=dict)


def search(target: Target, seconds: float, seed: int) -> Iterator[Found]:
    """Searches for ``seconds``; yields what it has once a second, when something broke, and at the end."""
    found, arcs = Found(), Arcs(target.files)
    numbers = random.Random(seed)
    mutator = Mutator(target.tokens, numbers)
    began = shown = time.monotonic()
    broken = 0
    for data in (*target.seeds, *target.kept()):
        _try(target, arcs, data, found)
    while (now := time.monotonic()) - began < seconds:
        pool = [data for data, _ in found.reaching[-64:]] if numbers.random() < 0.3 else None
        _try(target, arcs, mutator.mutate(pool or [data for data, _ in found.reaching]), found)
        if now - shown >= 1 or len(found.broken) != broken:
            shown, broken = now, len(found.broken)
            yield found
    yield found


def _try(target: Target, arcs: Arcs, data: bytes, found: Found) -> None:
    found.runs += 1
    try:
        reached = arcs.of(target.one, data)
    except Exception as error:
        found.broken.setdefault(where(error), (data, error))
        return
    if not reached <= found.arcs:
        found.arcs |= reached
        found.reaching.append((data, frozenset(reached)))


def where(error: BaseException) -> str:
    """The place an error comes from, and its kind: what makes two findings the same one."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
    return f"{type(error).__name__} at {place}"


def smallest_cover(reaching: Sequence[tuple[bytes, frozenset[int]]]) -> list[bytes]:
    """Few and short inputs that together reach all that ``reaching`` does."""
    chosen, covered = [], set[int]()
    for data, arcs in sorted(reaching, key=lambda pair: (len(pair[0]), pair[0])):
        if not arcs <= covered:
            covered |= arcs
            chosen.append(data)
    return chosen


def shortened(target: Target, data: bytes, place: str) -> bytes:
    """A shorter input that breaks the same invariant at the same place."""
    size = max(1, len(data) // 2)
    while size:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            try:
                target.one(shorter)
            except Exception as error:
                if where(error) == place:
                    data = shorter
                    continue
            at += size
        size //= 2
    return data
