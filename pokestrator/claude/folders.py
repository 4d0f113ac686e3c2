"""The folder that a run works in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pokestrator.telemetry import get_logger

log = get_logger(__name__)


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for one run, closed to other users; its name is the run's mark."""
    folder = tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # an agent can nest folders deeper than Python recurses
            log.error("folder_left", folder=folder.name)
