"""The rules of docs/architecture.md as functions over syntax trees: who may import whom, where each resource lives.

Each takes a file's path from the root and its tree, and returns a line for each violation.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROCESS_FILES = ("wsgi.py", "gunicorn.conf.py")
MAX_LINES = 320

# A file imports only from lower floors. A new module or folder must be given one here.
FLOORS = {
    **dict.fromkeys(["settings", "setting_checks", "credential_names", "environ", "postgres_url"], 1),
    **dict.fromkeys(["addresses", "dialing", "errors", "redaction", "telemetry"], 1),
    **dict.fromkeys(
        ["runs", "jobs", "schedule", "intake", "subagents", "subagent_checks", "subagent_files", "material"], 1
    ),
    **dict.fromkeys(["store", "claude", "poke", "liveness"], 2),
    **dict.fromkeys(["asking", "drafting", "certainty", "from_memory", "delivery", "sweeping", "keeping"], 3),
    **dict.fromkeys(["routing", "building"], 4),
    **dict.fromkeys(["running", "evaluation"], 5),
    **dict.fromkeys(["service", "dispatcher", "parts"], 6),
    **dict.fromkeys(["bootstrap", "following"], 7),
    **dict.fromkeys(["web", "demo", "terminal", "tables", "editing"], 8),
    **dict.fromkeys(["cli_credentials", "cli_subagents", "cli_feedback", "cli_route"], 9),
    **dict.fromkeys(["cli", "__main__"], 10),
    **dict.fromkeys(PROCESS_FILES, 11),
    "__init__": 0,
}
VALUES = 1  # on this floor siblings build on each other
MAY_IMPORT = {("pokestrator/__main__.py", "cli"): "`python -m pokestrator` is nothing but a call of it"}

# Where a resource may be used. A path that ends in "/" is a folder.
SQL = ("pokestrator/store/",)
SDK = ("pokestrator/claude/worker.py",)
ASYNC = ("pokestrator/claude/worker.py", "pokestrator/demo/")
THREADS = (
    "pokestrator/dispatcher.py",
    "pokestrator/delivery.py",
    "pokestrator/claude/slot_process.py",
    "pokestrator/claude/relay.py",
    "pokestrator/claude/questions.py",  # one for each question, that its caller need not wait for
    "pokestrator/web/gathering.py",  # hands whole requests to gunicorn's own threads
    "pokestrator/claude/supervisor.py",
    "pokestrator/claude/slot.py",  # in the slot's own process: waits for its parent's end
    "pokestrator/cli.py",  # one job's thread, so that Ctrl-C is heard while it runs
    "pokestrator/demo/",  # its loopback servers, and the reader of the service's log
)
PROCESSES = ("pokestrator/claude/",)
FLASK = ("pokestrator/web/",)
REQUESTS = (
    "pokestrator/poke/",
    "pokestrator/claude/relay_messages.py",
    "pokestrator/claude/answers.py",
    "pokestrator/claude/upstream.py",
)
ENVIRON = (
    "pokestrator/environ.py",
    "pokestrator/claude/jail.py",  # a process of its own, whose variables are those of the program that it becomes
    *PROCESS_FILES,
)
TEMPLATE_FILES = ("pokestrator/store/templates.py",)
TEMPLATES_FOLDER = (  # they hand it on
    *TEMPLATE_FILES,
    "pokestrator/bootstrap.py",
    "pokestrator/cli.py",
    "pokestrator/cli_subagents.py",
)
SETTINGS = (
    "pokestrator/settings.py",
    "pokestrator/environ.py",
    "pokestrator/bootstrap.py",
    "pokestrator/parts.py",
    "pokestrator/cli.py",
    "pokestrator/terminal.py",
    "pokestrator/web/",
    "pokestrator/demo/",
    *PROCESS_FILES,
)

STATEMENT = re.compile(
    r"\s*(SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE|ALTER|DROP|TRUNCATE|WITH|LISTEN|NOTIFY|LOCK|SET)\s+\w"
)
TEMPLATES_PATH = re.compile(r"(.*/)?templates(/.*)?")


# Reading ---------------------------------------------------------------------------------------------------------


@cache
def files() -> tuple[str, ...]:
    """All sources of the program, relative to the root."""
    package = (path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "pokestrator").rglob("*.py")))
    return (*package, *PROCESS_FILES)


@cache
def tree_of(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


@cache
def modules() -> frozenset[str]:
    return frozenset(module_of(path) for path in files() if path not in PROCESS_FILES)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_in(path: str, places: Iterable[str]) -> bool:
    return any(path == place or (place.endswith("/") and path.startswith(place)) for place in places)


def imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every imported dotted name with its line; `from a import b` is `a.b`, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = ".".join(path.removesuffix(".py").split("/")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (folder, node.module) if part)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every string but those that only describe: a string that stands alone is a docstring."""
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in alone:
            text = node.value.decode("latin-1") if isinstance(node.value, bytes) else node.value
            if isinstance(text, str):
                yield node.lineno, text


