"""The program keeps the rules of docs/architecture.md, and each of the rules can fail."""

from __future__ import annotations

import ast

import pytest

from tests.unit.source_rules import (
    MAX_LINES,
    ROOT,
    RULES,
    Rule,
    cycles,
    files,
    imports,
    module_of,
    modules,
    tree_of,
    violations_of_anthropic,
    violations_of_async,
    violations_of_environ,
    violations_of_flask,
    violations_of_floors,
    violations_of_length,
    violations_of_processes,
    violations_of_requests,
    violations_of_sdk,
    violations_of_settings,
    violations_of_sql,
    violations_of_swallowing,
    violations_of_templates,
    violations_of_threads,
)

# The program -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_of_the_program_keeps_the_rule(rule: Rule) -> None:
    assert [found for path in files() for found in rule(path, tree_of(path))] == []


def test_no_file_is_too_long() -> None:
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in files()}
    assert [found for path, source in sources.items() for found in violations_of_length(path, source)] == []


def test_no_module_needs_itself_through_others() -> None:
    assert cycles({module_of(path): _needed(path) for path in files()}) == []


def _needed(path: str) -> set[str]:
    """The modules of the program that a file imports, its own folder's `__init__` aside."""
    names = [name for _, name in imports(path, tree_of(path))]
    found = {candidate for name in names for candidate in (name, name.rpartition(".")[0]) if candidate in modules()}
    return {name for name in found if not (ROOT / name.replace(".", "/")).is_dir()}


# The rules -------------------------------------------------------------------------------------------------------

BROKEN = [
    (violations_of_floors, "pokestrator/poke/api.py", "from pokestrator.routing import decide"),
    (violations_of_floors, "pokestrator/poke/api.py", "from pokestrator.store.pool import Database"),
    (violations_of_floors, "pokestrator/store/jobs.py", "from pokestrator import service"),
    (violations_of_floors, "pokestrator/claude/pool.py", "from ..store import jobs"),
    (violations_of_floors, "pokestrator/errors.py", "def later():\n    import pokestrator.web.app"),
    (violations_of_floors, "pokestrator/web/app.py", "from pokestrator.demo.inbox import Inbox"),
    (violations_of_floors, "pokestrator/cli.py", "from pokestrator.__main__ import main"),
    (violations_of_floors, "pokestrator/novelty.py", "import json"),
    (violations_of_sql, "pokestrator/service.py", "import psycopg"),
    (violations_of_sql, "pokestrator/web/api.py", "from psycopg_pool import ConnectionPool"),
    (violations_of_sql, "pokestrator/growth.py", 'COUNT = """\nSELECT count(*) FROM jobs"""'),
    (
        violations_of_sql,
        "pokestrator/growth.py",
        'def f(t):\n    return f"DELETE FROM {t}"[0], "UPDATE jobs SET a = 1"',
    ),
    (violations_of_sql, "pokestrator/growth.py", 'Q = b"WITH task AS (SELECT 1) SELECT * FROM task"'),
    (violations_of_sdk, "pokestrator/claude/outcomes.py", "from claude_agent_sdk import ResultMessage"),
    (violations_of_sdk, "pokestrator/service.py", "import claude_agent_sdk.types as t"),
    (violations_of_async, "pokestrator/web/app.py", "import asyncio"),
    (violations_of_async, "pokestrator/service.py", "async def run(): ..."),
    (violations_of_async, "pokestrator/claude/pool.py", "async def f(x):\n    return [y async for y in x]"),
    (violations_of_threads, "pokestrator/service.py", "from concurrent.futures import ThreadPoolExecutor"),
    (violations_of_threads, "pokestrator/web/api.py", "import threading\nthreading.Thread(target=print).start()"),
    (violations_of_threads, "pokestrator/store/pool.py", "from threading import Timer"),
    (violations_of_processes, "pokestrator/dispatcher.py", "import os\nos.kill(1, 9)"),
    (violations_of_processes, "pokestrator/cli.py", "from os import killpg"),
    (violations_of_processes, "pokestrator/settings.py", 'from pathlib import Path\nPath(f"/proc/{1}/environ")'),
    (violations_of_flask, "pokestrator/service.py", "from flask import request"),
    (violations_of_flask, "wsgi.py", "import flask"),
    (violations_of_anthropic, "pokestrator/claude/questions.py", "def ask():\n    from anthropic import Anthropic"),
    (violations_of_requests, "pokestrator/delivery.py", "import requests"),
    (violations_of_requests, "pokestrator/web/api.py", "from requests import post"),
    (violations_of_environ, "pokestrator/cli.py", "import os\nos.environ['HOME']"),
    (violations_of_environ, "pokestrator/store/embedded.py", "from os import environ"),
    (violations_of_environ, "pokestrator/poke/api.py", "import os\nos.getenv('POKE_API_KEY')"),
    (
        violations_of_templates,
        "pokestrator/routing.py",
        "from pathlib import Path\nPath(__file__).parent / 'templates'",
    ),
    (violations_of_templates, "pokestrator/routing.py", "open('templates/stripe_analyst.json')"),
    (violations_of_templates, "pokestrator/service.py", "from pokestrator.store.templates import TEMPLATES_FOLDER"),
    (violations_of_settings, "pokestrator/service.py", "from pokestrator.settings import Settings"),
    (violations_of_settings, "pokestrator/poke/api.py", "from pokestrator.environ import process_settings"),
    (violations_of_settings, "pokestrator/claude/pool.py", "from pokestrator import settings"),
    (violations_of_swallowing, "pokestrator/cli.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (
        violations_of_swallowing,
        "pokestrator/cli.py",
        "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    ...",
    ),
    (violations_of_swallowing, "pokestrator/cli.py", "try:\n    f()\nexcept:\n    raise"),
    (violations_of_swallowing, "pokestrator/cli.py", "with suppress(Exception):\n    f()"),
]

