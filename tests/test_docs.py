"""The documents say what the program does: options, variables, exit codes, modules, examples."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tinytun_gevent import __version__, cli, errors
from tinytun_gevent.client import command, credentials, state
from tinytun_gevent.client import config as client_config
from tinytun_gevent.server import config as server_config
from tinytun_gevent.server.metrics import METRICS
from tinytun_gevent.wire.options import Options, Rewrite

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinytun_gevent"
README = (ROOT / "README.md").read_text("utf-8")
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")
FRAMEWORKS = (ROOT / "docs" / "frameworks.md").read_text("utf-8")
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

DEFAULT = re.compile(r" \[default: (.*)\]$| \(default: (.*)\)$|; default: (\S+)$")


def tables(text: str, *header: str) -> Iterator[list[tuple[str, ...]]]:
    """The rows of every Markdown table in ``text`` whose header is ``header``, backquotes removed."""
    top = "\n| " + " | ".join(header) + " |\n"
    for part in text.split(top)[1:]:
        lines = part.split("\n\n")[0].splitlines()
        assert re.fullmatch(r"(\|-+)+\|", lines[0])
        yield [tuple(cell.strip().strip("`") for cell in line.split("|")[1:-1]) for line in lines[1:] if line]


def rows(text: str, *header: str) -> list[tuple[str, ...]]:
    return [row for table in tables(text, *header) for row in table]


def docopt_options(doc: str) -> list[tuple[str, str, str]]:
    """``(flags, default, meaning)`` of every option that a docopt text describes."""
    options: list[tuple[str, str]] = []
    for line in doc.partition("\nOptions:\n")[2].partition("\n\n")[0].splitlines():
        match = re.match(r"  (-\S(?:.*?\S)?)  +(\S.*)$", line)
        if match:
            options.append((match[1], match[2]))
        else:
            flags, meaning = options.pop()
            options.append((flags, f"{meaning} {line.strip()}"))
    described = []
    for flags, meaning in options:
        default = DEFAULT.search(meaning)
        value = "" if default is None else next(group for group in default.groups() if group is not None)
        described.append((flags, value, DEFAULT.sub("", meaning)))
    return described


# -- options and variables ---------------------------------------------------


def test_the_client_table_is_the_docopt_text() -> None:
    assert rows(README, "Option", "Default", "Meaning") == docopt_options(cli.CLIENT)


def test_the_client_defaults_are_those_of_the_config() -> None:
    defaults = {flags.split()[-2]: value for flags, value, _ in docopt_options(cli.CLIENT) if value}
    signature = inspect.signature(client_config.make_config)
    assert defaults.pop("--log-level") in client_config.LOG_LEVELS
    assert defaults.pop("--server") == client_config.DEFAULT_SERVER
    assert defaults.pop("--concurrency") == str(client_config.DEFAULT_CONCURRENCY)
    assert defaults.pop("--sessions") == str(client_config.DEFAULT_SESSIONS)
    assert defaults.pop("--verify-target") == signature.parameters["verify_target"].default
    assert defaults.pop("--forwarded-host") == signature.parameters["forwarded_host"].default
    assert not defaults


def test_each_client_option_is_a_parameter_of_the_config_or_of_the_command() -> None:
    flags = {re.findall(r"--[\w-]+", text)[0] for text, _, _ in docopt_options(cli.CLIENT)}
    of_the_command = {"--all", "--json", "--target", "--quiet", "--log-level", "--debug"}
    of_the_command |= {"--help", "--version"}
    names = set(inspect.signature(client_config.make_config).parameters) - {"target", "kind", "environ"}
    assert flags - of_the_command == {"--" + name.replace("_", "-") for name in names}


def test_the_client_variables_are_in_the_readme() -> None:
    section = cli.CLIENT.partition("\nEnvironment:\n")[2].partition("\n\n")[0]
    variables = re.findall(r"(?m)^  ([A-Z_]+)  ", section)
    assert variables == [
        client_config.SERVER_VARIABLE,
        credentials.TOKEN_VARIABLE,
        state.DIRECTORY_VARIABLE,
        "SSL_CERT_FILE",
        "HTTPS_PROXY",
        "NO_PROXY",
    ]
    for name in variables:
        assert f"`{name}`" in README


def test_the_server_tables_are_the_config() -> None:
    table = rows(README, "Variable", "Option", "Default", "Meaning")
    assert table == [(v.name, v.flag, v.default, v.help) for v in server_config.variables()]


def test_the_server_docopt_text_is_the_config() -> None:
    described = docopt_options(cli.SERVER)
    of_the_command = {"--json", "--check", "--strict", "--debug", "-h,", "-V,", *cli.NOT_VARIABLES}
    of_the_command.add("--config")
    own = [option for option in described if option[0].split()[0] not in of_the_command]
    variables = server_config.variables()
    assert [flags.split()[0] for flags, _, _ in own] == [variable.flag for variable in variables]
    for (_, default, meaning), variable in zip(own, variables, strict=True):
        assert default == variable.default
        none = " (none by default)" if not variable.default else ""
        assert meaning.removesuffix(none) == variable.help, variable.name


def test_the_exit_codes_are_those_of_the_help_and_of_the_errors() -> None:
    table = rows(README, "Exit code", "Meaning")
    text = " ".join(cli.CLIENT.partition("\nExit codes: ")[2].split()).rstrip(".")
    assert ", ".join(f"{code} {meaning}" for code, meaning in table) == text
    classes = [errors.TunnelError]
    for error in classes:
        classes += error.__subclasses__()
    codes = {0, command.INTERRUPTED} | {error.exit_code for error in classes}
    assert {int(code) for code, _ in table} == codes
    by_meaning = {meaning: int(code) for code, meaning in table}
    assert by_meaning["usage or configuration"] == errors.UsageError.exit_code
    assert by_meaning["refused by the server"] == errors.RefusedError.exit_code
    assert by_meaning["name or port taken"] == errors.NameTakenError.exit_code
    assert by_meaning["server unreachable"] == errors.UnreachableError.exit_code


# -- the README's commands and example ---------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/tinytun demo",
        "python3 -m venv .venv && .venv/bin/pip install '.[test]' && .venv/bin/pytest",
    ],
)
def test_the_two_commands_are_in_the_readme(line: str) -> None:
    assert f"\n```sh\n{line}\n```\n" in README


def shell_lines() -> Iterator[list[str]]:
    """The words of every shell line in the README that starts one of our programs by itself."""
    for block in re.findall(r"(?s)```sh\n(.*?)```", README):
        for line in block.splitlines():
            words = shlex.split(line)
            program = next((word for word in words if not re.match(r"[A-Z_]+=", word)), "")
            if program in ("tinytun", "tinytun-server") and "|" not in words:
                yield words


def test_every_command_in_the_readme_is_understood() -> None:
    """Arguments fit the docopt text, they and the variables before them the configuration."""
    lines = list(shell_lines())
    assert len(lines) >= 8
    for words in lines:
        start = next(i for i, word in enumerate(words) if word in ("tinytun", "tinytun-server"))
        environ = dict(word.split("=", 1) for word in words[:start])
        if words[start] == "tinytun":
            arguments = cli.parse("tinytun", cli.CLIENT, words[start + 1 :])
            if arguments["http"] or arguments["tcp"]:
                client_config.config_from_arguments(arguments, environ)
        else:
            arguments = cli.parse("tinytun-server", cli.SERVER, words[start + 1 :])
            if not arguments["token"]:
                overrides = cli.server_overrides(arguments)
                overrides.pop("--config", None)  # is not on this machine
                server_config.ServerConfig.from_environ(environ, overrides)


def test_what_to_say_for_a_framework_is_understood() -> None:
    table = rows(FRAMEWORKS, "Framework", "Say", "Or tell the framework", "Tried with")
    assert len(table) == 8
    for _, said, _, tried in table:
        assert tried
        program, *words = shlex.split(said)
        assert program == "tinytun"
        client_config.config_from_arguments(cli.parse("tinytun", cli.CLIENT, words), {})


def test_every_option_of_a_connect_is_in_the_protocol() -> None:
    described = [name for name, _ in rows(PROTOCOL, "option", "meaning")]
    known = [
        f"{name}.{inner}" if name == "rewrite" else name
        for name in Options.__struct_fields__
        for inner in (Rewrite.__struct_fields__ if name == "rewrite" else ("",))
    ]
    assert described == known


def test_the_library_example_runs(tmp_path: Path) -> None:
    examples = re.findall(r"(?s)```python\n(.*?)```", README)
    assert len(examples) == 1
    script = tmp_path / "example.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{examples[0]}", "utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    url, status = done.stdout.split()
    assert re.fullmatch(r"http://app\.localhost:\d+", url)
    assert status == "200"


# -- links -------------------------------------------------------------------


def test_relative_links_lead_somewhere() -> None:
    links = 0
    for document in DOCUMENTS:
        text = re.sub(r"(?s)```.*?```", "", document.read_text("utf-8"))
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if "://" in link:
                continue
            links += 1
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {link}"
            if anchor:
                titles = re.findall(r"(?m)^#+ (.+)$", target.read_text("utf-8"))
                assert anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
    assert links >= 6


# -- the changelog -----------------------------------------------------------


def test_the_changelog_is_kept_as_it_says() -> None:
    assert CHANGELOG.startswith("# Changelog\n")
    versions = re.findall(r"(?m)^## (.+)$", CHANGELOG)
    assert versions[0] == "[Unreleased]"
    for version in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version), version
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.+)$", CHANGELOG)) <= kinds
    unreleased = CHANGELOG.partition("## [Unreleased]\n")[2].partition("\n## ")[0]
    assert f"## [{__version__}]" in CHANGELOG or "\n- " in unreleased


# -- the architecture --------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of the package by its path, without the subpackages' docstrings."""
    found = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    for name, path in list(found.items()):
        if name.endswith("/__init__.py"):
            assert len(ast.parse(path.read_text("utf-8")).body) == 1, f"{name} is more than its docstring"
            del found[name]
    return found


