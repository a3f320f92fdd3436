"""What a reader must know to judge the figures: the machine and the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

from .processes import clean_environment, find

ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, str]:
    """Facts by name, in the order they are shown."""
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "CPU": f"{_cpu_model()}, {os.cpu_count()} CPUs",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "tinytun_gevent": _own_version(),
    }
    for package in ("gevent", "h2", "gunicorn"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = "not installed"
    for program, arguments, pattern in (
        ("nginx", ["-v"], r"nginx/(\S+)"),
        ("curl", ["--version"], r"curl (\S+)"),
        ("wrk", ["-v"], r"wrk (\S+)"),
        ("ssh", ["-V"], r"OpenSSH_([^\s,]+)"),
        ("haproxy", ["-v"], r"version (\S+)"),
        ("bore", ["--version"], r"bore(?:-cli)? (\S+)"),
        ("rathole", ["--version"], r"(\d+\.\d+\.\d+)"),
        ("frps", ["--version"], r"(\S+)"),
        ("chisel", ["--version"], r"(\S+)"),
        ("cc", ["--version"], r"(\d+\.\d+\.\d+)"),
    ):
        facts[program] = _program_version(program, arguments, pattern)
    return facts


def load_average() -> str:
    """How busy the machine was in the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def _program_version(program: str, arguments: list[str], pattern: str) -> str:
    path = find(program)
    if path is None:
        return "not installed"
    said = subprocess.run(
        [path, *arguments], capture_output=True, text=True, timeout=10, env=clean_environment(), check=False
    )
    found = re.search(pattern, said.stdout + said.stderr)
    return found[1] if found else "unknown"


def _own_version() -> str:
    """The version in the checkout, and its commit where git knows one."""
    found = re.search(
        r'^__version__ = "([^"]+)"', (ROOT / "tinytun_gevent" / "__init__.py").read_text(), re.MULTILINE
    )
    version = found[1] if found else "unknown"
    git = find("git")
    if git is None:
        return version
    commit = subprocess.run(
        [git, "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        timeout=10,
        env=clean_environment(),
        check=False,
    )
    return f"{version} ({commit.stdout.strip()})" if commit.returncode == 0 else version
