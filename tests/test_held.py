"""What a reload cannot change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server.config import ServerConfig
from tinytun_gevent.server.held import HELD, SWITCHED, hold, keep

OLD = ServerConfig(proxy_port=80, backlog=100)


def test_what_did_not_change_waits_for_nothing() -> None:
    assert keep(OLD, hold(OLD)) == (OLD, [])
    assert keep(OLD, {}) == (OLD, [])


def test_what_the_master_holds_stays_and_is_named() -> None:
    new = replace(OLD, proxy_port=81, bind="127.0.0.1", backlog=200, max_tunnels=7)
    kept, waiting = keep(new, hold(OLD))
    assert kept == replace(OLD, max_tunnels=7)
    assert waiting == ["PROXY_PORT", "BIND", "BACKLOG"]


def test_tls_is_switched_by_a_restart_but_its_directory_may_be_another() -> None:
    with_tls = replace(OLD, tls_dir="/a")
    assert keep(replace(OLD, tls_dir="/b"), hold(with_tls)) == (replace(OLD, tls_dir="/b"), [])
    assert keep(with_tls, hold(OLD)) == (OLD, ["TLS_DIR"])
    assert keep(OLD, hold(with_tls)) == (with_tls, ["TLS_DIR"])


def test_what_makes_no_sense_beside_what_stays_is_told() -> None:
    new = replace(OLD, tls_dir="/a", connection_tls="required")
    with pytest.raises(UsageError, match="TLS_DIR cannot change without a restart, and so: CONNECTION_TLS"):
        keep(new, hold(OLD))


def test_a_variable_that_is_no_longer_known_is_ignored() -> None:
    assert keep(OLD, {**hold(OLD), "GONE": "1"}) == (OLD, [])


def test_every_socket_is_held() -> None:
    assert {variable for variable, _, _ in replace(OLD, tls_dir="/a").listeners()} <= {*HELD, SWITCHED}
