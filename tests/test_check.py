"""``--check``: what it finds, and how bad that is."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fcntl")

from certificates import AUTHORITY, chain_of, install, issue, key_of, put, self_signed
from server_process import COMMAND, DEADLINE, ServerProcess, environment

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server import check, pem
from tinytun_gevent.server.check import Findings
from tinytun_gevent.server.config import ServerConfig


def found(environ: dict[str, str]) -> Findings:
    given = ServerConfig.given({"BASE_DOMAIN": "a.test", "BIND": "127.0.0.1", **environ})
    return check.examine(ServerConfig.of(given), given)


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--check", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


# -- certificates -------------------------------------------------------------


def test_a_certificate_that_is_as_it_should_be(tmp_path: Path) -> None:
    install(tmp_path, issue("*.a.test", "a.test"))
    findings = found({"TLS_DIR": str(tmp_path), "CONNECTION_TLS": "required"})
    assert (findings.errors, findings.warnings) == ([], [])
    assert findings.notes[0].startswith("certificate for *.a.test, a.test, until ")


def test_certificates_are_for_every_domain(tmp_path: Path) -> None:
    install(tmp_path, issue("*.a.test", "a.test"))
    findings = found({"TLS_DIR": str(tmp_path), "BASE_DOMAIN": "a.test,b.test"})
    assert (findings.errors, findings.warnings) == ([], ["no certificate is for *.b.test"])


def test_an_expired_certificate_is_an_error_unless_another_one_is_shown(tmp_path: Path) -> None:
    install(tmp_path, issue("*.a.test", days=-1), "old")
    assert found({"TLS_DIR": str(tmp_path)}).errors == [f"{tmp_path}/old/fullchain.pem has expired"]
    install(tmp_path, issue("*.a.test"), "new")
    findings = found({"TLS_DIR": str(tmp_path)})
    assert findings.errors == []
    assert findings.warnings == [f"{tmp_path}/old/fullchain.pem has expired; another one is shown"]


def test_a_certificate_that_is_not_valid_yet(tmp_path: Path) -> None:
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    install(tmp_path, AUTHORITY.issue_cert("*.a.test", not_before=now + day, not_after=now + 2 * day))
    findings = found({"TLS_DIR": str(tmp_path)})
    assert findings.errors == []
    assert findings.warnings == [f"{tmp_path}/site/fullchain.pem is not valid yet"]


def test_a_common_name_is_no_name(tmp_path: Path) -> None:
    put(tmp_path / "old.pem", self_signed("*.a.test", alternative=False))
    findings = found({"TLS_DIR": str(tmp_path)})
    assert findings.notes[0].startswith("certificate for no name, until ")
    assert findings.warnings[0].startswith(f"{tmp_path}/old.pem: no client accepts it: it has no alternative")
    assert findings.warnings[1:] == ["no certificate is for *.a.test"]


@pytest.mark.parametrize("required", [False, True])
def test_what_lacks_its_other_half_is_named(tmp_path: Path, required: bool) -> None:
    put(tmp_path / "cert.pem", chain_of(issue("*.a.test")))
    put(tmp_path / "key.pem", key_of(issue("*.b.test")))
    use = "required" if required else "accepted"
    findings = found({"TLS_DIR": str(tmp_path), "CONNECTION_TLS": use})
    expected = [
        f"{tmp_path}/cert.pem has a certificate, but its key is in no file",
        f"{tmp_path}/key.pem has a key, but its certificate is in no file",
        f"TLS_DIR={tmp_path}: there is no certificate with its key",
    ]
    assert (findings.errors if required else findings.warnings) == expected


def test_a_key_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    install(tmp_path, issue("*.a.test"))
    put(tmp_path / "bad.pem", b"-----BEGIN PRIVATE KEY-----\nnothing")
    expected = [f"{tmp_path}/bad.pem cannot be used: its key is not complete"]
    assert found({"TLS_DIR": str(tmp_path)}).errors == expected


def test_what_this_user_may_not_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, who runs some tests, may read everything: so it is the call that is refused."""
    install(tmp_path, issue("*.a.test"))

    def refusing(path: str, mode: str) -> object:
        if path.endswith("privkey.pem"):
            raise PermissionError(13, "Permission denied")
        return open(path, mode)

    monkeypatch.setattr(pem, "open", refusing, raising=False)
    errors = found({"TLS_DIR": str(tmp_path)}).errors
    assert errors == [f"{tmp_path}/site/privkey.pem cannot be used: Permission denied"]


