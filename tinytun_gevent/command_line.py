"""Checks a command line against its docopt text before docopt reads it. No I/O.

docopt takes any unique prefix for an option, so that a new option changes what an old script means, and says
of most mistakes only that there is one. What is checked here is made from the same text: its usage lines and
its options.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final

from .errors import UsageError

_SECRET: Final = re.compile(r"tt_")
"""How our tokens begin: one in a wrong place is not repeated."""

_ALIKE: Final = 0.7
"""How much two words have in common when one may have been meant for the other (1.0: all)."""

WIDTH: Final = 110
"""Columns of a command's usage in its help."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option as its text describes it; ``lines`` are that description."""

    long: str
    short: str | None
    takes_value: bool
    lines: tuple[str, ...]


@dataclass(slots=True)
class Command:
    """One usage line: the words that name it, its operands, and the options that go with it."""

    words: tuple[str, ...]
    usage: str
    operands: tuple[str, ...]
    #: How many of the operands must be there.
    required: int
    options: frozenset[str] = field(default_factory=frozenset)
    #: Those that must be there.
    needed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its words, such as ``token new``."""
        return " ".join(self.words)


class CommandLineError(UsageError):
    """The words of a command line fit no usage; ``usage`` is the line that fits best, if one does."""

    def __init__(self, message: str, usage: str | None = None) -> None:
        super().__init__(message)
        self.usage = usage


class Grammar:
    """The commands and options of one program, read from its docopt text."""

    def __init__(self, program: str, doc: str, without: Mapping[str, Mapping[str, str]]) -> None:
        """``without`` has, by command, options of ``[options]`` that mean nothing to it, and why: or ""."""
        self.program = program
        self._without = without
        self._doc = doc
        self.options = {option.long: option for option in _options(doc)}
        self._shorts = {option.short: option for option in self.options.values() if option.short}
        self.commands = list(_commands(program, doc))
        named = {self._long(flag) for command in self.commands for flag in _flags(command.usage)}
        general = set(self.options) - named
        for command in self.commands:
            own = {self._long(flag) for flag in _flags(command.usage)}
            if "[options]" in command.usage:
                own |= general
            command.options = frozenset(own.difference(self._without.get(command.name, ())))

    def _long(self, flag: str) -> str:
        return self._shorts[flag].long if flag in self._shorts else flag

    # -- checking -------------------------------------------------------------

    def check(self, argv: Sequence[str], blank: Collection[str] | None = None) -> list[str]:
        """Returns ``argv`` for docopt; raises CommandLineError if it is no command line of the program.

        ``blank`` are the options that may have an empty value; None: all may.
        """
        words, given = self._read(argv, blank)
        command = self._command_of(words)
        wrong = next((flag for flag in given if flag not in command.options), None)
        operands = words[len(command.words) :]
        if wrong is None and len(operands) < command.required:
            missing = command.operands[len(operands)].strip("<>")
            raise _wrong(f"the {missing} is missing, for example: {self._example(command)}", command)
        if len(operands) > len(command.operands):
            if command.words and not command.operands:  # for "login" it may be a secret: do not repeat it
                raise _wrong(f"{command.name} takes options only", command)
            raise _wrong(f"{_shown(operands[len(command.operands)])} is not expected", command)
        if wrong is not None:
            whose = command.name or self.program
            raise _wrong(f"{wrong} does not go with {whose}{self._why(command, wrong)}", command)
        if needed := next((flag for flag in command.needed if flag not in given), None):
            raise _wrong(f"{needed} is missing", command)
        return [word for word in argv if word != "--"]

    def _read(self, argv: Sequence[str], blank: Collection[str] | None) -> tuple[list[str], list[str]]:
        """The words beside the options, and the long names of those, in their order."""
        words: list[str] = []
        given: list[str] = []
        rest = iter(argv)
        for word in rest:
            if word == "--":
                words += rest
                if strange := next((word for word in words if word.startswith("-") and word != "-"), None):
                    raise _wrong(f"{strange!r} is not expected", self._maybe(words))
            elif not word.startswith("-") or word == "-":
                words.append(word)
            else:
                for name, option, value in self._split(word, words):
                    if option.takes_value and value is None:
                        value = next(rest, None)
                        if value is None or value == "--" or value.partition("=")[0] in self._names:
                            raise _wrong(f"{name} needs a value", self._maybe(words))
                    if option.long in given:
                        raise _wrong(f"{name} is given twice", self._maybe(words))
                    if value == "" and blank is not None and option.long not in blank:
                        raise _wrong(f"{name} has an empty value: leave it out instead", self._maybe(words))
                    given.append(option.long)
        return words, given

    def _why(self, command: Command, flag: str) -> str:
        """Why an option does not go with ``command``, or with which ones it goes."""
        reason = self._without.get(command.name, {}).get(flag)
        homes = [one.name for one in self.commands if flag in one.options and one.name]
        return f": {reason}" if reason else f"; it is for {', '.join(homes)}" if homes else ""

    @property
    def _names(self) -> set[str]:
        return {*self.options, *self._shorts}

    def _split(self, word: str, words: Sequence[str]) -> Iterator[tuple[str, Option, str | None]]:
        """The options in one word (``-qsNAME`` has two), each with its value if that is there too."""
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = self.options.get(name)
            if option is None:
                raise _wrong(f"{name!r} is not an option{self._meant(name)}", self._maybe(words))
            if equals and not option.takes_value:
                raise _wrong(f"{name} takes no value", self._maybe(words))
            yield name, option, value if equals else None
            return
        at = 1
        while at < len(word):
            name = f"-{word[at]}"
            option = self._shorts.get(name)
            if option is None:
                raise _wrong(f"{name!r} is not an option", self._maybe(words))
            at += 1
            if option.takes_value:
                yield name, option, word[at:] if at < len(word) else None
                return
            yield name, option, None

    def _meant(self, name: str) -> str:
        """``; did you mean …?`` for an option that there is not, if one resembles it."""
        begin = [flag for flag in self.options if flag.startswith(name) and len(name) > 3]
        close = begin or get_close_matches(name, self.options, 1, _ALIKE)
        return f"; did you mean {' or '.join(close[:3])}?" if close else ""

    # -- commands -------------------------------------------------------------

    def _maybe(self, words: Sequence[str]) -> Command | None:
        """The command that ``words`` begin with, or None."""
        fitting = [one for one in self.commands if one.words == tuple(words[: len(one.words)])]
        return max(fitting, key=lambda one: len(one.words), default=None) if words else None

    def _command_of(self, words: Sequence[str]) -> Command:
        command = self._maybe(words)
        if command is not None and command.words:
            return command
        of_it = [one for one in self.commands if words and one.words[:1] == (words[0],)]
        if of_it:
            raise _wrong(f"say what to do: {' | '.join(one.name for one in of_it)}", of_it[0])
        bare = next((one for one in self.commands if not one.words), None)
        if not words:
            if bare is not None:
                return bare
            raise _wrong(f"say what to do, for example: {self._example(self.commands[0])}")
        names = list(dict.fromkeys(one.words[0] for one in self.commands if one.words))
        close = get_close_matches(words[0], names, 1, _ALIKE)
        hint = f"; did you mean {close[0]}?" if close else f": commands are {', '.join(names)}"
        raise _wrong(f"{_shown(words[0])} is no command{hint}")

    def _example(self, command: Command) -> str:
        examples = {"<target>": "3000", "<token>": "LABEL"}
        needed = command.operands[: command.required]
        operands = [examples.get(one, one.strip("<>").upper()) for one in needed]
        return " ".join([self.program, *command.words, *operands])

    # -- help -----------------------------------------------------------------

    def help(self, argv: Sequence[str]) -> str:
        """The help for the command that ``argv`` names, if one; that of the whole program otherwise."""
        words = [word for word in argv if not word.startswith("-")]
        commands = [one for one in self.commands if one.words and one.words[:1] == tuple(words[:1])]
        exact = [one for one in commands if one.words == tuple(words[: len(one.words)])]
        return self._help_of(exact or commands) if commands else self._doc

    def help_on(self, words: Sequence[str]) -> str:
        """The answer to ``help WORDS``. Raises CommandLineError where that is no command."""
        if words and not any(one.words[:1] == (words[0],) for one in self.commands):
            self._command_of(words[:1])
        return self.help(words)

    def _help_of(self, commands: Sequence[Command]) -> str:
        parts = ["Usage:\n", *(f"{_wrapped(one.usage)}\n" for one in commands)]
        told = re.findall(rf"(?m)^  {commands[0].words[0]}  +\S.*\n(?:   +\S.*\n)*", self._doc)
        target = re.findall(r"(?m)^  <target>  .*\n", self._doc) if "<target>" in commands[0].operands else []
        if told or target:
            parts += ["\n", *target, *told[:1]]
        allowed = {flag for one in commands for flag in one.options}
        shown = [option for option in self.options.values() if option.long in allowed]
        parts += ["\nOptions:\n", *("\n".join(option.lines) + "\n" for option in shown)]
        parts.append(f"\n'{self.program} --help' shows all commands.\n")
        return "".join(parts)


def _wrong(problem: str, command: Command | None = None) -> CommandLineError:
    return CommandLineError(problem, command.usage if command is not None else None)


def _options(doc: str) -> Iterator[Option]:
    """The options that ``doc`` describes, behind its usage."""
    described: list[list[str]] = []
    behind = doc[doc.index("Usage:") :].partition("\n\n")[2]
    within = False
    for line in behind.splitlines():
        if re.match(r"  -\S", line):
            described.append([line])
            within = True
        elif within and re.match(r" {6,}\S", line):
            described[-1].append(line)
        else:
            within = False
    for lines in described:
        flags = re.split(r"  +", lines[0].strip())[0]
        names = re.findall(r"(?<!\S)--?\w[\w-]*", flags)
        long = next(name for name in names if name.startswith("--"))
        short = next((name for name in names if not name.startswith("--")), None)
        takes_value = re.search(r" [A-Z]+$", flags) is not None
        yield Option(long, short, takes_value, tuple(lines))


def _commands(program: str, doc: str) -> Iterator[Command]:
    """The usage lines of ``doc`` but those that ask for help or the version."""
    usage = doc[doc.index("Usage:") :].partition("\n\n")[0]
    for text in re.split(rf"(?m)^  (?={re.escape(program)}(?: |$))", usage)[1:]:
        line = " ".join(text.split())
        if line.startswith(f"{program} ("):
            continue
        words: list[str] = []
        operands = re.findall(r"\[?<[a-z-]+>\]?", line)
        for word in line.split()[1:]:
            if not re.fullmatch(r"[a-z]+", word):
                break
            words.append(word)
        required = sum(not one.startswith("[") for one in operands)
        names = tuple(one.strip("[]") for one in operands)
        needed = tuple(_flags(re.sub(r"\[[^\]]*\]", "", line)))
        yield Command(tuple(words), line, names, required, needed=needed)


def _flags(usage: str) -> list[str]:
    return re.findall(r"(?<![\w-])--?[a-z][\w-]*", usage)


def _wrapped(usage: str) -> str:
    """A usage line in columns, broken between its parts."""
    parts = re.findall(r"\[[^\]]*\]|\S+", usage)
    lines, line = [], " "
    for part in parts:
        if len(line) + 1 + len(part) > WIDTH:
            lines.append(line)
            line = "     "
        line += f" {part}"
    return "\n".join([*lines, line])


def _shown(word: str) -> str:
    """A word as an error repeats it."""
    return "a token" if _SECRET.match(word) else repr(word)
