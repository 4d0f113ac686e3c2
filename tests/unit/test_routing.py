"""Which road a task takes, given what the search found."""

from __future__ import annotations

import pytest

from pokestrator.jobs import Route
from pokestrator.routing import ASKING, CLEAR, FEWEST_SHARED, MARGIN, decide, decide_from_memory, score
from pokestrator.store.shortlist import Candidate
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from pokestrator.subagents import Template

WORDS = ("boil", "chicken", "duck", "egg", "goose", "hen", "ostrich", "quail", "swan", "turkey")
TEMPLATES, _ = load_templates(TEMPLATES_FOLDER)
OWN_EXAMPLES = [(template, example) for template in TEMPLATES for example in template.examples]


def candidate(
    name: str = "egg_boiler", *, covers: int = 0, similarity: float = 0.0, is_stored: bool = True
) -> Candidate:
    """One that knows `covers` of the task's ten words."""
    return Candidate(name, is_stored, WORDS, WORDS[:covers], similarity)


# Scores ----------------------------------------------------------------------------------------------------------


def test_a_score_grows_with_the_words_that_are_covered() -> None:
    scores = [score(candidate(covers=covers)) for covers in range(len(WORDS) + 1)]
    assert scores == sorted(scores)
    assert scores[0] == 0
    assert CLEAR < scores[-1] < 1


def test_fewer_words_than_the_fewest_count_for_nothing() -> None:
    for shared in range(FEWEST_SHARED):
        words = WORDS[:shared]
        assert score(Candidate("egg_boiler", True, words, words, 0.0)) == 0
    assert score(Candidate("egg_boiler", True, WORDS[:FEWEST_SHARED], WORDS[:FEWEST_SHARED], 0.0)) >= CLEAR


def test_the_most_similar_example_counts_when_it_says_more() -> None:
    assert score(candidate(covers=2, similarity=0.7)) == 0.7
    assert score(candidate(covers=10, similarity=0.1)) > 0.7


def test_words_that_only_ask_count_neither_for_nor_against() -> None:
    asking = tuple(sorted(ASKING))[:5]
    plain = candidate(covers=5)
    assert score(Candidate("a", True, WORDS + asking, WORDS[:5], 0.0)) == score(plain)
    assert score(Candidate("a", True, WORDS + asking, WORDS[:5] + asking, 0.0)) == score(plain)
    assert score(Candidate("a", True, asking, asking, 0.0)) == 0


def test_a_task_without_words_scores_nothing() -> None:
    assert score(Candidate("a", True, (), (), 0.0)) == 0


# Decisions -------------------------------------------------------------------------------------------------------


def test_without_candidates_a_subagent_is_built() -> None:
    decision = decide([])
    assert (decision.route, decision.name) == (Route.BUILD_NEW, None)
    assert "shares a word" in decision.reason


def test_one_that_is_merely_near_is_named_and_not_taken() -> None:
    decision = decide([candidate("duck_feeder", covers=2)])
    assert (decision.route, decision.name) == (Route.BUILD_NEW, None)
    assert "duck_feeder at 0.18" in decision.reason


@pytest.mark.parametrize(("is_stored", "route"), [(True, Route.MATCH), (False, Route.TEMPLATE)])
def test_a_clear_one_is_taken_whether_stored_or_a_template(is_stored: bool, route: Route) -> None:
    near = candidate("duck_feeder", covers=3)
    decision = decide([near, candidate("egg_boiler", covers=9, is_stored=is_stored)])
    assert (decision.route, decision.name) == (route, "egg_boiler")
    assert "boil, chicken" in decision.reason


def test_two_that_are_close_are_both_named_and_neither_is_taken() -> None:
    decision = decide([candidate("egg_boiler", covers=9), candidate("egg_painter", covers=8)])
    assert (decision.route, decision.name) == (Route.BUILD_NEW, None)
    assert "egg_boiler" in decision.reason
    assert "egg_painter" in decision.reason


def test_one_that_stands_clear_of_the_next_is_taken() -> None:
    first, second = candidate("egg_boiler", similarity=0.9), candidate("egg_painter", similarity=0.9 - MARGIN - 0.01)
    assert decide([second, first]).name == "egg_boiler"
    assert decide([first, candidate("egg_painter", similarity=0.9 - MARGIN + 0.01)]).route is Route.BUILD_NEW


def test_between_a_stored_one_and_an_equal_template_the_stored_one_wins() -> None:
    template = candidate("a_template", covers=9, is_stored=False)
    decision = decide([template, candidate("z_stored", covers=9)])
    assert (decision.route, decision.name) == (Route.MATCH, "z_stored")


def test_two_equal_stored_ones_are_too_close_to_call() -> None:
    assert decide([candidate("one", covers=9), candidate("other", covers=9)]).route is Route.BUILD_NEW
    templates = [candidate(name, covers=9, is_stored=False) for name in ("one", "other")]
    assert decide(templates).route is Route.BUILD_NEW


def test_an_example_word_for_word_is_taken_whatever_comes_close() -> None:
    decision = decide([candidate("rival", covers=10), candidate("knows_it", similarity=1.0)])
    assert (decision.route, decision.name) == (Route.MATCH, "knows_it")


def test_the_decision_does_not_depend_on_the_order_of_the_candidates() -> None:
    candidates = [candidate(f"c{n}", covers=n, is_stored=bool(n % 2)) for n in range(10)]
    assert decide(candidates) == decide(candidates[::-1])


# From memory, with the shipped templates ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        "Write a limerick about zebra stripes",
        "Invent a toast for my grandmother's 80th birthday: she loves sailing and bad puns",
        "weather",
        "stripe",
        "hi",
        "",
        "🦓🦓🦓",
        "Please show me, tell me, give me, find me",
        "DROP TABLE jobs",
    ],
)
def test_a_task_that_no_template_fits_is_given_to_none(task: str) -> None:
    decision = decide_from_memory(task, TEMPLATES)
    assert (decision.route, decision.name) == (Route.BUILD_NEW, None)


def test_every_templates_own_examples_come_to_it() -> None:
    roads = [decide_from_memory(example, TEMPLATES) for _, example in OWN_EXAMPLES]
    wrong = [
        (example, road.name)
        for (template, example), road in zip(OWN_EXAMPLES, roads, strict=True)
        if road.name not in (template.name, None)
    ]
    found = sum(road.name is not None for road in roads)
    print(f"{found} of {len(roads)} examples come to their own template")
    assert wrong == []
    assert found / len(roads) >= 0.9


def test_an_example_that_the_template_does_not_list_goes_to_no_other_one() -> None:
    """Each example in turn is taken out of its template: what people write is never listed word for word."""
    found, wrong = 0, []
    for template, example in OWN_EXAMPLES:
        name = decide_from_memory(example, _without(example, template)).name
        found += name == template.name
        if name not in (template.name, None):
            wrong.append((example, name))
    print(f"{found} of {len(OWN_EXAMPLES)} unlisted examples come to their own template")
    assert wrong == []


def _without(example: str, template: Template) -> list[Template]:
    others = tuple(other for other in template.examples if other != example)
    return [each.model_copy(update={"examples": others}) if each is template else each for each in TEMPLATES]
