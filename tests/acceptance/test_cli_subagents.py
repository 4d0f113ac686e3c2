"""`python -m pokestrator subagents`, as a person uses it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pokestrator.demo.local import ROOT
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Subagent
from tests.acceptance.test_cli import Environment, pokestrator
from tests.integration.flow import draft, rows

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
ATTACK = "\x1b]0;owned\x07\x1b[2J[bold red]x[/] \u202e:smile:"


@pytest.fixture
def coder(subagents: Subagents) -> Subagent:
    return subagents.build(draft("scarf_coder"), "Convert my scarf into Morse code", since=LONG_AGO)


@pytest.fixture
def environment(service_environment: Environment, tmp_path: Path) -> Environment:
    (tmp_path / "kept").mkdir()
    return {**service_environment, "TMPDIR": str(tmp_path / "kept")}


def with_editor(environment: Environment, folder: Path, script: str) -> Environment:
    """An $EDITOR that does `script` to the file "$1"."""
    editor = folder / "editor.sh"
    editor.write_text(f"#!/bin/sh\n{script}\n")
    editor.chmod(0o700)
    return {**environment, "VISUAL": "", "EDITOR": str(editor)}


def command(*arguments: str, environment: Environment, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return pokestrator("subagents", *arguments, environment=environment, stdin=stdin)


def test_a_subagent_is_edited_compared_rolled_back_and_shown(
    environment: Environment, tmp_path: Path, coder: Subagent
) -> None:
    editing = with_editor(
        environment, tmp_path, """sed -i 's/^max_turns: null/max_turns: 7/; s/one kind/two kinds/' "$1" """
    )
    edited = command("edit", "scarf_coder", "--note", "two kinds", environment=editing)
    assert (edited.returncode, edited.stdout, edited.stderr) == (0, "scarf_coder has version 2 now.\n", "")
    assert list((tmp_path / "kept").iterdir()) == []

    diff = command("diff", "scarf_coder", environment=environment)
    assert "\n-max_turns: null\n+max_turns: 7\n" in diff.stdout
    assert "\n-You do tasks of one kind" in diff.stdout

    back = command("rollback", "scarf_coder", "--json", environment=environment)
    assert json.loads(back.stdout) == {"name": "scarf_coder", "version": 3, "back_to": 1}

    shown = json.loads(command("show", "scarf_coder", "--version", "2", "--json", environment=environment).stdout)
    assert (shown["version"], shown["current_version"], shown["definition"]["max_turns"]) == (2, 3, 7)
    assert [version["note"] for version in shown["versions"]] == ["", "two kinds", "back to version 1"]
    assert {"task": "Convert my scarf into Morse code", "author": "person"} in shown["examples"]


def test_without_a_terminal_and_an_editor_nothing_is_edited_and_it_says_why(
    environment: Environment, tmp_path: Path, coder: Subagent
) -> None:
    refused = command("edit", "scarf_coder", environment={**environment, "VISUAL": "", "EDITOR": ""})
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "there is no terminal to edit at, and neither VISUAL nor EDITOR is set" in refused.stderr
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_mistake_is_not_stored_and_what_was_typed_is_kept_and_taken_later(
    environment: Environment, tmp_path: Path, coder: Subagent, subagents: Subagents
) -> None:
    editing = with_editor(environment, tmp_path, """sed -i 's/^max_turns: null/max_turns: many/' "$1" """)
    refused = command("edit", "scarf_coder", environment=editing)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "not accepted: max_turns: is not JSON" in refused.stderr
    [kept] = (tmp_path / "kept").iterdir()
    assert f"The text is kept in {kept}" in refused.stderr
    assert kept.stat().st_mode & 0o777 == 0o600
    assert subagents.get("scarf_coder") == coder

    kept.write_text(kept.read_text().replace("many", "9"))
    taken = command("edit", "scarf_coder", "--from", str(kept), "--json", environment=environment)
    assert json.loads(taken.stdout) == {"name": "scarf_coder", "version": 2, "changed": True}
    stale = command("edit", "scarf_coder", "--from", str(kept), environment=environment)
    assert stale.returncode == 1
    assert "its current version is 2, and this was made from version 1" in stale.stderr


def test_at_a_terminal_a_mistake_is_shown_and_edited_again(
    environment: Environment, tmp_path: Path, coder: Subagent, subagents: Subagents
) -> None:
    # The first time it writes a mistake, the second time it mends it.
    script = """sed -i 's/^max_turns: many/max_turns: 8/; s/^max_turns: null/max_turns: many/' "$1" """
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pokestrator", "subagents", "edit", "scarf_coder"],
        env=with_editor(environment, tmp_path, script),
        cwd=ROOT,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    shown = b""
    while b"Edit it again?" not in shown:
        shown += os.read(terminal, 1_000)
    os.write(terminal, b"y\n")
    while b"has version 2 now" not in shown:
        shown += os.read(terminal, 1_000)
    assert process.wait(30) == 0
    os.close(terminal)
    assert b"not accepted: max_turns: is not JSON" in shown
    now = subagents.get("scarf_coder")
    assert now is not None and now.definition.max_turns == 8


def test_a_text_that_was_not_changed_changes_nothing(
    environment: Environment, tmp_path: Path, coder: Subagent, subagents: Subagents
) -> None:
    done = command("edit", "scarf_coder", environment=with_editor(environment, tmp_path, "exit 0"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "Nothing is changed.\n", "")
    failed = command("edit", "scarf_coder", environment=with_editor(environment, tmp_path, "exit 3"))
    assert (failed.returncode, failed.stdout) == (1, "")
    unused = command("edit", "weather_forecaster", environment=with_editor(environment, tmp_path, "exit 0"))
    assert (unused.returncode, unused.stdout) == (0, "Nothing is changed.\n")
    assert list((tmp_path / "kept").iterdir()) == []
    assert subagents.all() == [coder]


def test_a_subagent_is_moved_renamed_archived_and_restored(
    environment: Environment, tmp_path: Path, coder: Subagent, database_url: str
) -> None:
    document = command("export", "scarf_coder", environment=environment).stdout
    written = command("export", "scarf_coder", "--as-template", "-o", str(tmp_path), environment=environment)
    assert written.returncode == 0, written.stderr
    file = tmp_path / "scarf_coder.json"
    checked = pokestrator("templates", "check", str(tmp_path), environment=environment)
    assert (checked.returncode, checked.stdout) == (0, "ok      scarf_coder\n"), checked.stderr

    refused = command("import", str(file), environment=environment)
    assert refused.returncode == 1
    assert "there is a subagent scarf_coder already" in refused.stderr
    assert "--replace" in refused.stderr
    rows(database_url, "DELETE FROM subagents")
    taken = command("import", "-", "--json", environment=environment, stdin=document)
    assert json.loads(taken.stdout) == {"name": "scarf_coder", "version": 1, "state": "active", "created": True}

    renamed = command("rename", "scarf_coder", "mitten_coder", environment=environment)
    assert (renamed.returncode, renamed.stdout) == (0, "scarf_coder is called mitten_coder now.\n")
    assert command("archive", "mitten_coder", environment=environment).stdout == "mitten_coder is archived.\n"
    assert json.loads(command("list", "--json", environment=environment).stdout) == []
    [archived] = json.loads(command("list", "--all", "--json", environment=environment).stdout)
    assert (archived["name"], archived["state"], archived["runs"]) == ("mitten_coder", "archived", 0)
    assert command("restore", "mitten_coder", environment=environment).stdout == "mitten_coder is active again.\n"


def test_a_file_that_breaks_a_rule_is_refused_with_every_field(environment: Environment, subagents: Subagents) -> None:
    bad = {"name": "Bad Name", "description": "short", "system_prompt": "x" * 50, "colour\x1b[2J": 1}
    done = command("import", "-", environment=environment, stdin=json.dumps(bad))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert all(line.startswith("not accepted: ") for line in lines) and len(lines) == 3
    assert "\x1b" not in done.stderr
    assert subagents.all() == []


def test_a_name_that_is_not_there_gets_near_ones(environment: Environment, coder: Subagent) -> None:
    done = command("show", "scarf_codr", environment=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "there is no subagent 'scarf_codr'; did you mean scarf_coder?\n"


def test_what_is_stored_is_never_obeyed_by_the_terminal(
    environment: Environment, subagents: Subagents, database_url: str
) -> None:
    said = draft("odd_one", description=f"Takes odd tasks {ATTACK}", system_prompt=f"Odd.\n{ATTACK}\n" + 40 * "x")
    subagents.build(said, f"An odd task {ATTACK}", since=LONG_AGO)
    rows(database_url, "UPDATE subagent_versions SET note = %s", ATTACK)
    for arguments in (["list"], ["show", "odd_one"], ["list", "--json"], ["show", "odd_one", "--json"]):
        shown = command(*arguments, environment=environment)
        assert shown.returncode == 0, shown.stderr
        assert not any(each in shown.stdout + shown.stderr for each in "\x1b\x07\u202e")
        assert "[bold red]x[/]" in shown.stdout
        assert ":smile:" in shown.stdout
