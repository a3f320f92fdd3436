"""What CI makes of pip-audit's answers: no vulnerability, some, or nobody to ask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_process import DEADLINE, ROOT

AUDIT = ROOT / ".ci" / "audit"
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3

FINE: dict[str, Any] = {"name": "h2", "version": "4.4.1", "vulns": []}
FLAWED: dict[str, Any] = {**FINE, "vulns": [{"id": "PYSEC-1", "fix_versions": ["4.4.2"], "aliases": []}]}
NOT_FOUND: dict[str, Any] = {"name": "h2", "skip_reason": "Dependency not found on PyPI"}
TRACEBACK = "Traceback …\nrequests.exceptions.ConnectionError: unreachable"

STUB = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(arguments) + "\\n")
answer = json.loads({answers!r})[arguments[arguments.index("--vulnerability-service") + 1]]
sys.exit(answer) if isinstance(answer, str) else print(json.dumps({{"dependencies": answer, "fixes": []}}))
"""


def audit(folder: Path, ignore: str = "", **answers: Any) -> tuple[int, str, list[list[str]]]:
    """Exit code, output and what pip-audit was asked, where each service answers as ``answers`` say."""
    log, program = folder / "log", folder / "pip-audit"
    program.write_text(STUB.format(python=sys.executable, log=str(log), answers=json.dumps(answers)))
    program.chmod(0o700)
    (folder / "ignore.txt").write_text(ignore)
    command = [sys.executable, AUDIT, program, folder / "requirements.txt", folder / "ignore.txt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    asked = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done.returncode, done.stdout + done.stderr, asked


@pytest.mark.parametrize(
    ("pypi", "osv", "code", "said"),
    [
        ([FINE], TRACEBACK, CLEAN, "pypi knows of no vulnerability"),
        ([FINE, FLAWED], TRACEBACK, VULNERABLE, "h2 4.4.1: PYSEC-1, mended in 4.4.2"),
        ([NOT_FOUND], [FINE], CLEAN, "osv knows of no vulnerability"),
        ([NOT_FOUND, FLAWED], TRACEBACK, VULNERABLE, "PYSEC-1"),
        (TRACEBACK, [FLAWED], VULNERABLE, "PYSEC-1"),
        ([FINE, NOT_FOUND], TRACEBACK, UNKNOWN, "1 of 2 packages: Dependency not found"),
        (TRACEBACK, TRACEBACK, UNKNOWN, "ConnectionError: unreachable"),
    ],
)
def test_no_vulnerability_is_told_from_nobody_to_ask(
    tmp_path: Path, pypi: Any, osv: Any, code: int, said: str
) -> None:
    status, output, _ = audit(tmp_path, pypi=pypi, osv=osv)
    assert status == code, output
    assert said in output


def test_what_is_ignored_needs_a_reason(tmp_path: Path) -> None:
    status, output, asked = audit(tmp_path, "# why\nPYSEC-2 we never call it\n", pypi=[FINE])
    assert (status, asked[0][-2:]) == (CLEAN, ["--ignore-vuln", "PYSEC-2"])
    assert "but the 1 that are ignored" in output
    status, output, _ = audit(tmp_path, "PYSEC-2\n", pypi=[FINE])
    assert (status, output) == (VULNERABLE, "ignore.txt: no reason for PYSEC-2\n")


def test_our_own_list_is_well_formed(tmp_path: Path) -> None:
    status, output, _ = audit(tmp_path, (AUDIT.parent / "audit-ignore.txt").read_text(), pypi=[FINE])
    assert status == CLEAN, output
