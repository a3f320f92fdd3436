"""The two commands. Their docopt texts below are their specification: what is not in them does not exist.

``--version`` and ``--help`` are answered before docopt or gevent are imported, the client
patches before it imports anything of ours, and the server's command imports no gevent at all:
gunicorn's master must not.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__

if TYPE_CHECKING:
    from .command_line import Grammar

CLIENT = """\
Put a local web server or TCP service on the internet.

Usage:
  tinytun http <target> [-s NAME] [-c N] [--sessions N] [--host-header VALUE] [--forwarded-host SWITCH]
                        [--rewrite-links SWITCH] [options]
  tinytun tcp <target> [-p PORT] [-c N] [--sessions N] [options]
  tinytun demo [--target TARGET] [options]
  tinytun login [options]
  tinytun logout [--all] [options]
  tinytun server [<url>] [options]
  tinytun doctor [<target>] [-s NAME] [-p PORT] [--json] [options]
  tinytun help [<command>]
  tinytun (-h | --help | -V | --version)

What to open:
  <target>  PORT, HOST:PORT, [IPV6]:PORT, unix:/PATH, http://HOST[:PORT] or https://HOST[:PORT]
  http      a web server; the URL is the only thing on standard output
  tcp       anything else that speaks TCP
  demo      a server, a small page and a tunnel to it, all on this computer

Who you are, to a server that asks:
  login     enter the token for a server (--server); both are kept for the commands to come
  logout    forget them
  server    show which server is used and why, or make <url> the one of the commands to come

When something does not work:
  doctor    check, one after the other, all that a tunnel needs, and say what to do

What else there is to know:
  help      all of this, or what concerns one command

Options:
  -s NAME, --subdomain NAME  Subdomain to use (HTTP tunnels); a random one if absent
  -p PORT, --port PORT       Remote port to use (TCP tunnels), one that the server gives; any if
                             absent
  -c N, --concurrency N      Max concurrent connections [default: 100]
  --sessions N               Max TCP connections to the server, 1-16; more than one only while a
                             long path would limit one [default: 4]
  --host-header VALUE        What the local service sees as Host, and as Origin of its own pages: a name,
                             or "rewrite" for its own
  --forwarded-host SWITCH    Whether the local service is told its public address, by X-Forwarded-Host,
                             X-Forwarded-Proto and X-Forwarded-Port: on or off [default: on]
  --rewrite-links SWITCH     Whether redirects and cookie domains that name the local service become
                             public: on or off; on with --host-header if absent
  --server URL               Server to use: https://HOST[:PORT], http://HOST[:PORT] (not encrypted)
                             or HOST[:PORT] (https, port 5554); if absent that of the last login, or
                             the original's; default: https://tinytun.com:5554
  --ca FILE                  Trust the certificates in this PEM file instead of the system's; login
                             remembers it for its server
  --insecure                 Do not check the server's certificate, and send a token over http:// as well
  --token TOKEN              Token for the server; --token-file, TINYTUN_TOKEN and login hide it better
  --token-file FILE          File whose only line is the token
  --proxy URL                HTTP proxy to reach the server through: http://[USER:PASSWORD@]HOST[:PORT]
  --connect-timeout SECONDS  Give up after so long without a connection; if absent only at the first start,
                             when the server cannot be reached for 30 seconds
  --wait                     Wait for a server that cannot be reached from the start, too: for services
  --verify-target WHEN       Check the certificate of an https target: always, never, or auto: not
                             if it is on this computer [default: auto]
  --target TARGET            Local service for the demo, instead of its own page
  --all                      Forget the tokens of all servers
  --json                     What "doctor" finds as JSON
  -q, --quiet                Only warnings and errors on standard error
  --log-level LEVEL          debug (every request), info, warning or error [default: info]
  --debug                    Log everything, and show the stack of an error
  -h, --help                 Print help
  -V, --version              Print version

