"""What each idea in the search gives: recall on a file of tasks, with one of them taken out or changed at a time.

    .venv/bin/python -m tests.bench.ideas FILE.json

FILE is what `python -m pokestrator route --eval` takes. In PostgreSQL, embedded, in a temporary folder. Right one first
and among the first 20, in percent, with no example, one and five.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pokestrator.evaluation import Material, evaluate, measured, read_material
from pokestrator.store import shortlist
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.examples import refresh_search
from pokestrator.store.pool import Database
from pokestrator.store.scratch import scratch
from pokestrator.store.statistics import Statistics

SHOTS = (0, 1, 5)
DEFINITION = (
    "SELECT pg_get_functiondef(oid) AS text FROM pg_proc WHERE proname = %s AND pronamespace = %s::regnamespace"
)


def changed(function: str, before: str, after: str) -> Callable[[Database], None]:
    """A change in a function of the schema, after which all search texts are made anew."""

    def change(database: Database) -> None:
        with database.connection(300) as connection:
            schema = connection.execute("SELECT current_schema() AS name").fetchone()
            assert schema is not None
            row = connection.execute(DEFINITION, [function, schema["name"]]).fetchone()
            assert row is not None
            assert before in row["text"], row["text"]
            connection.execute(row["text"].replace(before, after).encode())
            for each in connection.execute("SELECT id FROM subagents").fetchall():
                refresh_search(connection, each["id"])
        Statistics(database).count()

    return change


def with_constant(name: str, value: float) -> Callable[[Database], None]:
    return lambda _: setattr(shortlist, name, value)


IDEAS: dict[str, Callable[[Database], None]] = {
    "as built": lambda _: None,
    "words as they are written, no stemming": changed("searchable", "'english'", "'simple'"),
    "all words weigh the same (no idf)": with_constant("RARITY", 0.0),
    "no normalisation by length": with_constant("B", 0.0),
    "BM25's k1 of 1.2 in place of 2": with_constant("K1", 1.2),
    "idf as it is, not to the power of 1.25": with_constant("RARITY", 1.0),
    "without beginnings of words": with_constant("BEGINNING", 0.0),
    "beginnings of four letters in place of three": changed(
        "beginnings",
        "left(lexeme, 3) FROM unnest(words) WHERE length(lexeme) > 3",
        "left(lexeme, 4) FROM unnest(words) WHERE length(lexeme) > 4",
    ),
    "name once in place of three times": changed("findable", "n, n, n,", "n,"),
}


def measure(postgres: EmbeddedPostgres, material: Material, shots: int, change: Callable[[Database], None]) -> str:
    constants = {name: getattr(shortlist, name) for name in ("K1", "B", "RARITY", "BEGINNING")}
    try:
        with scratch(postgres.url, measured(material, shots)) as database:
            change(database)
            recall = evaluate(database, material).recall
    finally:
        for name, value in constants.items():
            setattr(shortlist, name, value)
    return f"{100 * recall[1]:.1f} / {100 * recall[20]:.1f}"


def main(file: Path) -> None:
    material = read_material(file)
    with tempfile.TemporaryDirectory(prefix="pokestrator-bench-", ignore_cleanup_errors=True) as folder:
        postgres = EmbeddedPostgres(Path(folder))
        try:
            for idea, change in IDEAS.items():
                found = [measure(postgres, material, shots, change) for shots in SHOTS]
                print(f"| {idea} | {' | '.join(found)} |", flush=True)
        finally:
            postgres.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