KEPT = [
    (violations_of_floors, "pokestrator/jobs.py", "from pokestrator.runs import Usage"),
    (violations_of_floors, "pokestrator/claude/pool.py", "from pokestrator import __version__\nfrom . import slot"),
    (violations_of_sql, "pokestrator/service.py", '"""SELECT is not said here."""\nsay = "With pleasure, UPDATE it"'),
    (violations_of_async, "pokestrator/claude/worker.py", "import asyncio\nasync def f(): ..."),
    (violations_of_threads, "pokestrator/store/pool.py", "import threading\nthreading.Event()"),
    (violations_of_environ, "pokestrator/cli.py", '"""os.environ is read elsewhere."""\nimport os\nos.getpid()'),
    (violations_of_templates, "pokestrator/cli.py", "templates = {'templates': 1}"),
    (violations_of_settings, "pokestrator/claude/worker.py", "from pokestrator.environ import environment"),
    (violations_of_swallowing, "pokestrator/cli.py", "try:\n    f()\nexcept Exception:\n    log.exception('broken')"),
    (violations_of_swallowing, "pokestrator/cli.py", "try:\n    f()\nexcept OSError:\n    pass"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_a_rule_finds_the_code_that_breaks_it(rule: Rule, path: str, source: str) -> None:
    found = rule(path, ast.parse(source))
    assert found
    assert all(each.startswith(path) for each in found)


@pytest.mark.parametrize(("rule", "path", "source"), KEPT)
def test_a_rule_lets_pass_what_only_looks_like_it(rule: Rule, path: str, source: str) -> None:
    assert rule(path, ast.parse(source)) == []


def test_every_rule_has_code_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BROKEN} == set(RULES)


def test_a_file_of_too_many_lines_is_found() -> None:
    assert violations_of_length("pokestrator/jobs.py", "x = 1\n" * MAX_LINES)
    assert violations_of_length("pokestrator/jobs.py", "x = 1\n" * (MAX_LINES - 1)) == []


def test_a_cycle_is_found_however_long_it_is() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a -> b", "b -> c", "c -> a"]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
