"""`python -m pokestrator demo`, as a stranger runs it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

from pokestrator.demo.local import ROOT
from pokestrator.environ import minimal_environment
from tests.acceptance.processes import eventually, living


def run_demo(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """The finished demo, and a marker that all of its processes carry."""
    marker = f"demo-{uuid.uuid4().hex}"
    done = subprocess.run(
        [sys.executable, "-m", "pokestrator", "demo", *arguments],
        env={**minimal_environment(), "LANG": marker, **environment},
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return done, marker


def test_demo_tells_the_whole_story_and_leaves_no_process() -> None:
    done, marker = run_demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SCRIPTED" in done.stdout
    assert len(re.findall(r"ack in [\d.]+ ms: accepted, request [0-9a-f-]{36}", done.stdout)) == 3
    assert re.findall(r"routed +(\w+):", done.stdout) == ["template", "build_new", "match"]
    assert done.stdout.count("← callback after") == 3
    assert done.stdout.count("delivered callback: 200") == 3
    assert "number_cruncher (template)" in done.stdout
    built = re.search(r"built +(\w+):", done.stdout)
    assert built is not None
    assert f"match: {built[1]}" in done.stdout
    assert f"{built[1]} (built)" in done.stdout
    assert eventually(lambda: not living(marker)), living(marker)


def test_demo_ignores_the_owners_database_and_poke_settings(tmp_path: Path) -> None:
    owners = {
        "DATABASE_URL": "postgresql://owner@127.0.0.1:1/never",
        "POKE_API_KEY": "pk-of-the-owner",
        "POKE_WEBHOOK_URL": "not even a url",
        "POKESTRATOR_DATA_DIR": str(tmp_path / "owner"),
        "PORT": "no number",
    }
    done, _ = run_demo("--task", "Name three rivers that flow into the Baltic Sea", **owners)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "owner").exists()
    assert re.findall(r"routed +(\w+):", done.stdout) == ["build_new", "match"]


def test_demo_that_fails_says_where_and_exits_non_zero() -> None:
    unreachable = {"ANTHROPIC_API_KEY": "sk-x", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    done, marker = run_demo(**unreachable)
    assert done.returncode == 1
    assert "demo failed: a task that a template fits ended as failed: unreachable" in done.stderr
    assert eventually(lambda: not living(marker)), living(marker)


def test_ctrl_c_in_the_middle_of_a_demo_leaves_no_process_and_no_file() -> None:
    marker = f"demo-{uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-m", "pokestrator", "demo", "--task", 'Name three rivers SCRIPT:[{"hang": 120}]'],
        env={**minimal_environment(), "LANG": marker, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = ""
    for line in process.stdout:
        told += line
        if "drafting" in line:
            break
    folder = re.search(r"PostgreSQL in (\S+)", told)
    assert folder is not None, told
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130, errors
    assert errors.endswith("Interrupted.\n")
    assert "Traceback" not in errors
    assert eventually(lambda: not living(marker)), living(marker)
    assert not Path(folder[1]).exists()


def test_a_demo_that_is_ended_while_it_starts_leaves_no_process() -> None:
    marker = f"demo-{uuid.uuid4().hex}"
    process = subprocess.Popen(
        [sys.executable, "-m", "pokestrator", "demo"],
        env={**minimal_environment(), "LANG": marker},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert eventually(lambda: any("gunicorn.conf.py" in line for line in living(marker)), 60)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=90)
    assert process.returncode == 143
    assert eventually(lambda: not living(marker)), living(marker)
