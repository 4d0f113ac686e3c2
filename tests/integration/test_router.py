"""The questions that the router puts, and what it makes of the answers, with subagents on real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pokestrator.jobs import Outcome, Route
from pokestrator.routing import Decision, Router
from pokestrator.runs import ErrorKind, RunRequest, RunResult, Usage
from pokestrator.store.pool import Database
from pokestrator.store.shortlist import SHORTLIST, Shortlists
from pokestrator.store.subagents import Subagents
from tests.integration.flow import draft, poet
from tests.integration.test_subagents_store import LONG_AGO

SPANISH = "Escribe unos versos"  # shares no word with anybody, nor the beginning of one
ENGLISH = "Write a poem"


class Claude:
    """Answers one question after the other with `answers`, and keeps what it was asked."""

    def __init__(self, *answers: dict[str, Any] | RunResult) -> None:
        self._answers: Iterator[dict[str, Any] | RunResult] = iter(answers)
        self.asked: list[RunRequest] = []

    def __call__(self, request: RunRequest) -> RunResult:
        self.asked.append(request)
        answer = next(self._answers)
        if isinstance(answer, RunResult):
            return answer
        return RunResult(structured={"reason": "As told.", **answer}, usage=Usage(cost_usd=0.01))

    def shown(self, number: int = -1) -> list[str]:
        """The names that a question showed."""
        schema = self.asked[number].output_schema
        assert schema is not None
        return [name for name in schema["properties"]["subagent"]["enum"] if name]


@pytest.fixture
def router(database: Database) -> Router:
    return Router(Shortlists(database), (poet(),), "haiku")


@pytest.fixture
def clerks(subagents: Subagents) -> None:
    """More than can be shown."""
    for number in range(SHORTLIST + 1):
        clerk = draft(f"clerk_{number}", description=f"Files the paper number {number} of the archive.")
        subagents.build(clerk, f"File paper {number}", since=LONG_AGO)


def decided(router: Router, task: str, claude: Claude) -> Decision:
    decision = router.decide(task, "", claude)
    assert isinstance(decision, Decision), decision
    return decision


def test_where_there_is_nobody_nobody_is_asked(database: Database) -> None:
    decision = decided(Router(Shortlists(database), (), "haiku"), ENGLISH, Claude())
    assert (decision.route, decision.decided_by, decision.usage) == (Route.BUILD_NEW, "nobody", Usage())


@pytest.mark.usefixtures("clerks")
def test_of_many_no_more_than_the_shortlist_are_shown(router: Router) -> None:
    claude = Claude({"subagent": None})
    decided(router, "File my paper boat", claude)
    assert len(claude.shown()) == SHORTLIST


def test_one_that_shares_no_word_is_shown_where_all_can_be(router: Router) -> None:
    claude = Claude({"subagent": "sea_poet"})
    decision = decided(router, SPANISH, claude)
    assert (decision.route, decision.name, claude.shown()) == (Route.TEMPLATE, "sea_poet", ["sea_poet"])
    assert [(each.name, each.score) for each in decision.candidates] == [("sea_poet", 0)]


@pytest.mark.usefixtures("clerks")
def test_a_task_in_another_language_that_nobody_shares_a_word_with_is_looked_for_in_english(router: Router) -> None:
    claude = Claude({"subagent": None, "in_english": f"{ENGLISH}\x00 \ud83d"}, {"subagent": "sea_poet"})
    decision = decided(router, SPANISH, claude)
    assert (claude.shown(0), claude.shown(1)) == ([], ["sea_poet"])
    assert (decision.route, decision.name, decision.decided_by) == (Route.TEMPLATE, "sea_poet", "claude")
    assert decision.usage.cost_usd == pytest.approx(0.02)
    assert SPANISH in claude.asked[1].prompt


@pytest.mark.usefixtures("clerks")
@pytest.mark.parametrize("in_english", ["Zeppelin", "", None])
def test_where_english_finds_nobody_else_the_first_answer_counts(router: Router, in_english: str | None) -> None:
    claude = Claude({"subagent": None, "in_english": in_english})
    decision = decided(router, SPANISH, claude)
    assert (decision.route, decision.decided_by, decision.reason) == (Route.BUILD_NEW, "claude", "As told.")
    assert decision.usage.cost_usd == pytest.approx(0.01)


@pytest.mark.usefixtures("clerks")
def test_a_second_question_that_cannot_be_put_leaves_no_decision_and_the_first_is_paid_for(router: Router) -> None:
    late = RunResult(error=ErrorKind.TIMEOUT, detail="late", usage=Usage(cost_usd=0.002))
    outcome = router.decide(SPANISH, "", Claude({"subagent": None, "in_english": ENGLISH}, late))
    assert isinstance(outcome, Outcome)
    assert (outcome.error, outcome.is_transient) == (ErrorKind.TIMEOUT, True)
    assert outcome.usage.cost_usd == pytest.approx(0.012)


def test_the_examples_that_are_shown_are_those_nearest_to_the_task(router: Router, subagents: Subagents) -> None:
    examples = [f"Water the {plant} in the yard" for plant in ("roses", "tulips", "beans", "palm", "cactus")]
    subagents.build(draft("gardener", examples=examples), examples[0], since=LONG_AGO)
    for plant in ("palm", "cactus"):
        claude = Claude({"subagent": None})
        decided(router, f"Does my {plant} want water, and how much of it?", claude)
        lines = claude.asked[0].prompt.partition("gardener: ")[2].splitlines()
        assert lines[1] == f"   - Water the {plant} in the yard"


def test_one_on_probation_is_asked_about_even_where_it_has_done_the_very_task(
    router: Router, subagents: Subagents
) -> None:
    subagents.build(draft("gardener"), "Water the roses", since=LONG_AGO)
    refused = decided(router, "Water the roses", Claude({"subagent": None}))
    confirmed = decided(router, "Water the roses", Claude({"subagent": "gardener"}))
    assert (refused.route, confirmed.route) == (Route.BUILD_NEW, Route.MATCH)
