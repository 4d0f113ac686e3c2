"""Everything this program raises on purpose.

PokestratorError
├── SettingsError        the environment holds a value that cannot be used; ends the start
├── InvalidTask          the caller sent something we do not store; the caller can mend it
├── TryAgainLater        nothing was stored, and the same call may work in a moment
│   └── TooManyTasks     its caller has used up a limit
├── InvalidDefinition    a template or a draft that breaks the rules for subagents
├── UnknownSubagent      no subagent has this name
├── CannotChange         a subagent cannot be changed like this, as things are; the text says why and what to do
├── SecretKeyError       a secret cannot be encrypted or decrypted: no key, or not the one it was encrypted with
├── StoreUnavailable     PostgreSQL cannot be reached or did not answer in time
└── LeaseLost            this process no longer owns the job; its result is thrown away
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


class PokestratorError(Exception):
    """Base of all errors raised on purpose."""


class SettingsError(PokestratorError):
    """One line per setting that is wrong: its name, its value (never a secret's), what is allowed."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class InvalidTask(PokestratorError):
    """A field of an `orchestrate` call that we refuse. `problem` names the limit and what to do."""

    def __init__(self, field: str, problem: str) -> None:
        self.field = field
        self.problem = problem
        super().__init__(f"{field}: {problem}")


class TryAgainLater(PokestratorError):
    """The call was not accepted and nothing was stored; the text says when to try again."""


class TooManyTasks(TryAgainLater):
    """The caller has sent `most` tasks in the last `limit`, or has as many under way (`unfinished`).

    `wait_seconds`: until one more may be sent; None when that depends on when one ends.
    """

    def __init__(self, limit: Literal["minute", "day", "unfinished"], most: int, wait_seconds: float | None) -> None:
        self.limit = limit
        self.most = most
        self.wait_seconds = wait_seconds
        super().__init__(f"the limit of tasks is reached: {most} ({limit})")


class InvalidDefinition(PokestratorError):
    """A subagent definition that breaks a rule; `problems` are `field: reason` lines."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(problems))


class UnknownSubagent(PokestratorError):
    """There is no subagent, and no version of one, that is called like this."""


class CannotChange(PokestratorError):
    """A change of a subagent that is refused: a name that is taken, a version that is no longer the current one, …"""


class SecretKeyError(PokestratorError):
    """There is no key to encrypt with, or none of ours fits what was encrypted. The text names neither."""


class StoreUnavailable(PokestratorError):
    """PostgreSQL cannot be reached, refused the connection, or did not answer in time.

    `maybe_committed`: COMMIT was sent, or may have been, and its answer did not come. False: certainly not committed.
    `is_busy`: PostgreSQL is there, but something else held the row or the lock, or all of our connections.
    """

    def __init__(self, reason: str, *, maybe_committed: bool = False, is_busy: bool = False) -> None:
        self.maybe_committed = maybe_committed
        self.is_busy = is_busy
        super().__init__(reason)


class LeaseLost(PokestratorError):
    """A fenced write found no row: another process owns the job now, or it has ended."""
