"""What a confined agent is there to do still works, and the service says how it is confined."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from pokestrator.claude import confinement, probing, worker
from pokestrator.claude.pool import Inline, Slots
from pokestrator.claude.probing import probe
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.web.app import create_app
from tests.integration.agent_runs import agent_environment, bash, ignore, scripted, tool_outputs
from tests.integration.flow import Borrowed, running, settings_for

PROGRAMS = {
    "python3": """python3 -c 'import sqlite3, subprocess; print("ok", subprocess.check_output(["echo", "ran"]))'""",
    "node": """node -e 'console.log("ok", require("child_process").execSync("echo ran").toString())'""",
    "git": "git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m c && echo ok ran",
    "curl": "curl --version | head -1 | sed 's/^curl/ok ran/'",
}


def test_programs_run(slots: Slots, api: MessagesApi) -> None:
    there = [name for name in PROGRAMS if shutil.which(name, path="/usr/bin:/usr/local/bin")]
    request = scripted(*(bash(PROGRAMS[name]) for name in there), {"text": "Done."}, timeout_seconds=60.0)
    assert slots.run(request, ignore).text == "Done."
    said = dict(zip(there, tool_outputs(api, request), strict=True))
    assert there, "none of them is on this machine"
    assert {name: text for name, text in said.items() if not text.startswith("ok") or "ran" not in text} == {}


def test_the_shell_has_pipes_jobs_files_and_temporary_ones(slots: Slots, api: MessagesApi) -> None:
    command = """
    seq 5 | tac | head -2 | tr '\\n' ' '; (sleep 0.1; echo later > made) & wait; cat made; cat <(echo substituted)
    printf '#!/bin/sh\\necho script\\n' > own && chmod +x own && ./own; mktemp >/dev/null && echo temporary
    cat <<< here; kill -0 $$ && echo alive; ulimit -c; test -e link || ln -s made link; cat link
    """
    request = scripted(bash(command), {"text": "Done."}, timeout_seconds=60.0)
    assert slots.run(request, ignore).text == "Done."
    [said] = tool_outputs(api, request)
    assert said.replace("\n", " ") == "5 4 later substituted script temporary here alive 0 later"


def test_the_file_tools_work_in_the_agents_folder(slots: Slots, api: MessagesApi) -> None:
    steps = (
        {"tool": "Write", "input": {"file_path": "sub/notes.txt", "content": "tide at six\n"}},
        {"tool": "Read", "input": {"file_path": "sub/notes.txt"}},
        {"tool": "Edit", "input": {"file_path": "sub/notes.txt", "old_string": "six", "new_string": "seven"}},
        {"tool": "Glob", "input": {"pattern": "**/*.txt"}},
        {"tool": "Grep", "input": {"pattern": "seven", "output_mode": "content"}},
    )
    request = scripted(*steps, {"text": "Done."}, tools=("Write", "Read", "Edit", "Glob", "Grep"), timeout_seconds=60.0)
    assert slots.run(request, ignore).text == "Done."
    _, read, _, listed, found = tool_outputs(api, request)
    assert "tide at six" in read
    assert "sub/notes.txt" in listed
    assert "tide at seven" in found


def test_a_cli_that_only_root_can_reach_is_run(
    api: MessagesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the packages lie in root's home: it is opened before the run becomes another user."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    shutil.copyfile(worker.CLI, closed / "claude")
    (closed / "claude").chmod(0o755)
    monkeypatch.setattr(worker, "CLI", closed / "claude")
    request = scripted(
        {"tool": "Write", "input": {"file_path": "a.txt", "content": "tide"}},
        {"tool": "Grep", "input": {"pattern": "tide", "output_mode": "content"}},
        bash("cat a.txt"),
        {"text": "Done."},
        tools=("Write", "Grep", "Bash"),
        timeout_seconds=60.0,
    )
    assert Inline(agent_environment(api.url)).run(request, ignore).text == "Done."
    assert tool_outputs(api, request)[1:] == ["a.txt:1:tide", "tide"]


def test_a_temporary_folder_with_a_long_name_and_blanks_will_do(
    api: MessagesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("a long name with blanks and 'quotes' " * 4).strip()
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for parent in (folder, tmp_path):
        parent.chmod(0o711)
    request = scripted(bash("echo fine"), {"text": "Done."}, timeout_seconds=60.0)
    assert Inline(agent_environment(api.url)).run(request, ignore).text == "Done."
    assert tool_outputs(api, request) == ["fine"]


def test_the_service_says_how_its_agents_are_confined(
    api: MessagesApi, inbox: Inbox, slots: Slots, database_url: str
) -> None:
    with running(settings_for(api, inbox), database_url, claude=Borrowed(slots)) as application:
        health = create_app(application).test_client().get("/healthz").get_json()
    assert health["sandbox"] == {"tier": probe().tier, "egress": probe().egress}


def test_a_processor_whose_system_calls_are_not_known_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "_script", lambda folder: _script_with(folder, "system_calls.MACHINES.clear()"))
    found = probing._probe.__wrapped__()
    assert (found.tier, found.as_user) == ("limited", os.geteuid() == 0)
    assert "this kernel has none" in found.reason


def test_a_kernel_that_confines_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Landlock's calls answer, or do not, as on such a kernel: what counts is what was tried."""
    nothing = "landlock.restrict = seccomp.restrict = lambda *_: None"
    monkeypatch.setattr(confinement, "_script", lambda folder: _script_with(folder, nothing))
    found = probing._probe.__wrapped__()
    assert (found.tier, found.egress) == ("limited", "open")
    assert "it can write outside" in found.reason


def _script_with(folder: Path, change: str) -> Path:
    """A launcher whose jail is changed before it is built."""
    script = folder / "claude"
    code = (
        f'import sys; sys.path.append("{confinement.ROOT}"); '
        f"from pokestrator.claude import jail, landlock, seccomp, system_calls; {change}; jail.main()"
    )
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -I -S -c '{code}'\n")
    script.chmod(0o700)
    return script
