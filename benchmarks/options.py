"""The command line of `benchmarks/run`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .peers import CONTENDERS, HAPROXY, OURS, OURS_TCP
from .planning import Plan
from .scenarios import EXTRA, SCENARIOS

LIMIT = 2400  # seconds; what a full run may take
QUICK_LIMIT = 120
QUICK_PEERS = (OURS, OURS_TCP, "ssh -R", HAPROXY)

_ALL = (*SCENARIOS, *EXTRA)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; exits with 2 on nonsense."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description="Measures the tunnel beside others in one run; prints medians, spreads and ratios.",
    )
    parser.add_argument("--peers", type=one_of(peer_names()), metavar="NAME[,..]",
                        help=f"who is measured, of: {', '.join(peer_names())}; default: all but \"limits\"")
    parser.add_argument("--scenario", type=one_of(scenario_names()), metavar="NAME[,..]",
                        help=f"of: {', '.join(scenario_names())}")
    parser.add_argument("--rounds", type=positive, metavar="N", help="default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true",
                        help=f"one round of {', '.join(QUICK_PEERS)}, core scenarios, under 2 minutes")
    parser.add_argument("--limit", type=positive, metavar="S",
                        help=f"end after S s; default: {LIMIT}, with --quick {QUICK_LIMIT}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single figure")
    parser.add_argument("--results", type=Path, metavar="FILE",
                        help="the report as Markdown; what was written by hand at its end is kept")
    return parser.parse_args(words)


def plan(options: argparse.Namespace) -> Plan:
    """The run that the options ask for."""
    peers = options.peers or (list(QUICK_PEERS) if options.quick else _usual())
    if options.scenario:
        scenarios = [s for s in _ALL if s.name in options.scenario]
    else:
        scenarios = [s for s in SCENARIOS if s.quick or not options.quick]
    return Plan(
        contenders=[contender for contender in CONTENDERS if contender.name in peers],
        scenarios=scenarios,
        rounds=options.rounds or (1 if options.quick else 3),
        limit=options.limit or (QUICK_LIMIT if options.quick else LIMIT),
        quick=options.quick,
    )


def _usual() -> list[str]:
    """Who is measured if nobody is named."""
    return [contender.name for contender in CONTENDERS if not contender.asked_for]


def peer_names() -> dict[str, list[str]]:
    """What ``--peers`` takes, each with the contenders that it stands for."""
    return {contender.name: [contender.name] for contender in CONTENDERS}


def scenario_names() -> dict[str, list[str]]:
    """What ``--scenario`` takes: scenarios and groups, each with the scenarios that it stands for."""
    names = {scenario.name: [scenario.name] for scenario in _ALL}
    for scenario in _ALL:
        for group in scenario.groups:
            if group != scenario.name and (scenario in SCENARIOS or group.startswith("far-")):
                names.setdefault(group, []).append(scenario.name)
    return names


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number above 0, not {text!r}")
    return int(text)


def one_of(allowed: Mapping[str, Sequence[str]]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated choice of names, to all that they stand for.

    Hyphens may stand for spaces, and case does not matter.
    """
    known = {_plain(name): members for name, members in allowed.items()}

    def read(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",") if word.strip()]
        unknown = [word for word in chosen if _plain(word) not in known]
        if unknown or not chosen:
            what = ", ".join(unknown) or "nothing"
            raise argparse.ArgumentTypeError(f"{what} is not one of: {', '.join(allowed)}")
        return list(dict.fromkeys(member for word in chosen for member in known[_plain(word)]))

    return read


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "-", name.lower())
