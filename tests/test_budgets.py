"""What accounts and tunnels use of their limits: counted, refused, waited for, forgotten."""

from __future__ import annotations

import logging
import time

import gevent
import pytest
from helpers import deadline
from support import DEADLINE, eventually

from tinytun_gevent.errors import TryLaterError
from tinytun_gevent.registry import Registry, Tunnel
from tinytun_gevent.server import budgets, usage
from tinytun_gevent.server.account import ANYBODY, Account, Limits
from tinytun_gevent.server.budgets import Budgets
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.server.usage import TunnelBudget
from tinytun_gevent.wire.handshake import Kind


class Site:
    """Budgets and tunnels without a server."""

    def __init__(self) -> None:
        self.registry = Registry(["localhost"])
        self.tally = Tally()
        self.budgets = Budgets(self.tally)

    def open(self, account: Account) -> Tunnel:
        tunnel = self.registry.claim(Kind.HTTP, opener=account.id)
        self.budgets.open(tunnel, account)
        return tunnel

    def budget(self, account: Account) -> TunnelBudget:
        budget: TunnelBudget = self.open(account).budget
        return budget


@pytest.fixture
def site() -> Site:
    return Site()


NONE = Limits()


def holder(limits: Limits = NONE, each: Limits = NONE, id: str = "a") -> Account:
    return Account(id, id, limits, each)


# -- tunnels ------------------------------------------------------------------


def test_one_tunnel_too_many_is_refused_until_one_is_closed(site: Site) -> None:
    account = holder(Limits(tunnels=2))
    first = site.open(account)
    site.open(account)
    with pytest.raises(TryLaterError) as caught:
        site.open(account)
    assert caught.value.status == 429
    assert caught.value.retry_after == budgets.TUNNEL_AGAIN
    assert "has 2" in str(caught.value)
    assert site.tally.refusals[Refusal.TUNNELS] == 1
    site.open(holder(Limits(tunnels=2), id="b"))
    site.budgets.close(first)
    site.budgets.close(first)
    site.open(account)


def test_an_owner_who_comes_back_opens_no_further_tunnel(site: Site) -> None:
    account = holder(Limits(tunnels=1))
    tunnel = site.open(account)
    site.budgets.open(tunnel, account)
    with pytest.raises(TryLaterError):
        site.open(account)


def test_a_tunnel_that_waits_since_a_restart_counts(site: Site) -> None:
    account = holder(Limits(tunnels=1))
    waiting = site.registry.claim(Kind.HTTP, opener="a")
    site.budgets.restore(waiting)
    with pytest.raises(TryLaterError):
        site.open(account)
    site.budgets.open(waiting, account)  # its owner
    site.budgets.close(waiting)
    site.open(account)


def test_strangers_have_no_limit_in_common(site: Site) -> None:
    anybody = Account(limits=Limits(tunnels=1, visitors=1), each=Limits(visitors=1))
    each = [site.budget(anybody) for _ in range(3)]
    assert [budget.admit() for budget in each] == [None, None, None]
    assert each[0].admit() is not None
    assert len(site.budgets) == 0


def test_where_nothing_is_limited_there_is_no_budget(site: Site) -> None:
    assert site.open(ANYBODY).budget is None
    assert site.open(holder(Limits(tunnels=5))).budget is None
    assert site.open(holder(Limits(visitors=5))).budget is not None
    assert site.open(holder(each=Limits(rate=5))).budget is not None


# -- visitors and requests ----------------------------------------------------


def test_a_visitor_too_many_is_told_so(site: Site) -> None:
    budget = site.budget(holder(each=Limits(visitors=2)))
    assert budget.admit() is None
    assert budget.admit() is None
    failure = budget.admit()
    assert failure is not None
    assert (failure.status, failure.retry_after, failure.limit) == (503, 1, "visitors")
    assert failure.reason.startswith("This tunnel has ")
    assert budget.visitors == 2
    assert site.tally.refusals[Refusal.VISITORS] == 1
    budget.leave()
    assert budget.admit() is None


def test_visitors_of_all_tunnels_of_an_account_count_together(site: Site) -> None:
    account = holder(Limits(visitors=3), Limits(visitors=2))
    one, other = site.budget(account), site.budget(account)
    assert [one.admit(), one.admit(), other.admit()] == [None, None, None]
    failure = other.admit()
    assert failure is not None
    assert "all tunnels together" in failure.reason
    assert site.budget(holder(Limits(visitors=3), id="b")).admit() is None


def test_requests_beyond_a_second_s_worth_are_told_when_to_come_again(site: Site) -> None:
    budget = site.budget(holder(each=Limits(requests=3)))
    for _ in range(3):
        assert budget.admit() is None
        budget.leave()
    failure = budget.admit()
    assert failure is not None
    assert (failure.status, failure.retry_after, failure.limit) == (429, 1, "requests")
    assert site.tally.refusals[Refusal.REQUESTS] == 1
    assert budget.visitors == 0


def test_requests_to_all_tunnels_of_an_account_count_together(site: Site) -> None:
    account = holder(Limits(requests=4), Limits(requests=3))
    one, other = site.budget(account), site.budget(account)
    assert [one.admit() for _ in range(3)] == [None] * 3
    assert other.admit() is None
    failure = other.admit()
    assert failure is not None
    assert "all tunnels together" in failure.reason