def test_a_directory_that_may_not_be_read_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "dead").symlink_to("nothing")
    scandir = os.scandir

    def refusing(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(check.os, "scandir", refusing)
    assert check.closed(str(tmp_path)) == [(f"{tmp_path}/closed", "Permission denied")]


# -- warnings -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"METADATA_BIND": "[::]"}, "METADATA_BIND=[::]: port 5553 lists everybody's tunnels"),
        ({"METADATA_BIND": "8.8.8.8"}, "METADATA_BIND=8.8.8.8: port 5553 lists everybody's tunnels"),
        ({"BASE_DOMAIN": "", "BIND": "0.0.0.0"}, "BASE_DOMAIN=local.tinytun.com is the default"),
        (
            {"TCP_PORTS": "5000-6000", "METADATA_PORT": "1"},
            "TCP_PORTS=5000-6000: 5554 among them is CONNECTION",
        ),
        ({"PEERS": "nobody.invalid"}, "PEERS: nobody.invalid does not resolve: "),
        ({"PROXY_PORT": "tcp://10.0.0.1:80"}, "PROXY_PORT=tcp://10.0.0.1:80 is ignored: Kubernetes"),
        ({"ACCESS_LOG": "/nowhere/access.log"}, "ACCESS_LOG=/nowhere/access.log: there is no such directory"),
        ({"STATE_DIR": "/dev/null/state"}, "STATE_DIR=/dev/null/state: /dev/null is not a directory"),
    ],
)
def test_what_would_surprise_is_a_warning(environ: dict[str, str], says: str) -> None:
    findings = found(environ)
    assert any(line.startswith(says) for line in findings.warnings), findings
    assert findings.errors == []


def test_what_surprises_nobody_is_none(tmp_path: Path) -> None:
    state = {"STATE_DIR": str(tmp_path / "new" / "state"), "ACCESS_LOG": str(tmp_path / "access.log")}
    assert found({"METADATA_BIND": "10.0.0.1", "TCP_LISTEN": "off", **state}).warnings == []
    assert not (tmp_path / "new").exists()


def test_http_urls_beside_certificates(tmp_path: Path) -> None:
    install(tmp_path, issue("*.a.test"))
    urls = {"TLS_DIR": str(tmp_path), "PUBLIC_URL": "http://{name}.{domain}"}
    (line,) = found(urls).warnings
    assert line.startswith("PUBLIC_URL=http://{name}.{domain} shows http addresses")


def test_tokens_without_tls_and_without_tokens(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text("# none\n")
    open_ = {"AUTH_FILE": str(file), "BIND": "0.0.0.0"}
    first, second = found(open_).warnings
    assert first.startswith(f"AUTH_FILE={file} is empty: nobody gets a tunnel; 'tinytun-server token new")
    assert second.startswith("CONNECTION_PORT=5554: clients show their tokens unencrypted")
    assert len(found({**open_, "TRUSTED_PROXIES": "10.0.0.1"}).warnings) == 1


def test_a_directory_that_is_another_users_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "everybody may write" in check.unwritable(str(tmp_path), its_own=True)
    assert check.unwritable(str(tmp_path)) == ""


# -- the command ----------------------------------------------------------------


def test_warnings_are_counted_and_strict_makes_them_errors(tmp_path: Path) -> None:
    variables = {"METADATA_BIND": "0.0.0.0", "STATE_DIR": str(tmp_path / "state")}
    done = run(**variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("the configuration is valid, its ports are free; 1 warning\n")
    done = run("--strict", **variables)
    assert (done.returncode, done.stderr) == (2, "tinytun-server: not as it should be: 1 warning; --strict\n")
    assert "warning: METADATA_BIND" in done.stdout
    assert run("--strict", STATE_DIR=variables["STATE_DIR"]).returncode == 0


def test_strict_alone_is_refused() -> None:
    done = subprocess.run(
        [*COMMAND, "--strict"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "tinytun-server: --strict goes with --check\n")


def test_a_server_that_runs_is_recognized_as_itself() -> None:
    with ServerProcess() as server:
        server.wait_serving()
        ports = {"CONNECTION_PORT": str(server.connection_port), "PROXY_PORT": str(server.proxy_port)}
        done = run(STATE_DIR=str(server.state), **ports)
        assert (done.returncode, done.stderr) == (0, "")
        said = f"this server runs (process {server.process.pid}): 2 of its ports are its own"
        assert said in done.stdout
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
            port = other.getsockname()[1]
            done = run(STATE_DIR=str(server.state), TCP_PROXY_PORT=str(port), **ports)
            assert (done.returncode, "in use by another program" in done.stderr) == (2, True)
        server.process.kill()
        server.wait()
        assert "its ports are free" in run(STATE_DIR=str(server.state), **ports).stdout


def test_a_file_is_checked_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("proxy_prot = 80\n")
    done = run("--config", str(file))
    said = f"tinytun-server: {file}: proxy_prot: there is no such key; did you mean proxy_port?\n"
    assert (done.returncode, done.stderr) == (2, said)
    file.write_text("head_timeout = 80\n")
    assert "head_timeout of the file does not count" in run("--config", str(file)).stdout


def test_the_ports_of_another_program_are_not_the_servers() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        config = ServerConfig(
            bind="127.0.0.1",
            connection_port=taken.getsockname()[1],
            proxy_port=0,
            tcp_proxy_port=0,
            metadata_port=0,
        )
        with pytest.raises(UsageError, match="in use by another program"):
            check.check_ports(config, None)
