"""Whatever happens in whatever order: nobody waits while there is room, and nothing stays counted."""

from __future__ import annotations

from dataclasses import dataclass, field

import gevent
from helpers import deadline
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tinytun_gevent.registry import Registry, Tunnel
from tinytun_gevent.server.account import Account, Limits
from tinytun_gevent.server.budgets import Budgets
from tinytun_gevent.server.tally import Tally
from tinytun_gevent.server.usage import TunnelBudget
from tinytun_gevent.wire.handshake import Kind

figures = st.integers(0, 3)
steps = st.lists(
    st.tuples(
        st.sampled_from(["admit", "wait", "knock", "leave", "kill", "update", "open", "close", "new"]),
        st.integers(0, 2),
        figures,
        figures,
    ),
    max_size=40,
)


@dataclass
class World:
    """Three tunnels of one account, and everybody who is there or waits."""

    budgets: Budgets = field(default_factory=lambda: Budgets(Tally()))
    registry: Registry = field(default_factory=lambda: Registry(["localhost"]))
    tunnels: list[Tunnel] = field(default_factory=list)
    inside: list[TunnelBudget] = field(default_factory=list)
    waiting: list[gevent.Greenlet[[TunnelBudget], None]] = field(default_factory=list)
    shut: set[int] = field(default_factory=set)

    def open(self, number: int, most: int, each: int) -> None:
        self.budgets.open(self.tunnels[number], _account(most, each))

    def step(self, what: str, number: int, most: int, each: int) -> None:
        tunnel = self.tunnels[number]
        budget: TunnelBudget = tunnel.budget
        if what == "admit" and budget.admit() is None:
            self.inside.append(budget)
        elif what == "wait":
            self.waiting.append(gevent.spawn(self._wait, budget))
        elif what == "knock" and budget.is_shut(lambda: self.shut.discard(number)):
            self.shut.add(number)
        elif what == "leave" and self.inside:
            self.inside.pop(number % len(self.inside)).leave()
        elif what == "kill" and self.waiting:
            self.waiting.pop(number % len(self.waiting)).kill(block=bool(most % 2))
        elif what == "update":
            self.budgets.update(_account(most, each))
        elif what == "open":
            self.open(number, most, each)
        elif what == "close":
            self.budgets.close(tunnel)
            self.open(number, most, each)
        elif what == "new":
            further = self.registry.claim(Kind.HTTP, opener="a")
            self.budgets.open(further, _account(most, each))
            self.budgets.close(further)

    def _wait(self, budget: TunnelBudget) -> None:
        if budget.wait_room(3600):
            self.inside.append(budget)

    def check(self) -> None:
        for number, tunnel in enumerate(self.tunnels):
            budget: TunnelBudget = tunnel.budget
            if not budget.full:
                assert not budget._queue
                assert number not in self.shut
        holder = self.budgets._holders["a"]
        assert holder.scope.visitors == len(self.inside)
        assert sum(tunnel.budget.visitors for tunnel in self.tunnels) == len(self.inside)


def _account(most: int, each: int) -> Account:
    return Account("a", "a", Limits(visitors=most), Limits(visitors=each))


@given(steps)
@example([("admit", 0, 0, 0), ("wait", 1, 0, 0), ("knock", 2, 0, 0), ("new", 0, 3, 1)])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_nobody_waits_while_there_is_room_and_nothing_stays_counted(
    sequence: list[tuple[str, int, int, int]],
) -> None:
    world = World()
    for number in range(3):
        world.tunnels.append(world.registry.claim(Kind.HTTP, opener="a"))
        world.open(number, 1, 1)
    with deadline():
        for step in sequence:
            world.step(*step)
            gevent.sleep(0)
            gevent.sleep(0)
            world.check()
        gevent.killall(world.waiting)
        for budget in world.inside:
            budget.leave()
        world.inside.clear()
        world.check()
        for tunnel in world.tunnels:
            world.budgets.close(tunnel)
        world.budgets.tick(0.0)
    assert len(world.budgets) == 0