def dotted(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that is used, as `module.attribute`, and every name that is imported."""
    yield from imports(path, tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.lineno, f"{node.value.id}.{node.attr}"


def within(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# The floors ------------------------------------------------------------------------------------------------------


def place_of(path: str) -> str:
    """The row of FLOORS that a file belongs to: its folder in the package, or its own name."""
    return path if path in PROCESS_FILES else path.removeprefix("pokestrator/").removesuffix(".py").split("/")[0]


def violations_of_floors(path: str, tree: ast.Module) -> list[str]:
    own = place_of(path)
    if own not in FLOORS:
        return [f"{path}: give `{own}` a floor in FLOORS"]
    found = []
    for line, name in imports(path, tree):
        if not within(name, ["pokestrator"]):
            continue
        other = name.split(".")[1] if "." in name else "__init__"
        other = other if other in FLOORS or f"pokestrator.{other}" in modules() else "__init__"
        allowed = other == own or (path, other) in MAY_IMPORT or FLOORS.get(other, 99) < FLOORS[own]
        if not allowed and not FLOORS.get(other, 99) == FLOORS[own] == VALUES:
            found.append(f"{path}:{line}: {own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS.get(other)})")
    return found


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The edges of `graph` that can be taken to come back to where one was; none in a graph without cycles."""

    def reaches(start: str, goal: str) -> bool:
        seen, todo = set[str](), [start]
        while todo:
            for target in graph.get(todo.pop(), set()) - seen:
                seen.add(target)
                todo.append(target)
        return goal in seen

    return [f"{source} -> {target}" for source in graph for target in sorted(graph[source]) if reaches(target, source)]


# Resources -------------------------------------------------------------------------------------------------------


def violations_of_sql(path: str, tree: ast.Module) -> list[str]:
    drivers = _foreign(path, imports(path, tree), ["psycopg", "psycopg_pool"], SQL)
    if is_in(path, SQL):
        return drivers
    return drivers + [f"{path}:{line}: SQL: {text[:40]!r}" for line, text in strings(tree) if STATEMENT.match(text)]


def violations_of_sdk(path: str, tree: ast.Module) -> list[str]:
    return _foreign(path, imports(path, tree), ["claude_agent_sdk"], SDK)


def violations_of_async(path: str, tree: ast.Module) -> list[str]:
    asynchronous = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    if is_in(path, ASYNC):
        return []
    found = [
        f"{path}:{getattr(node, 'lineno', 0)}: {type(node).__name__}"
        for node in ast.walk(tree)
        if isinstance(node, asynchronous) or (isinstance(node, ast.comprehension) and node.is_async)
    ]
    return found + _foreign(path, imports(path, tree), ["asyncio", "anyio"], ASYNC)


def violations_of_threads(path: str, tree: ast.Module) -> list[str]:
    makers = ["concurrent.futures", "threading.Thread", "threading.Timer", "_thread", "multiprocessing.Process"]
    return _foreign(path, dotted(path, tree), makers, THREADS)


def violations_of_processes(path: str, tree: ast.Module) -> list[str]:
    senders = ["os.kill", "os.killpg", "signal.pidfd_send_signal", "signal.pthread_kill", "os.waitpid", "psutil"]
    found = _foreign(path, dotted(path, tree), senders, PROCESSES)
    if is_in(path, PROCESSES):
        return found
    return found + [f"{path}:{line}: reads /proc" for line, text in strings(tree) if re.match(r"/proc\b", text)]


def violations_of_flask(path: str, tree: ast.Module) -> list[str]:
    return _foreign(path, imports(path, tree), ["flask", "werkzeug"], FLASK)


def violations_of_requests(path: str, tree: ast.Module) -> list[str]:
    return _foreign(path, imports(path, tree), ["requests", "urllib3"], REQUESTS)


def violations_of_anthropic(path: str, tree: ast.Module) -> list[str]:
    """Nowhere: it takes 43 MB of each worker, and our own way is as quick (docs/performance.md)."""
    return _foreign(path, imports(path, tree), ["anthropic"], ())


def violations_of_environ(path: str, tree: ast.Module) -> list[str]:
    names = ["os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"]
    return _foreign(path, dotted(path, tree), names, ENVIRON)


def violations_of_templates(path: str, tree: ast.Module) -> list[str]:
    naming = ["pokestrator.store.templates.TEMPLATES_FOLDER", "templates.TEMPLATES_FOLDER"]
    found = _foreign(path, dotted(path, tree), naming, TEMPLATES_FOLDER)
    if is_in(path, TEMPLATE_FILES):
        return found
    paths = [
        part
        for node in ast.walk(tree)
        for part in (
            [node.left, node.right]
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
            else node.args
            if isinstance(node, ast.Call) and _called(node) in ("Path", "joinpath", "open", "glob", "join", "listdir")
            else []
        )
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    return found + [f"{path}:{p.lineno}: names the templates" for p in paths if TEMPLATES_PATH.fullmatch(str(p.value))]


def violations_of_settings(path: str, tree: ast.Module) -> list[str]:
    names = [*(f"pokestrator.settings.{name}" for name in ("Settings", "*")), "pokestrator.environ.process_settings"]
    whole = [
        f"{path}:{line}: imports the settings"
        for line, name in imports(path, tree)
        if name == "pokestrator.settings" and not is_in(path, SETTINGS)
    ]
    return whole + _foreign(path, imports(path, tree), names, SETTINGS)


def _foreign(path: str, names: Iterable[tuple[int, str]], packages: list[str], places: Iterable[str]) -> list[str]:
    if is_in(path, places):
        return []
    return [f"{path}:{line}: uses {name}" for line, name in names if within(name, packages)]


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


# Form ------------------------------------------------------------------------------------------------------------


def violations_of_swallowing(path: str, tree: ast.Module) -> list[str]:
    """Handlers that hide every error: bare ones, and those for (Base)Exception that do nothing."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            idle = all(isinstance(step, (ast.Pass, ast.Continue)) or _is_constant(step) for step in node.body)
            if node.type is None or (idle and _catches_all(node.type)):
                found.append(f"{path}:{node.lineno}: hides every error")
        elif isinstance(node, ast.Call) and _called(node) == "suppress" and any(map(_catches_all, node.args)):
            found.append(f"{path}:{node.lineno}: suppresses every error")
    return found


def _is_constant(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)


def _catches_all(kind: ast.expr) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(isinstance(each, ast.Name) and each.id in ("Exception", "BaseException") for each in kinds)


def violations_of_length(path: str, source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{path}: {lines} lines, {MAX_LINES} or more have two jobs"] if lines >= MAX_LINES else []


Rule = Callable[[str, ast.Module], list[str]]

RULES: tuple[Rule, ...] = (
    violations_of_floors,
    violations_of_sql,
    violations_of_sdk,
    violations_of_async,
    violations_of_threads,
    violations_of_processes,
    violations_of_flask,
    violations_of_requests,
    violations_of_anthropic,
    violations_of_environ,
    violations_of_templates,
    violations_of_settings,
    violations_of_swallowing,
)