Environment:
  TINYTUN_SERVER_URL         As --server, which wins; it wins over that of the last login
  TINYTUN_TOKEN              As --token and --token-file, which win
  TINYTUN_STATE_DIR          Where it is kept that a name is yours, instead of the system's usual place
  SSL_CERT_FILE              PEM file that stands for the system's certificates; --ca wins
  HTTPS_PROXY                As --proxy, which wins
  NO_PROXY                   Servers that are reached without HTTPS_PROXY: names, addresses, CIDRs or *

Exit codes: 0 stopped by a signal, 1 internal error, 2 usage or configuration, 3 refused by the
server, 4 name or port taken, 5 server unreachable, 130 stopped by a second signal.
"""

SERVER = """\
The server of tinytun: gives tunnel clients a public URL or port.

Usage:
  tinytun-server [options]
  tinytun-server status [--url URL] [--json] [options]
  tinytun-server doctor [--json] [options]
  tinytun-server token new --label NAME [--names LIST] [--ports LIST] [--reserve LIST]
                           [--reserve-ports LIST] [--expires WHEN] [options]
  tinytun-server token list [options]
  tinytun-server token revoke <token> [options]
  tinytun-server reload [options]
  tinytun-server help [<command>]
  tinytun-server (-h | --help | -V | --version)

Every option is also an environment variable of the same name, such as PROXY_PORT for --proxy-port, or
TINYTUN_SERVER_PROXY_PORT where the short name is taken, and a key of the file that --config names, such as
proxy_port. The option wins over the variable, that over the file. "status" shows what a running server does;
it asks the metadata API. "doctor", run beside it with the same options, checks what it needs to be reached
and says what to do. "token" makes, lists and revokes the tokens in AUTH_FILE, of which only the hashes are
kept; <token> is its label, or how its hash begins. "reload" has a running server, which it finds by
STATE_DIR, read its file again and start a new worker, and says how that went.

