"""Owners that die on this machine: real processes that are killed, stopped, or leave children behind."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from pokestrator import liveness
from pokestrator.claude.processes import await_exit, look_up
from pokestrator.liveness import Liveness

ROOT = Path(__file__).parents[2]

# Declares itself; does as it is told, a word a line.
OWNER = """
import subprocess, sys
from pathlib import Path
from pokestrator.liveness import Liveness
liveness = Liveness(Path(sys.argv[1]))
print(liveness.declare(sys.argv[2]), flush=True)
for line in sys.stdin:
    if line == "spawn\\n":
        child = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        print(child.pid, flush=True)
    elif line == "withdraw\\n":
        liveness.withdraw()
        print("withdrawn", flush=True)
    else:
        print(liveness.is_dead(line.strip()), flush=True)
"""


def new_name() -> str:
    return f"some-host.example:17:{uuid.uuid4().hex[:8]}"


class Owner:
    """A process that has declared itself in `folder`."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.name = name or new_name()
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(folder), self.name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def owner(folder: Path, name: str | None = None) -> Iterator[Owner]:
    """One that has declared itself."""
    started = Owner(folder, name)
    try:
        assert started.answer() == "True"
        yield started
    finally:
        started.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Not there yet, and neither is its parent."""
    return tmp_path / "data" / "owners"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_killed_owner_is_dead_as_soon_as_it_has_ended_also_as_a_zombie(folder: Path) -> None:
    watcher = Liveness(folder)
    with owner(folder) as one:
        assert not watcher.is_dead(one.name)
        process = look_up(one.process.pid)
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        assert await_exit(process, 20)
        assert watcher.is_dead(one.name), "it is a zombie: nobody has waited for it"


def test_a_stopped_owner_lives(folder: Path) -> None:
    with owner(folder) as one:
        os.kill(one.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, one.process.pid, os.WSTOPPED | os.WNOWAIT)
        assert not Liveness(folder).is_dead(one.name)
        os.kill(one.process.pid, signal.SIGCONT)
        assert one.ask(one.name) == "False"


def test_what_a_dead_owner_has_started_does_not_keep_it_alive(folder: Path) -> None:
    with owner(folder) as one:
        child = int(one.ask("spawn"))
        try:
            assert not Liveness(folder).is_dead(one.name)
            one.kill()
            assert Liveness(folder).is_dead(one.name)
            left = look_up(child)
            assert left is not None
            assert left.alive
        finally:
            os.kill(child, signal.SIGKILL)


def test_two_who_ask_see_the_same_death(folder: Path) -> None:
    with owner(folder) as dead, owner(folder) as one, owner(folder) as two:
        dead.kill()
        assert [one.ask(dead.name), two.ask(dead.name), one.ask(dead.name)] == ["True"] * 3
        assert [one.ask(two.name), two.ask(one.name), one.ask(one.name)] == ["False"] * 3


def test_an_owner_from_elsewhere_is_not_known_to_be_dead(folder: Path) -> None:
    assert not Liveness(folder).is_dead(new_name()), "there is no folder"
    with owner(folder):
        assert not Liveness(folder).is_dead(new_name())


def test_a_dead_owner_that_is_forgotten_is_not_known_any_more_and_a_living_one_cannot_be_forgotten(
    folder: Path,
) -> None:
    watcher = Liveness(folder)
    with owner(folder) as one:
        watcher.forget(one.name)
        assert names(folder) == {one.name}
        one.kill()
        assert watcher.is_dead(one.name)
        watcher.forget(one.name)
        assert not watcher.is_dead(one.name)
        assert names(folder) == set()


def test_an_owner_that_leaves_in_order_is_not_dead(folder: Path) -> None:
    with owner(folder) as one:
        assert one.ask("withdraw") == "withdrawn"
        assert not Liveness(folder).is_dead(one.name)
        assert names(folder) == set()


def test_one_declared_in_place_of_a_dead_one_leaves_it_to_be_found(folder: Path) -> None:
    """gunicorn replaces a killed worker at once; the jobs of the first are looked for later."""
    with owner(folder) as dead:
        dead.kill()
        with owner(folder) as one, owner(folder) as two:
            assert one.ask(dead.name) == two.ask(dead.name) == "True"


def test_files_of_the_long_dead_are_removed_by_those_that_come(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Liveness(folder), new_name()
    with owner(folder) as dead, owner(folder) as living:
        lived_long = time.time() - 100_000
        os.utime(folder / dead.name, (lived_long, lived_long))
        os.utime(folder / living.name, (lived_long, lived_long))
        (folder / "notes").write_text("not an owner's")
        dead.kill()
        assert mine.declare(new_name())
        assert mine.is_dead(dead.name), "found dead only now"
        os.utime(folder / dead.name, (lived_long, lived_long))
        monkeypatch.setattr(liveness, "KEEP_SECONDS", 60)
        assert mine.declare(other)
        assert dead.name not in names(folder)
        assert {living.name, other, "notes"} <= names(folder)
        assert not mine.is_dead(living.name)
    mine.withdraw()


def test_many_that_are_declared_at_once_all_live(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks for the dead while the others' files are made, and must neither remove nor block them."""
    monkeypatch.setattr(liveness, "KEEP_SECONDS", -1)
    racing = [Owner(folder) for _ in range(4)]
    try:
        mine = Liveness(folder)
        while any(one.process.stdout not in _readable(racing) for one in racing):
            assert mine.declare(new_name())
            mine.withdraw()
        assert [one.answer() for one in racing] == ["True"] * 4
        assert not [one.name for one in racing if mine.is_dead(one.name)]
        for one in racing:
            one.kill()
        assert all(mine.is_dead(one.name) for one in racing)
    finally:
        for one in racing:
            one.kill()


