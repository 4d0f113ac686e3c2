"""The PostgreSQL that comes along: started, shared and stopped by real processes that come and go."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pokestrator.errors import StoreUnavailable
from pokestrator.store.embedded import EmbeddedPostgres
from tests.integration.flow import eventually, rows

ROOT = Path(__file__).parents[2]
CANARY = "canary-5d20c7"

# Uses the server until it is told to leave.
USER = """
import sys
from pathlib import Path
from pokestrator.store.embedded import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]))
print(server.url, flush=True)
sys.stdin.readline()
server.leave()
server.leave()
"""


class User:
    """A process that uses the server in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(folder)],
            cwd=ROOT,
            env={**os.environ, "POKE_API_KEY": CANARY, "ANTHROPIC_API_KEY": CANARY, "OTHER_SECRET": CANARY},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.process.communicate()[1]

    def leave(self) -> None:
        _, errors = self.process.communicate("leave\n", timeout=60)
        assert self.process.returncode == 0, errors

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not under pytest's temporary folder, whose parents the server, as root, would open to others."""
    folder = Path(tempfile.mkdtemp(prefix="pokestrator-embedded-"))
    yield folder
    with using(folder):  # whatever a failed test has left is stopped by its last user
        pass
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def using(folder: Path) -> Iterator[User]:
    user = User(folder)
    try:
        yield user
    finally:
        user.leave()


def servers(folder: Path) -> list[int]:
    """All processes of the server in `folder`: they work in its data folder."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _works_in(entry, folder)]


def _works_in(process: Path, folder: Path) -> bool:
    try:
        return (process / "cwd").readlink() == folder / "postgres"
    except OSError:
        return False


def test_data_is_kept_between_runs_and_no_process_is_left(folder: Path) -> None:
    with using(folder) as first:
        rows(first.url, "CREATE TABLE kept AS SELECT 42 AS answer")
        assert len(servers(folder)) > 1
    assert servers(folder) == []
    with using(folder) as second:
        assert rows(second.url, "SELECT answer FROM kept") == [{"answer": 42}]
    assert servers(folder) == []


def test_a_second_process_joins_and_the_last_one_to_leave_stops_the_server(folder: Path) -> None:
    first, second = User(folder), User(folder)
    assert first.url == second.url
    rows(first.url, "CREATE TABLE shared (id int)")
    first.leave()
    assert rows(second.url, "SELECT count(*) AS n FROM shared") == [{"n": 0}]
    third = User(folder)
    second.leave()
    assert rows(third.url, "SELECT count(*) AS n FROM shared") == [{"n": 0}]
    third.leave()
    assert servers(folder) == []


def test_a_killed_process_leaves_a_server_that_the_next_one_stops(folder: Path) -> None:
    killed = User(folder)
    rows(killed.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    before = set(servers(folder))
    killed.kill()
    with using(folder) as later:
        assert before & set(servers(folder)), "it is the same server"
        assert rows(later.url, "SELECT answer FROM kept") == [{"answer": 42}]
    assert servers(folder) == []


def test_the_server_knows_none_of_our_secrets(folder: Path) -> None:
    with using(folder):
        processes = servers(folder)
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in processes]
        arguments = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes]
        assert any(b"PATH=" in environment for environment in environments), "at least one shows what it was given"
        assert not [text for text in (*environments, *arguments) if CANARY.encode() in text]


def test_the_server_listens_on_no_network_address(folder: Path) -> None:
    with using(folder) as user:
        assert rows(user.url, "SHOW listen_addresses") == [{"listen_addresses": ""}]


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable, match=rf"^POKESTRATOR_DATA_DIR={tmp_path}/file/data: Not a directory$"):
        EmbeddedPostgres(tmp_path / "file" / "data")


def test_a_folder_that_is_too_deep_for_a_private_socket_is_refused_with_its_longest_length(folder: Path) -> None:
    deep = folder / ("d" * 200)
    with pytest.raises(StoreUnavailable, match=rf"^POKESTRATOR_DATA_DIR={deep}: too long .* at most 84 bytes$"):
        EmbeddedPostgres(deep)
    assert not deep.exists()


def test_the_longest_folder_has_its_socket_in_a_place_closed_to_others(folder: Path) -> None:
    longest = folder / ("d" * (84 - len(str(folder)) - 1))
    with using(longest) as user:
        assert rows(user.url, "SHOW unix_socket_directories") == [{"unix_socket_directories": f"{longest}/postgres"}]
        [socket] = longest.rglob(".s.PGSQL.5432")
        assert socket.parent == longest / "postgres"
        assert stat.S_IMODE(socket.parent.stat().st_mode) & 0o077 == 0


def test_users_of_one_machine_share_no_lock_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes first owns a file in the shared temporary folder, and nobody else may open it."""
    shared = folder / "tmp"
    shared.mkdir()
    (shared / ".lockfile").mkdir()  # cannot be opened, not even by root
    monkeypatch.setenv("TMPDIR", str(shared))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(shared))
    with using(folder / "data"):
        assert stat.S_IMODE((folder / "data" / "run").stat().st_mode) == 0o700
        assert [path.name for path in shared.iterdir()] == [".lockfile"]


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    (folder / "postgres").mkdir()
    (folder / "postgres" / "PG_VERSION").write_text("11\n")
    with pytest.raises(StoreUnavailable, match=r"did not start: .*version 11"):
        EmbeddedPostgres(folder)
    shutil.rmtree(folder / "postgres")


def test_processes_that_come_at_once_share_one_server(folder: Path) -> None:
    command = [sys.executable, "-c", USER, str(folder)]
    users = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    urls = {user.stdout.readline().strip() for user in users if user.stdout is not None}
    assert len(urls) == 1
    assert urls != {""}
    assert rows(urls.pop(), "SELECT 1 AS one") == [{"one": 1}]
    for user in users:
        user.communicate("leave\n", timeout=60)
    assert [user.returncode for user in users] == [0, 0, 0]
    assert eventually(lambda: servers(folder) == [])
