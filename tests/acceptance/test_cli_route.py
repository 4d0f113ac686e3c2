"""`python -m pokestrator route`, as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_cli import Environment, pokestrator
from tests.integration.flow import rows

OWN_EXAMPLE = "will it rain in Lisbon tomorrow afternoon?"
MATERIAL: dict[str, Any] = {
    "subagents": [
        {"name": "TeaBrewer", "description": "Brews tea.", "examples": ["A pot of green tea", "Steep oolong leaves"]},
        {"name": "KnotTier", "description": "Ties knots in ropes.", "examples": ["Tie a bowline", "Splice two ropes"]},
    ],
    "cases": [{"task": "A pot of green tea", "expect": "TeaBrewer"}, {"task": "Which rope?", "expect": "KnotTier"}],
    "nothing_fits": [{"task": "Paint my fence"}, {"task": "Feed the cat"}],
}


@pytest.fixture
def environment(service_environment: Environment) -> Environment:
    return service_environment


def test_a_clear_task_is_decided_by_words_and_nothing_is_run(environment: Environment, database_url: str) -> None:
    shown = pokestrator("route", OWN_EXAMPLE, environment=environment)
    assert shown.returncode == 0, shown.stderr
    assert "template  weather_forecaster" in shown.stdout
    assert "decided by words alone" in shown.stdout
    assert "it equals an example of weather_forecaster" in shown.stdout
    counted = rows(database_url, "SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM subagents) AS stored")
    assert counted == [{"stored": 0}]


def test_where_words_do_not_decide_claude_is_asked_or_it_is_said_that_it_would_be(environment: Environment) -> None:
    open_ = pokestrator("route", "--no-question", "--json", "Rain and knitting", environment=environment)
    decision = json.loads(open_.stdout)
    assert (decision["route"], decision["name"]) == (None, None)
    assert "Claude would be asked" in decision["reason"]
    asked = pokestrator("route", "--json", "Rain and knitting", environment=environment)
    decision = json.loads(asked.stdout)
    assert (decision["route"], decision["decided_by"]) == ("build_new", "claude")
    assert decision["reason"] == "None of them has done this very task."
    assert "weather_forecaster" in [each["name"] for each in decision["candidates"]]
    assert decision["milliseconds"] > 0


def test_without_a_key_it_is_said_what_is_missing(environment: Environment) -> None:
    keyless = {**environment, "ANTHROPIC_API_KEY": ""}
    asked = pokestrator("route", "Rain and knitting", environment=keyless)
    assert (asked.returncode, asked.stdout) == (1, "")
    assert "neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set" in asked.stderr
    assert pokestrator("route", OWN_EXAMPLE, environment=keyless).returncode == 0


def test_a_file_is_measured_and_the_owners_subagents_are_left_alone(
    environment: Environment, database_url: str, tmp_path: Path
) -> None:
    file = tmp_path / "material.json"
    file.write_text(json.dumps(MATERIAL))
    measured = pokestrator("route", "--eval", str(file), "--shots", "1", "--json", environment=environment)
    figures = json.loads(measured.stdout)
    assert figures["recall"] == {"1": 1.0, "5": 1.0, "20": 1.0, "32": 1.0}
    assert figures["certain"] == {"share": 0.5, "precision": 1.0, "false_matches": 0.0}
    assert figures["milliseconds"]["p95"] >= figures["milliseconds"]["p50"] > 0
    schemas = rows(database_url, "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'pokestrator%'")
    assert schemas == []
    assert rows(database_url, "SELECT count(*) AS stored FROM subagents") == [{"stored": 0}]
    table = pokestrator("route", "--eval", str(file), environment=environment)
    assert "recall at 32" in table.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cases": [{"task": "x", "expect": "Nobody"}]}, "Nobody is expected, and is no subagent"),
        ({"subagents": MATERIAL["subagents"] * 2}, "KnotTier is there twice"),
        ({"cases": []}, "cases"),
    ],
)
def test_a_file_that_cannot_be_measured_says_what_is_wrong(
    environment: Environment, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / "material.json"
    file.write_text(json.dumps({**MATERIAL, **change}))
    refused = pokestrator("route", "--eval", str(file), environment=environment)
    assert refused.returncode == 2
    assert words in refused.stderr
