"""Text that came from somewhere else, made fit for a terminal."""

from __future__ import annotations


def clean(text: str | bytes, limit: int = 200) -> str:
    """``text`` as one printable line of at most ``limit`` characters.

    Every control, format and undecodable character (escape sequences, line ends, bidirectional
    overrides) becomes ``?``, so nothing a server or visitor sends reaches the terminal raw.
    """
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "replace")
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return short if short.isprintable() else "".join(c if c.isprintable() else "?" for c in short)


def hide(text: bytes, secret: str | None) -> bytes:
    """A peer's ``text`` without ``secret``, which it may repeat; do it before anything is cut off."""
    return text.replace(secret.encode(), "…".encode()) if secret else text


def amount(count: float) -> str:
    """A number of bytes for people: ``999 B``, ``1.5 kB``, ``12 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 9.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time span for people: ``3 ms``, ``1.5 s``, ``12 s``, ``4 min``, ``3 h``, ``2 d``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for limit, size, unit in ((119.5, 1, "s"), (7170, 60, "min"), (172_000, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def clock_time(seconds: float) -> str:
    """A time span that is still running: whole seconds, then as `duration`."""
    return f"{int(seconds)} s" if seconds < 120 else duration(seconds)


def unclutter(error: BaseException) -> str:
    """Why an operating-system call failed, without its number: ``connection refused``."""
    if isinstance(error, TimeoutError) and not error.strerror:
        return "timed out"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return clean(reason[:1].lower() + reason[1:] if not reason[:2].isupper() else reason)
