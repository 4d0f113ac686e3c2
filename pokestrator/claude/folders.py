"""The folder that a run works in."""

from __future__ import annotations

import errno
import itertools
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pokestrator.telemetry import get_logger

log = get_logger(__name__)

PREFIX = "pokestrator-run-"
ABANDONED_SECONDS = 86_400.0  # no run takes so long


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for one run, closed to other users; its name is the run's mark."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        yield folder
    finally:
        try:
            remove(folder)
        except OSError as error:
            log.error("folder_left", folder=str(folder), reason=repr(error))


def remove(folder: Path) -> None:
    """Remove a folder that an agent has filled as it liked, though another process may be at it too. Raises OSError.

    Not by shutil: folders nested without end would end its recursion, and what opens the locked ones (as
    tempfile.TemporaryDirectory does) may follow a link out and change the mode of what it leads to. Here every folder
    is opened by its name in the one that holds it, never through a link, and nested ones are moved up before they are
    emptied, so that none lies deep.
    """
    names = (f"{PREFIX}{number}-{os.urandom(8).hex()}" for number in itertools.count())
    is_there = True
    while is_there:
        try:
            _empty(folder, names)
            folder.rmdir()
            is_there = False
        except FileNotFoundError:  # the other was quicker, here or all through
            is_there = folder.is_dir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # the other has moved something up
                raise


def _empty(folder: Path, names: Iterator[str]) -> None:
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        while entries := os.listdir(top):  # noqa: PTH208 - by descriptors
            for entry in entries:
                _remove_one(entry, top, names)
    finally:
        os.close(top)


def _remove_one(entry: str, top: int, names: Iterator[str]) -> None:
    """Remove an entry of `top`; the folders in it become entries of `top`, under new names."""
    if not _is_folder(entry, top):
        os.unlink(entry, dir_fd=top)
        return
    handle = _unlocked(entry, top)
    try:
        for inner in os.listdir(handle):  # noqa: PTH208
            if _is_folder(inner, handle):
                os.close(_unlocked(inner, handle))  # a folder that is moved is written to: it holds the way up
                os.rename(inner, next(names), src_dir_fd=handle, dst_dir_fd=top)
            else:
                os.unlink(inner, dir_fd=handle)
    finally:
        os.close(handle)
    os.rmdir(entry, dir_fd=top)


def _unlocked(entry: str, parent: int) -> int:
    """Open a folder for reading and writing, whatever its mode was."""
    flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    named = os.open(entry, os.O_PATH | flags, dir_fd=parent)
    try:
        os.chmod(f"/proc/self/fd/{named}", 0o700)  # noqa: PTH101 - of what is open, whatever has its name by now
        return os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        os.close(named)


def _is_folder(entry: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(entry, dir_fd=parent, follow_symlinks=False).st_mode)


def remove_abandoned() -> None:
    """Remove what is left of runs whose service was killed in the midst of them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS:
                remove(folder)
        except OSError as error:  # another user's, or just removed by another instance
            log.debug("folder_left", folder=str(folder), reason=repr(error))