def test_the_log_says_once_a_minute_which_limit_of_which_tunnel(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunnel = site.open(holder(each=Limits(visitors=1, requests=2)))
    with caplog.at_level(logging.INFO):
        tunnel.budget.admit()
        for _ in range(5):
            tunnel.budget.admit()
        assert [record.getMessage() for record in caplog.records] == [
            f"tunnel {tunnel.name} has reached a limit: visitors"
        ]
        tunnel.budget.leave()
        for _ in range(5):
            if tunnel.budget.admit() is None:
                tunnel.budget.leave()
        assert len(caplog.records) == 2
        later = time.monotonic() + usage.SAY_AGAIN
        monkeypatch.setattr(time, "monotonic", lambda: later)
        for _ in range(2):
            tunnel.budget.admit()  # within the limits that are new again, and then not
        said = f"tunnel {tunnel.name} has reached a limit: visitors"
        assert caplog.messages[2:] == [f"{said}, and 3 more like this in 60 s", said]


# -- waiting for room ---------------------------------------------------------


def test_connections_are_let_in_in_the_order_of_coming(site: Site) -> None:
    budget, order = site.budget(holder(each=Limits(visitors=1))), []

    def wait(number: int) -> None:
        assert budget.wait_room(5)
        order.append(number)
        gevent.sleep(0)
        budget.leave()

    with deadline():
        assert budget.wait_room(5)
        waiting = [gevent.spawn(wait, number) for number in range(5)]
        gevent.idle()
        assert order == []
        budget.leave()
        gevent.joinall(waiting)
    assert order == [0, 1, 2, 3, 4]
    assert budget.visitors == 0


def test_room_at_one_tunnel_lets_in_who_waits_at_another_of_the_account(site: Site) -> None:
    account = holder(Limits(visitors=1))
    one, other = site.budget(account), site.budget(account)
    reopened: list[str] = []
    with deadline():
        one.enter()
        assert other.is_shut(lambda: reopened.append("door"))
        waiting = gevent.spawn(other.wait_room, 5)
        gevent.sleep(0)
        one.leave()
        assert waiting.get()
        assert reopened == []  # the one who was let in is the one there is room for
        other.leave()
    assert reopened == ["door"]
    assert not other.is_shut(lambda: None)


def test_nobody_waits_for_room_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_HELD", 2)
    budget = site.budget(holder(each=Limits(visitors=1)))
    budget.enter()
    with deadline():
        waiting = [gevent.spawn(budget.wait_room, DEADLINE) for _ in range(2)]
        gevent.sleep(0)
        assert not budget.wait_room(DEADLINE)  # no place to wait
        gevent.killall(waiting)
        assert not budget.wait_room(0.02)
    assert site.tally.refusals[Refusal.VISITORS] == 2
    budget.leave()
    assert budget.wait_room(DEADLINE)
    assert budget.visitors == 1


def test_who_is_killed_takes_no_room(site: Site) -> None:
    """Be it while he waits, or in the moment in which he is let in."""
    budget = site.budget(holder(each=Limits(visitors=1)))

    def carry() -> None:
        assert budget.wait_room(5)
        try:
            gevent.sleep(5)
        finally:
            budget.leave()

    with deadline():
        budget.enter()
        early, late = gevent.spawn(carry), gevent.spawn(carry)
        gevent.sleep(0)
        early.kill()
        gevent.kill(late)
        budget.leave()  # lets the late one in, who is killed before he knows
        late.join()
    assert budget.visitors == 0
    assert not budget.full


# -- figures that change, accounts that go --------------------------------------


def test_changed_figures_count_at_once_for_what_is_open(site: Site) -> None:
    account = holder(Limits(visitors=1, requests=100), Limits(visitors=5))
    tunnel = site.open(account)
    budget = tunnel.budget
    assert budget.admit() is None
    assert budget.admit() is not None
    with deadline():
        waiting = gevent.spawn(budget.wait_room, 5)
        gevent.sleep(0)
        changed = holder(Limits(visitors=2, requests=100), Limits(visitors=5))
        site.budgets.update(changed)
        assert waiting.get()
    assert tunnel.account is changed
    assert tunnel.budget is budget
    site.budgets.update(holder(Limits(), Limits()))
    assert all(budget.admit() is None for _ in range(10))
    site.budgets.update(holder(id="nobody here", limits=Limits(visitors=1)))
    assert len(site.budgets) == 1


def test_a_tunnel_without_limits_gets_some(site: Site) -> None:
    tunnel = site.open(holder())
    assert tunnel.budget is None
    site.budgets.update(holder(each=Limits(visitors=1, rate=1000)))
    assert tunnel.budget.admit() is None
    assert tunnel.budget.admit() is not None
    assert tunnel.budget.rate.rate == 1000
    site.budgets.update(holder(Limits(rate=2000)))
    assert tunnel.budget.rate.rate == 0
    assert tunnel.budget.rate.above.rate == 2000  # that of the account holds for it all the same


def test_an_account_is_forgotten_when_it_owes_nothing(site: Site) -> None:
    account = holder(Limits(visitors=5, requests=1000))
    tunnel = site.open(account)
    assert tunnel.budget.admit() is None
    site.budgets.tick(0)
    site.budgets.close(tunnel)
    site.budgets.tick(0)
    assert len(site.budgets) == 1, "forgotten with a visitor"
    tunnel.budget.leave()
    again = site.open(account)
    assert len(site.budgets) == 1
    assert again.budget.admit() is None
    again.budget.leave()
    site.budgets.close(again)
    eventually(lambda: (site.budgets.tick(0), not len(site.budgets))[1])


def test_what_is_used_up_stays_so_when_all_tunnels_are_opened_anew(site: Site) -> None:
    account = holder(Limits(requests=1))
    tunnel = site.open(account)
    assert tunnel.budget.admit() is None
    tunnel.budget.leave()
    site.budgets.close(tunnel)
    site.budgets.tick(0)
    assert site.budget(account).admit() is not None
