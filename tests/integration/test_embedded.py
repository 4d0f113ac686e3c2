"""The PostgreSQL that comes along: started, shared and stopped by real processes that come and go."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pokestrator.claude.processes import Process, await_exit, look_up
from pokestrator.errors import StoreUnavailable
from pokestrator.store.embedded import EmbeddedPostgres
from tests.integration.flow import eventually, rows

ROOT = Path(__file__).parents[2]
CANARY = "canary-5d20c7"

# Uses the server until it is told to leave; a subreaper, as gunicorn's workers are.
USER = """
import sys
from pathlib import Path
from pokestrator.claude.processes import become_subreaper
from pokestrator.store.embedded import EmbeddedPostgres
become_subreaper()
server = EmbeddedPostgres(Path(sys.argv[1]))
print(server.url, flush=True)
while sys.stdin.readline() == "revive\\n":
    print(server.revive(), flush=True)
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

    def begin_to_revive(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("revive\n")
        self.process.stdin.flush()

    def revived(self) -> bool:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline().strip()
        assert answer, self.process.communicate()[1]
        return answer == "True"

    def revive(self) -> bool:
        self.begin_to_revive()
        return self.revived()

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


def postmaster(folder: Path) -> Process:
    """The server's first process, as it is now."""
    found = look_up(int((folder / "postgres" / "postmaster.pid").read_text().split()[0]))
    assert found is not None
    return found


def kill_postmaster(folder: Path) -> Process:
    """It is dead when this returns, though perhaps a zombie."""
    killed = postmaster(folder)
    os.kill(killed.pid, signal.SIGKILL)
    assert await_exit(killed, 10)
    return killed


@contextmanager
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the server's user, such as PostgreSQL itself would take for a server by its mere pid."""
    account = {"user": "pgserver"} if os.geteuid() == 0 else {}
    process = subprocess.Popen(["sleep", "600"], **account)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def name_in_its_files(folder: Path, pid: int) -> None:
    """As after a container's restart: what a killed server has left names a process that is another one now."""
    for name in ("postmaster.pid", ".s.PGSQL.5432.lock"):
        path = folder / "postgres" / name
        _, rest = path.read_text().split("\n", 1)
        path.write_text(f"{pid}\n{rest}")


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


def test_a_killed_server_is_started_again_with_its_data_at_the_same_address(folder: Path) -> None:
    server = EmbeddedPostgres(folder)
    rows(server.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    killed = kill_postmaster(folder)
    assert server.revive()
    assert rows(server.url, "SELECT answer FROM kept") == [{"answer": 42}]
    assert postmaster(folder).identity != killed.identity
    assert not server.revive(), "it runs"
    server.leave()
    assert servers(folder) == []
    assert not server.revive(), "after leave() nothing is started"
    assert servers(folder) == []


def test_a_server_that_is_only_frozen_is_left_alone_at_once(folder: Path) -> None:
    with using(folder) as user:
        before = postmaster(folder)
        processes = servers(folder)
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert [user.revive() for _ in range(3)] == [False] * 3
            assert time.monotonic() - began < 10  # a start waits longer
            assert set(servers(folder)) == set(processes)
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        assert rows(user.url, "SELECT 1 AS one") == [{"one": 1}]
        assert postmaster(folder).identity == before.identity


def test_processes_that_revive_it_at_once_share_one_server(folder: Path) -> None:
    users = [User(folder) for _ in range(2)]
    rows(users[0].url, "CREATE TABLE kept AS SELECT 42 AS answer")
    kill_postmaster(folder)
    for user in users:
        user.begin_to_revive()
    assert [user.revived() for user in users] == [True, True]
    assert rows(users[0].url, "SELECT answer FROM kept") == [{"answer": 42}]
    alive = postmaster(folder)
    roots = [pid for pid in servers(folder) if (found := look_up(pid)) and found.parent not in servers(folder)]
    assert roots == [alive.pid]
    for user in users:
        user.leave()
    assert servers(folder) == []


def test_a_revived_server_is_revived_again_though_its_zombie_is_never_collected(folder: Path) -> None:
    with using(folder) as user:
        for _ in range(2):
            kill_postmaster(folder)
            assert user.revive()
        killed = kill_postmaster(folder)
        left = look_up(killed.pid)
        assert left is not None, "the user is its parent, and does not look after it"
        assert left.parent == user.process.pid
        assert not left.alive
        assert user.revive()
        assert rows(user.url, "SELECT 1 AS one") == [{"one": 1}]
    assert servers(folder) == []


def test_a_revived_server_has_its_own_session_and_no_secret_and_outlives_who_revived_it(folder: Path) -> None:
    user = User(folder)
    kill_postmaster(folder)
    assert user.revive()
    revived = postmaster(folder)
    assert revived.session == revived.pid
    assert CANARY.encode() not in Path(f"/proc/{revived.pid}/environ").read_bytes()
    user.kill()
    with using(folder) as later:
        assert rows(later.url, "SELECT 1 AS one") == [{"one": 1}]
        assert postmaster(folder).identity == revived.identity
    assert servers(folder) == []


def test_a_server_is_started_again_once_the_last_process_of_the_killed_one_has_ended(folder: Path) -> None:
    with using(folder) as user:
        others = set(servers(folder)) - {postmaster(folder).pid}
        held = min(others)
        os.kill(held, signal.SIGSTOP)  # it holds the shared memory on
        kill_postmaster(folder)
        timer = threading.Timer(1.5, os.kill, (held, signal.SIGCONT))
        timer.start()
        began = time.monotonic()
        assert user.revive()
        assert time.monotonic() - began > 1
        timer.join()
        assert rows(user.url, "SELECT 1 AS one") == [{"one": 1}]


@pytest.mark.parametrize("again", ["revived", "started"])
def test_a_living_stranger_with_the_killed_servers_pid_is_no_server_and_is_not_harmed(folder: Path, again: str) -> None:
    with stranger() as other:
        user = User(folder)
        rows(user.url, "CREATE TABLE kept AS SELECT 42 AS answer")
        kill_postmaster(folder)
        name_in_its_files(folder, other.pid)
        if again == "revived":
            assert user.revive()
        else:
            user.kill()
            user = User(folder)
        assert rows(user.url, "SELECT answer FROM kept") == [{"answer": 42}]
        kill_postmaster(folder)
        name_in_its_files(folder, other.pid)
        user.leave()  # nothing runs that it could stop
        assert other.poll() is None
        assert servers(folder) == []


@pytest.mark.parametrize("lines", [0, 1, 5])
def test_a_server_that_was_killed_while_it_started_is_started(folder: Path, lines: int) -> None:
    with using(folder):
        kill_postmaster(folder)
        path = folder / "postgres" / "postmaster.pid"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
        with using(folder) as later:
            assert rows(later.url, "SELECT 1 AS one") == [{"one": 1}]


def test_data_that_is_gone_is_not_replaced_by_an_empty_database(folder: Path) -> None:
    server = EmbeddedPostgres(folder)
    kill_postmaster(folder)
    shutil.rmtree(folder / "postgres")
    with pytest.raises(StoreUnavailable, match=rf"^the data of the embedded PostgreSQL in {folder} is gone$"):
        server.revive()
    assert not (folder / "postgres").exists()
    server.leave()


def test_a_server_that_cannot_start_again_says_why(folder: Path) -> None:
    server = EmbeddedPostgres(folder)
    kill_postmaster(folder)
    with (folder / "postgres" / "postgresql.conf").open("a") as configuration:
        configuration.write("\nno_such_setting = 1\n")
    with pytest.raises(StoreUnavailable, match=r"did not start: .*FATAL: .*postgresql.conf.* contains errors"):
        server.revive()
    server.leave()
    shutil.rmtree(folder / "postgres")
