"""The folder that a run works in."""

from __future__ import annotations

import shutil
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
    folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # an agent can nest folders deeper than Python recurses
            log.error("folder_left", folder=folder.name)


def remove_abandoned() -> None:
    """Remove what is left of runs whose service was killed in the midst of them."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder)
        except (OSError, RecursionError) as error:  # another user's, or just removed by another instance
            log.debug("folder_left", folder=str(folder), reason=repr(error))
