"""How well tasks find their subagents, on tasks that people wrote, where that data lies beside the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from pokestrator.evaluation import Figures, evaluate, measured, read_material
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.scratch import Measured, scratch
from tests.integration.flow import rows

FILE = Path(__file__).resolve().parents[3] / "shared" / "routing" / "toole_dev.json"

# Plain BM25 on stemmed words, and what a rule by margins can decide, on this file.
FLOORS = {0: (0.57, 0.75, 0.82, 0.82), 1: (0.61, 0.79, 0.89, 0.90), 5: (0.71, 0.87, 0.94, 0.955)}


@pytest.fixture(scope="module", params=FLOORS)
def figures(request: pytest.FixtureRequest, postgres: EmbeddedPostgres) -> tuple[int, Figures]:
    if not FILE.exists():
        pytest.skip(f"{FILE.name} is not beside the checkout")
    material = read_material(FILE)
    with scratch(postgres.url, measured(material, request.param)) as database:
        return request.param, evaluate(database, material)


def test_the_right_one_is_found_at_least_as_often_as_by_plain_bm25(figures: tuple[int, Figures]) -> None:
    shots, found = figures
    assert all(share >= floor for share, floor in zip(found.recall.values(), FLOORS[shots], strict=True)), found


def test_what_is_decided_without_a_model_is_right_and_hardly_ever_a_false_match(figures: tuple[int, Figures]) -> None:
    shots, found = figures
    assert found.precision is not None
    assert found.precision >= 0.98
    assert found.false_matches is not None
    assert found.false_matches < 0.01
    assert found.share >= (0.29 if shots == 5 else 0.15)


def test_what_a_killed_measurement_left_is_removed_by_the_next_and_a_living_ones_is_not(database_url: str) -> None:
    rows(database_url, "CREATE SCHEMA pokestrator_measured_dead")
    rows(database_url, "CREATE TABLE pokestrator_measured_dead.subagents ()")
    with scratch(database_url, [Measured("sea_poet", "Writes poems.", ())]):
        [living] = measurements(database_url)
        assert living != "pokestrator_measured_dead"
        with scratch(database_url, ()):
            assert living in measurements(database_url)
    assert measurements(database_url) == []


def measurements(url: str) -> list[str]:
    """The schemas that are there for a measurement."""
    query = "SELECT nspname FROM pg_namespace WHERE starts_with(nspname, 'pokestrator_measured_')"
    return [row["nspname"] for row in rows(url, query)]