Options:
  --config FILE                   TOML file with the variables in lower case, such as proxy_port = 80
  --url URL                       where "status" asks, instead of METADATA_BIND and METADATA_PORT
  --json                          "status" or "doctor" as JSON
  --label NAME                    whose token it is: 1-64 letters, digits and . _ @ + -
  --names LIST                    subdomains that the token may take, * for any characters; any if absent
  --ports LIST                    ports that the token may take, such as 20000-20099; any if absent
  --reserve LIST                  subdomains that the token may take, and nobody else
  --reserve-ports LIST            ports that the token may take, and nobody else
  --expires WHEN                  last day on which the token is valid, 2027-01-31, or a time with its zone
  --connection-port PORT          port that tunnel clients connect to (default: 5554)
  --proxy-port PORT               port that visitors reach HTTP tunnels on (default: 5555)
  --tcp-proxy-port PORT           port for TCP behind a PROXY protocol load balancer (default: 5556)
  --metadata-port PORT            port of the internal metadata API (default: 5553)
  --proxy-tls-port PORT           port that visitors reach HTTP tunnels on by https, where TLS_DIR is set
                                  (default: 5557)
  --bind ADDRESS                  address of the public ports ([::]: all, IPv4 and IPv6; 0.0.0.0 where
                                  there is no IPv6) (default: [::])
  --metadata-bind ADDRESS         address of the metadata port, which lists everybody's tunnels (default:
                                  127.0.0.1)
  --base-domain DOMAINS           domains whose subdomains are tunnels, comma-separated; new tunnels are
                                  shown under the first (default: local.tinytun.com)
  --public-url TEMPLATE           how a tunnel's URL is shown: {name}, {domain} and {port} are filled in;
                                  blank: http://{name}.{domain}:{port}, or https where TLS_DIR is set (none
                                  by default)
  --tls-dir DIR                   directory with certificates and their keys, in PEM files however deep;
                                  blank: no TLS (none by default)
  --connection-tls USE            TLS on CONNECTION_PORT where TLS_DIR is set: accepted, beside plain
                                  clients, or required (default: accepted)
  --http-redirect SWITCH          whether PROXY_PORT answers with a redirect to https, except for ACME
                                  challenges (default: off)
  --tcp-ports RANGE               ports that TCP tunnels get (default: 20000-60000)
  --tcp-listen SWITCH             whether tunnels of type tcp listen on their port; off: only
                                  TCP_PROXY_PORT leads to them (default: on)
  --trusted-proxies LIST          addresses and CIDRs whose PROXY headers and forwarding fields are
                                  believed, comma-separated (none by default)
  --trusted-fields LIST           fields about the visitor that those addresses, and PEERS, may set for
                                  services, such as X-Auth-Request-*, comma-separated (none by default)
  --auth-file FILE                file with the tokens of those who may open tunnels; without it, everybody
                                  may (none by default)
  --reserved-names LIST           subdomains that nobody gets, comma-separated; * stands for any characters
                                  (none by default)
  --peers LIST                    the other nodes: a DNS name or a list of
                                  host[:metadata_port[:proxy_port[:tcp_proxy_port]]] (none by default)
  --metadata-hosts LIST           further names that the metadata API answers to (none by default)
  --log-level LEVEL               off, error, warn, info, debug or trace; RUST_LOG is understood as well
                                  (default: info)
  --log-format FORMAT             text, or json: an object a line, with its fields as keys (default: text)
  --access-log FILE               file for a line about each HTTP exchange, in the combined format; -:
                                  standard output (none by default)
  --head-bytes N                  longest request head, in bytes (431 beyond it) (default: 32768)
  --head-field-bytes N            longest field of a request head, in bytes (431 beyond it) (default: 16384)
  --head-fields N                 most fields in a request head (default: 100)
  --head-timeout SECONDS          seconds for a whole request head (408 after it) (default: 10)
  --min-body-rate N               bytes a second of a request's body: after 20 s below it, it gives way to a
                                  visitor that waits (408, as after a pause of 60 s in any case); and of an
                                  answer that is to be taken (cut off after 300 s); 0: no limit (default: 240)
  --answer-head-bytes N           longest response head, in bytes (502 beyond it) (default: 65536)
  --answer-head-fields N          most fields in a response head (default: 200)
  --interim-answers N             most 1xx responses to one request (default: 64)
  --answer-timeout SECONDS        seconds for the local service to begin its response (504 after it)
                                  (default: 300)
  --stream-timeout SECONDS        seconds for the tunnel client to accept a visitor (504 after it)
                                  (default: 10)
  --handshake-timeout SECONDS     seconds for a client's CONNECT, and again for its first HTTP/2 frames
                                  (default: 5)
  --proxy-header-timeout SECONDS  seconds for a PROXY protocol header (default: 3)
  --queue-timeout SECONDS         seconds a visitor waits at a tunnel's concurrency limit (503 after it)
                                  (default: 5)
  --state-dir DIR                 the server's own directory, for names that outlive a restart; blank: the
                                  system's usual place (none by default)
  --lease-seconds SECONDS         seconds a lost tunnel's name is kept for its owner (default: 30)
  --park-seconds SECONDS          seconds a visitor waits for a client that was lost (503 after it)
                                  (default: 10)
  --park-visitors N               most visitors that wait so at once, for each tunnel (503 beyond it)
                                  (default: 256)
  --idle-timeout SECONDS          seconds an HTTP connection may be idle between requests (default: 75)
  --tunnel-idle-timeout SECONDS   the same for upgraded and TCP connections; 0: no limit (default: 0)
  --max-connections N             most connections at once on each port (default: 65536)
  --max-tunnels N                 most tunnels at once (503 beyond it) (default: 10000)
  --source-tunnels N              most tunnels at once of clients with one address, on a server without
                                  AUTH_FILE (429 beyond it); 0: no limit (default: 50)
  --token-tunnels N               most tunnels at once of one token (429 beyond it); 0: no limit (default:
                                  100)
  --token-visitors N              most visitors at once of all tunnels of a token (503 beyond it); 0: no
                                  limit (default: 32768)
  --token-requests N              HTTP requests a second to all tunnels of a token (429 beyond them); 0: no
                                  limit (default: 0)
  --token-rate N                  bytes a second, both ways together, through all tunnels of a token; 0: no
                                  limit (default: 0)
  --tunnel-visitors N             most visitors at once of each tunnel (503 beyond it); 0: no limit
                                  (default: 16384)
  --tunnel-requests N             HTTP requests a second to each tunnel (429 beyond them); 0: no limit
                                  (default: 0)
  --tunnel-rate N                 bytes a second, both ways together, through each tunnel; 0: no limit
                                  (default: 0)
  --connect-rate N                connects a second of visitors with one address (429 beyond them); 0: no
                                  limit (default: 0)
  --connect-burst N               connects of one address that may come at once (default: 100)
  --backlog N                     connections that the system queues on each port (default: 2048)
  --drain-timeout SECONDS         seconds that running exchanges get to finish when the server stops
                                  (default: 25)
  --reload-timeout SECONDS        the same in the old process after a reload, while the new one serves
                                  (default: 60)
  --check                         Check the configuration, its certificates and that its ports are free,
                                  then exit
  --strict                        With --check: a warning is an error
  --debug                         Show the stack of an error
  -h, --help                      Print help
  -V, --version                   Print version