def _readable(owners: list[Owner]) -> list[object]:
    return list(select.select([one.process.stdout for one in owners], [], [], 0)[0])


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, name, flock = Liveness(folder), new_name(), fcntl.flock

    def removed_before(file: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        (folder / name).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    assert mine.declare(name)
    assert names(folder) == {name}
    assert not Liveness(folder).is_dead(name)
    mine.withdraw()


def test_a_declaration_waits_for_one_who_looks_at_its_file_just_then(folder: Path) -> None:
    mine, name = Liveness(folder), new_name()
    folder.mkdir(parents=True)
    file = os.open(folder / name, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_SH)
    timer = threading.Timer(0.2, os.close, (file,))
    timer.start()
    assert mine.declare(name)
    timer.join()
    mine.withdraw()


def test_a_name_that_another_process_holds_cannot_be_declared(folder: Path) -> None:
    name = new_name()
    with owner(folder, name) as one:
        mine = Liveness(folder)
        with structlog.testing.capture_logs() as logs:
            assert not mine.declare(name)
        assert [entry["event"] for entry in logs] == ["liveness_off"]
        mine.withdraw()
        assert names(folder) == {name}
        one.kill()
        assert mine.declare(name), "a dead one's name is free"
        mine.withdraw()


def test_a_process_can_declare_more_than_one_name_and_each_twice(folder: Path) -> None:
    mine, one, two = Liveness(folder), new_name(), new_name()
    assert [mine.declare(name) for name in (one, two, one)] == [True] * 3
    with owner(folder) as other:
        assert other.ask(one) == other.ask(two) == "False"
    mine.withdraw()
    assert one not in names(folder)
    assert two not in names(folder)


@pytest.mark.parametrize(
    "name",
    ["", "host", "host:1", "host:1:xyz", "../host:1:0123abcd", "a/b:1:0123abcd", ".:1:0123abcd", "h:1:0123abcd\n"],
)
def test_other_names_are_refused_and_never_dead(folder: Path, name: str) -> None:
    mine = Liveness(folder)
    with pytest.raises(ValueError, match=re.escape(f"owner={name!r}: must be host:pid:8 hexadecimal digits")):
        mine.declare(name)
    assert not folder.exists()
    folder.mkdir(parents=True)
    assert not mine.is_dead(name)
    mine.forget(name)


@pytest.mark.parametrize("place", ["a file is in its place", "a file is in its parent's place", "read only"])
def test_without_a_folder_it_says_so_once_and_nobody_is_dead(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    folder = {
        "a file is in its place": tmp_path / "file",
        "a file is in its parent's place": tmp_path / "file" / "owners",
        "read only": Path("/proc/nothing/owners"),
    }[place]
    mine, name = Liveness(folder), new_name()
    with structlog.testing.capture_logs() as logs:
        assert not mine.declare(name)
        assert not mine.declare(name)
    assert [(entry["event"], entry["log_level"], entry["folder"]) for entry in logs] == [
        ("liveness_off", "warning", str(folder))
    ]
    assert logs[0]["reason"]
    assert not mine.is_dead(name)
    mine.forget(name)
    mine.withdraw()


def test_the_folder_and_its_files_are_closed_to_others(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o777)
    mine, name = Liveness(folder), new_name()
    assert mine.declare(name)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / name).stat().st_mode) & 0o077 == 0
    mine.withdraw()


def test_links_and_pipes_in_the_folder_are_never_followed(folder: Path, tmp_path: Path) -> None:
    """A dead owner's file would be marked, and removed."""
    target = tmp_path / "target"
    target.write_text("")
    link, pipe, mine = new_name(), new_name(), Liveness(folder)
    folder.mkdir(parents=True)
    (folder / link).symlink_to(target)
    os.mkfifo(folder / pipe)
    assert mine.declare(new_name())
    assert not mine.is_dead(link)
    assert not mine.is_dead(pipe)
    for name in (link, pipe):
        mine.forget(name)
        assert not Liveness(folder).declare(name)
    assert target.read_text() == ""
    assert {link, pipe} <= names(folder)
    mine.withdraw()


def test_a_linked_folder_is_not_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert not Liveness(folder).declare(new_name())
    assert names(tmp_path / "elsewhere") == set()
