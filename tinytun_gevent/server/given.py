"""Where each variable's value comes from: a flag, the environment or the configuration file, in this order.

In the environment a variable has two names: its own, and with :data:`PREFIX` before it, which wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any, Final

from ..errors import UsageError
from . import settings

PREFIX: Final = "TINYTUN_SERVER_"
"""Before a variable's name, where its bare name is somebody else's. TINYTUN_SERVER_URL is the client's; no
variable of the server has that name."""

CONFIG: Final = "--config"
"""The flag that names the file."""

_KUBERNETES: Final = re.compile(r"(?:tcp|udp|sctp)://", re.IGNORECASE)
"""How Kubernetes fills NAME_PORT in every container, for a service called "name"."""


@dataclass(slots=True)
class Given:
    """What was said of the variables, and where; nothing of it is checked but what the file says."""

    #: The configuration file's path; blank if there is none.
    path: str = ""
    #: What the file says, by variable, as text.
    file: Mapping[str, str] = field(default_factory=dict)
    #: The text that counts, by field.
    values: dict[str, str] = field(default_factory=dict)
    #: The name that the value was given by, for each variable: flag, variable or, from the file, its path.
    origins: dict[str, str] = field(default_factory=dict)
    #: Variables that were ignored, and why, a line each.
    ignored: list[str] = field(default_factory=list)

    def is_from_file(self, variable: str) -> bool:
        """Whether the value that counts is the file's."""
        return bool(self.path) and self.origins.get(variable) == self.path


def collect(
    options: Sequence[Field[Any]],
    environ: Mapping[str, str],
    overrides: Mapping[str, str],
    file: Mapping[str, str] | None = None,
) -> Given:
    """What was given for ``options``, the fields of `ServerConfig`.

    The keys of ``overrides`` are variables or flags, and :data:`CONFIG`; a blank variable counts as absent, a
    blank flag does not. ``file`` is what was read from the file before; without it, it is read now. Raises
    UsageError.
    """
    flags = dict(overrides)
    given = Given(path=flags.pop(CONFIG, ""))
    if CONFIG in overrides or file:
        given.file = _read(given.path, options) if file is None else file
    for option in options:
        variable, flag = option.metadata["variable"], option.metadata["flag"]
        layers = [(given.path, given.file[variable])] if variable in given.file else []
        layers += _from_environ(variable, environ, given)
        layers += [(key, flags.pop(key)) for key in (variable, flag) if key in flags]
        if layers:
            given.origins[variable], given.values[option.name] = layers[-1]
    if flags:
        raise UsageError(f"{next(iter(flags))}: there is no such option")
    return given


def overridden(options: Sequence[Field[Any]], given: Given) -> list[str]:
    """What of the file does not count, because a flag or a variable says something else; a line each.

    Called when all values are known to be allowed.
    """
    lines = []
    for option in options:
        variable, read = option.metadata["variable"], option.metadata["form"].read
        if variable not in given.file or given.is_from_file(variable):
            continue
        if read(given.values[option.name].strip()) != read(given.file[variable].strip()):
            origin = given.origins[variable]
            what = "the option" if origin.startswith("--") else "the environment's"
            lines.append(f"{variable.lower()} of the file does not count: {what} {origin} wins")
    return lines


def _read(path: str, options: Sequence[Field[Any]]) -> dict[str, str]:
    from . import configfile  # not for those who have no file

    return configfile.read(path, options)


def _from_environ(variable: str, environ: Mapping[str, str], given: Given) -> Iterator[tuple[str, str]]:
    """What the environment says of a variable, by name; the last one wins."""
    names = [name for name in (variable, PREFIX + variable) if environ.get(name, "").strip()]
    if variable == "LOG_LEVEL" and not names and (level := _rust_log(environ)):
        yield "RUST_LOG", level
    for name in names:
        if variable.endswith("_PORT") and _KUBERNETES.match(environ[name].strip()):
            given.ignored.append(
                f"{name}={quoted(environ[name])} is ignored: Kubernetes sets it for a service of that name; "
                f"say {PREFIX}{variable}, or enableServiceLinks: false in the pod"
            )
        else:
            yield name, environ[name]


def _rust_log(environ: Mapping[str, str]) -> str:
    text = environ.get("RUST_LOG", "")
    try:
        return str(settings.RUST_LOG.read(text))
    except ValueError as error:
        allowed = f"a level or target=level, comma-separated, the level {error}"
        raise UsageError(f"RUST_LOG={quoted(text)}: allowed: {allowed}") from None


def quoted(text: str) -> str:
    """A value inside an error's one line: quoted where it would not be seen or would break the line."""
    return text if text.isprintable() and text.strip() == text and text else repr(text)