Exit codes: 0 stopped by a signal, 1 internal error, 2 configuration, a port that is in use, or
what "doctor" found, 5 "status" or "reload" reached no server.
"""


_OWN_SERVER = "the demo has a server of its own"
_ASKS = "it asks for the token, or reads it from standard input"
_ATTEMPTS = ("--connect-timeout", "--wait")
_NO_TUNNEL = (*_ATTEMPTS, "--verify-target")
_NO_CONNECTION = (*_NO_TUNNEL, "--token", "--token-file", "--insecure", "--proxy")

WITHOUT: dict[str, dict[str, dict[str, str]]] = {
    "tinytun": {
        "demo": {
            **dict.fromkeys(("--server", "--ca", "--insecure", "--proxy", *_ATTEMPTS), _OWN_SERVER),
            **dict.fromkeys(("--token", "--token-file"), _OWN_SERVER),
            "--verify-target": "",
        },
        "login": {
            **dict.fromkeys(("--token", "--token-file"), _ASKS),
            **dict.fromkeys(_NO_TUNNEL, ""),
        },
        "logout": dict.fromkeys((*_NO_CONNECTION, "--ca"), ""),
        "server": dict.fromkeys(_NO_CONNECTION, ""),
    },
    "tinytun-server": {
        name: {"--check": "", "--strict": ""}
        for name in ("status", "doctor", "reload", "token new", "token list", "token revoke")
    },
}
"""Options for all commands that mean nothing to some, and why, where that is not plain."""

BLANK = {"tinytun": frozenset({"--proxy"})}
"""Options whose value may be empty. An empty variable of the server's has a meaning of its own."""

NOT_VARIABLES = {
    "--url",
    "--label",
    "--names",
    "--ports",
    "--reserve",
    "--reserve-ports",
    "--expires",
}
"""Options of the server's command that are no variable's: those of "status" and "token"."""


def client() -> NoReturn:
    """The command ``tinytun``."""
    argv = sys.argv[1:]
    _answer_at_once("tinytun", CLIENT, argv)
    from gevent import monkey

    monkey.patch_all()
    arguments = parse("tinytun", CLIENT, argv)

    def run() -> int:
        from .client import command

        return command.run(arguments)

    sys.exit(_guarded("tinytun", run, arguments["--debug"]))


