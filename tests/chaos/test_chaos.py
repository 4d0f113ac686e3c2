"""The two-minute run of the harness: every kind of fault once, a fixed seed."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "tests.chaos", "--seconds", "120", "--jobs", "80", "--seed", "7"]
LONGEST = 400.0  # seconds; with settling it takes about 200


def test_nothing_accepted_is_lost_while_everything_breaks_once(tmp_path: Path) -> None:
    # In a process of its own: the harness makes itself the subreaper of all that it starts.
    command = [*COMMAND, "--details", str(tmp_path / "details.log")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as harness:
        late = threading.Timer(LONGEST, harness.terminate)  # it ends all that it has started
        late.start()
        said, _ = harness.communicate()
        late.cancel()
    print(said)
    assert harness.returncode == 0, said
