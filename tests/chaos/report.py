"""The verdict as a table in Markdown, and a file with all that is needed to understand a failure."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from pokestrator.demo.inbox import Received
from tests.chaos.ledgers import Ledgers, clock
from tests.chaos.verdict import Found, Verdict

MOST_BLAMED = 40  # jobs whose story is told


def table(verdict: Verdict, command: str, seed: int, postgres_version: str) -> str:
    """The table; its last line says how it was made."""
    lines = ["| what | result |", "|---|---|", *(f"| {what} | {result} |" for what, result in verdict.rows)]
    made = f"`{command}`, seed {seed}, Python {platform.python_version()}, PostgreSQL {postgres_version}"
    return "\n".join([*lines, f"| made by | {made} |"])


def details(
    verdict: Verdict, ledgers: Ledgers, posts: Sequence[Received], found: Found, database: str, logs: str
) -> str:
    """Why it failed: each reason, each blamed job's story with the faults in its time, all faults, all logs."""
    parts = ["REASONS", *verdict.failures, ""]
    for job in sorted(verdict.blamed)[:MOST_BLAMED]:
        parts += [*_story(job, ledgers, posts, found), ""]
    parts += ["FAULTS", *map(str, sorted(ledgers.faults, key=lambda fault: fault.started)), ""]
    parts += ["ORPHANS, longest first"]
    for orphan in sorted(ledgers.orphans, key=lambda each: -each.seconds):
        parts.append(f"{clock(orphan.started)} {orphan.seconds:.1f} s {orphan.cause} {orphan.owner}: {orphan.job_id}")
    parts.append("")
    slow = ledgers.acks.where(lambda ack: ack.seconds > 2)
    parts += [
        "ACCEPTS ABOVE 2 s",
        *(f"{clock(a.at)} {a.seconds:.1f} s by {a.instance}: {a.request_id}" for a in slow),
    ]
    parts += ["", "TRIES NOT ACCEPTED"]
    parts += [f"{clock(r.at)} {r.seconds:.1f} s {r.key} by {r.instance}: {r.kind}: {r.text}" for r in ledgers.refusals]
    parts += ["", "SERVICES", logs, "", "POSTGRESQL", database]
    return "\n".join(parts)


def _story(job: str, ledgers: Ledgers, posts: Sequence[Received], found: Found) -> list[str]:
    lines: list[tuple[float, str]] = []
    for ack in ledgers.acks:
        if ack.request_id == job:
            kind = "durable" if ack.durable else "not durable"
            lines.append((ack.at, f"accepted ({kind}) by {ack.instance} for {ack.key} in {ack.seconds:.2f} s"))
    for event in found.events:
        if str(event["job_id"]) == job:
            lines.append((event["at"].timestamp(), f"{event['kind']}: {event['text']}"))
    keys = {str(row["id"]) for row in found.callbacks if str(row["job_id"]) == job} | {job}
    for post in posts:
        if post.headers.get("idempotency-key") in keys:
            lines.append((post.at, f"inbox: {post.channel}, answered {post.status}"))
    for orphan in ledgers.orphans:
        if orphan.job_id == job:
            lines.append((orphan.started, f"orphan ({orphan.cause}) for {orphan.seconds:.1f} s, owner {orphan.owner}"))
    if lines:
        first, last = min(lines)[0], max(lines)[0]
        near = [fault for fault in ledgers.faults if fault.started < last + 5 and fault.whole > first - 5]
        lines += [(fault.started, f"FAULT {fault}") for fault in near]
    rows = [f"  job: {_row(row)}" for row in found.jobs if str(row["id"]) == job]
    rows += [f"  callback: {_row(row)}" for row in found.callbacks if str(row["job_id"]) == job]
    return [f"JOB {job}", *rows, *(f"  {clock(at)} {text}" for at, text in sorted(lines))]


def _row(row: object) -> str:
    return str(row)[:600]


def write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="replace")