def layers() -> list[list[str]]:
    """The modules in the tables of ARCHITECTURE.md, one list a table, in its order."""
    part = ARCHITECTURE.partition("## Modules")[2].partition("\n## ")[0]
    tables_in_it = [table for table in part.split("\n\n") if table.startswith("| ")]
    return [re.findall(r"(?m)^\| `([\w/]+\.py)` \| \S", table) for table in tables_in_it]


def test_every_module_is_in_the_architecture_once() -> None:
    listed = [module for layer in layers() for module in layer]
    assert sorted(listed) == sorted(modules())


def test_the_ways_described_lead_through_modules_that_exist() -> None:
    present = modules()
    for document in (ARCHITECTURE, (ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        for name in re.findall(r"`([\w/]+\.py)`", document):
            assert name in present, name


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules of the package that running ``path`` imports, inside functions too; not those for types."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    waiting: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    here = ["tinytun_gevent", *path.relative_to(PACKAGE).with_suffix("").parts]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*here[: -node.level], node.module] if node.level else [node.module]
            prefix = ".".join(filter(None, base))
            names = [f"{prefix}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^(tinytun_gevent(?:\.\w+)+)$", node.value)  # import_module("…")
        for name in names:
            if name.split(".")[0] == "tinytun_gevent":
                yield module_of(name)


def module_of(name: str) -> str:
    """The file that ``import name`` or ``from … import …`` reaches: a module, or what defines the name."""
    parts = name.split(".")[1:]
    for path in ("/".join(parts) + ".py", "/".join(parts[:-1]) + ".py"):
        if (PACKAGE / path).is_file():
            return path
    return "__init__.py"


def test_imports_point_down_only() -> None:
    rank = {module: number for number, layer in enumerate(layers()) for module in layer}
    for name, path in modules().items():
        for other in imported(path):
            assert rank[other] <= rank[name], f"{name} imports {other}"
            apart = {name.split("/")[0], other.split("/")[0]} == {"server", "client"}
            assert not apart or name == "client/demo.py", f"{name} imports {other}"


def test_imports_have_no_cycles() -> None:
    graph = {name: imported(path) - {name} for name, path in modules().items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_bytes_in_values_out_needs_neither_sockets_nor_gevent() -> None:
    for path in (PACKAGE / "wire").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not {name.split(".")[0] for name in names} & {"gevent", "socket", "ssl", "select"}, path.name


# -- dependencies ------------------------------------------------------------


def declared() -> dict[str, list[str]]:
    """What setup.py says is needed, and for tests."""
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            found["needed"] = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEST":
            found["test"] = ast.literal_eval(node.value)
    return {kind: [re.split(r"[\[<>=!; ]", text)[0] for text in texts] for kind, texts in found.items()}


def test_every_dependency_has_its_reason() -> None:
    packages = declared()
    explained = [package for package, _ in rows(ARCHITECTURE, "Package", "Reason")]
    assert sorted(explained) == sorted(packages["needed"])
    for_tests = ARCHITECTURE.partition("\nFor tests: ")[2]
    for package in packages["test"]:
        assert package in for_tests, package


def test_every_foreign_import_is_declared() -> None:
    modules_of = {"docopt-ng": "docopt", "prometheus-client": "prometheus_client"}
    allowed = {modules_of.get(package, package) for package in declared()["needed"]}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {other.split(".")[0] for other in names} - {"tinytun_gevent", "_typeshed"}:
                assert top in sys.stdlib_module_names or top in allowed, f"{name} imports {top}"


# -- what the operator sees ----------------------------------------------------


def test_the_metrics_table_is_the_code() -> None:
    table = rows(README, "Metric", "Labels", "Meaning")
    assert [(name, meaning) for name, _, meaning in table] == list(METRICS.items())
    names = {name: re.findall(r"(?:^|; )(\w+)", labels) for name, labels, _ in table if labels}
    assert names["tinytun_goaways_total"] == ["direction", "reason"]
    assert set(names) >= {"tinytun_tunnels", "tinytun_refusals_total", "tinytun_exchanges_total"}


def test_the_paths_are_those_that_are_answered() -> None:
    paths = [path for path, _ in rows(README, "Path", "What it answers")]
    source = (PACKAGE / "server" / "metadata.py").read_text("utf-8")
    answered = set(re.findall(r'path == "(/\w+)"', source)) | {"/tunnels/<name>"}
    assert set(paths) == answered