def server() -> NoReturn:
    """The command ``tinytun-server``."""
    argv = sys.argv[1:]
    _answer_at_once("tinytun-server", SERVER, argv)
    arguments = parse("tinytun-server", SERVER, argv)

    def run() -> int:
        if arguments["status"]:
            from .server import config, status

            asked = config.ServerConfig.from_environ(os.environ, server_overrides(arguments))
            return status.run(asked, arguments["--url"], arguments["--json"])
        if arguments["doctor"]:
            from .server import doctor

            return doctor.run(server_overrides(arguments), arguments["--json"])
        if arguments["token"]:
            from .server import config, tokens

            return tokens.run(
                config.ServerConfig.from_environ(os.environ, server_overrides(arguments)), arguments
            )
        if arguments["reload"]:
            from .server import reload

            return reload.run(server_overrides(arguments))
        if arguments["--strict"] and not arguments["--check"]:
            from .errors import UsageError

            raise UsageError("--strict goes with --check")
        if arguments["--check"]:
            from .server import check

            return check.run(server_overrides(arguments), arguments["--strict"])
        from .server.launch import main

        return main(server_overrides(arguments))

    sys.exit(_guarded("tinytun-server", run, arguments["--debug"]))


def parse(program: str, doc: str, argv: Sequence[str]) -> dict[str, Any]:
    """What docopt reads from ``argv``; exits with 2, saying what is wrong, if it fits no usage."""
    from docopt import DocoptExit, docopt

    from .command_line import CommandLineError

    usage = None
    try:
        checked = _grammar(program, doc).check(argv, BLANK.get(program))
        return dict(docopt(doc, checked, default_help=False))
    except CommandLineError as error:
        problem, usage = str(error), error.usage
    except DocoptExit:
        problem = "these words fit no usage"
    _complain(program, f"{problem}\n" + (f"usage: {usage}\n" if usage else "") + _more(program, usage))
    sys.exit(2)


def _grammar(program: str, doc: str) -> Grammar:
    from .command_line import Grammar

    return Grammar(program, doc, WITHOUT[program])


def _more(program: str, usage: str | None) -> str:
    """Where to read on: the help of the command that ``usage`` is of, if there is one."""
    command = re.match(r"\S+ ([a-z]+)", usage or "")
    return f"'{program} {f'{command[1]} ' if command else ''}--help' tells more"


def server_overrides(arguments: dict[str, Any]) -> dict[str, str]:
    """The options with a value that were given, by flag: what wins over the environment."""
    return {
        flag: value
        for flag, value in arguments.items()
        if flag.startswith("--") and isinstance(value, str) and flag not in NOT_VARIABLES
    }


def _answer_at_once(program: str, doc: str, argv: Sequence[str]) -> None:
    """Version and help need neither docopt nor gevent: print and exit."""
    if argv[:1] == ["help"]:
        from .command_line import CommandLineError

        try:
            _print(_grammar(program, doc).help_on(argv[1:]))
        except CommandLineError as error:
            _complain(program, f"{error}\n{_more(program, None)}")
            sys.exit(2)
        sys.exit(0)
    for word in argv:
        if word in ("-h", "--help"):
            _print(doc if argv[0].startswith("-") else _grammar(program, doc).help(argv))
            sys.exit(0)
        if word in ("-V", "--version"):
            _print(f"{program} {__version__}\n")
            sys.exit(0)
        if word == "--":
            return


def _guarded(program: str, run: Callable[[], int], debug: bool) -> int:
    """The exit code of ``run``; an error becomes one line on standard error."""
    from .errors import TunnelError

    try:
        return run()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        if isinstance(error, TunnelError):
            _complain(program, str(error))
            return error.exit_code
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        _complain(program, f"internal error: {what}" + ("" if debug else " (--debug shows where)"))
        return 1


def _complain(program: str, text: str) -> None:
    try:
        print(f"{program}: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass  # nobody reads standard error any more


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        pass
