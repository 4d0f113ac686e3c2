"""When words alone decide who a task is for."""

from __future__ import annotations

import math

import pytest

from pokestrator.certainty import certain
from pokestrator.store.shortlist import Candidate, Example, Shortlist
from pokestrator.subagents import State


def weight(among: int) -> float:
    """What a rare word weighs among so many subagents, roughly."""
    return float(0.8 * math.log(1 + 2 * among) ** 1.25)


def lexemes(text: str) -> frozenset[str]:
    return frozenset(text.lower().split())


def candidate(
    name: str, *tasks: str, about: str = "", score: float = 10.0, state: State | None = State.ACTIVE
) -> Candidate:
    examples = tuple(Example(task, lexemes(task)) for task in tasks)
    return Candidate(name, state, f"Does {about}", examples, score, lexemes(about))


def shortlist(task: str, *candidates: Candidate, among: int = 100) -> Shortlist:
    return Shortlist(candidates, dict.fromkeys(lexemes(task), weight(among)), among)


def decided(task: str, *candidates: Candidate, among: int = 100) -> str | None:
    found = certain(task, shortlist(task, *candidates, among=among))
    return found.candidate.name if found else None


# Alike -----------------------------------------------------------------------------------------------------------


def test_a_task_that_was_done_before_goes_where_it_went() -> None:
    done = candidate("egg_boiler", "Boil two eggs")
    assert decided("Boil two eggs", done, candidate("egg_painter", "Paint two eggs")) == "egg_boiler"
    assert decided("boil  TWO eggs!", done) == "egg_boiler"


def test_a_task_with_another_amount_is_nearly_equal() -> None:
    example = Example("Split 184.50 between 5 friends", lexemes("split friend"))
    splitter = Candidate("bill_splitter", State.ACTIVE, "Splits bills", (example,), 10.0, frozenset())
    found = certain("Split 20 between 3 friends", Shortlist((splitter,), {"split": 6.0, "friend": 6.0}, 10))
    assert found is not None
    assert found.reason == "it is nearly an example of bill_splitter"


def test_a_task_with_other_words_is_not_decided_in_a_small_catalog() -> None:
    assert decided("Boil two eggs", candidate("egg_boiler", "Boil many large eggs", score=4.0), among=6) is None


def test_the_same_lexemes_with_other_words_around_them_are_no_equal_task() -> None:
    example = Example("Book a table for tonight", lexemes("book tabl"))
    booker = Candidate("booker", State.ACTIVE, "Books tables", (example,), 5.0, frozenset())
    task = "Don't ever book any table there again, whatever I say"
    assert certain(task, Shortlist((booker,), dict.fromkeys(("book", "tabl"), weight(6)), 6)) is None


def test_what_two_have_done_nearly_alike_is_not_decided_but_word_for_word_is() -> None:
    one, other = candidate("one", "boil two brown eggs now"), candidate("other", "boil two white eggs now")
    assert decided("boil two fresh eggs now", one, other) is None
    assert decided("boil two white eggs now", one, other) == "other"


def test_of_a_stored_one_and_a_template_with_the_same_example_the_stored_one_is_taken() -> None:
    stored, template = candidate("stored", "Boil two eggs"), candidate("template", "Boil two eggs", state=None)
    assert decided("Boil two eggs", stored, template) == "stored"
    assert decided("Boil two eggs", template, stored) == "stored"


@pytest.mark.parametrize("state", [State.ACTIVE, State.PROBATION, None])
def test_of_two_that_have_done_the_very_task_words_choose_neither(state: State | None) -> None:
    first = candidate("first", "Boil two eggs", score=90.0, state=state and State.ACTIVE)
    assert decided("Boil two eggs", first, candidate("second", "Boil two eggs", state=state)) is None
    assert decided("Boil two eggs", candidate("second", "Boil two eggs", state=state), first) is None


@pytest.mark.parametrize(
    ("example", "task"),
    [
        ("Remind me to water the plants", "Don't remind me to water the plants"),
        ("Remind me to water the plants", "Never remind me to water the plants"),
        (
            "Erinnere mich morgen früh an die Blumen im Garten",
            "Erinnere mich morgen früh nicht an die Blumen im Garten",
        ),
        ("Recuérdame regar todas las plantas", "No recuérdame regar todas las plantas"),
    ],
)
def test_what_differs_by_a_negation_is_not_nearly_equal(example: str, task: str) -> None:
    gardener = Candidate(
        "gardener", State.ACTIVE, "Reminds", (Example(example, frozenset(("plant",))),), 5.0, frozenset()
    )
    assert certain(task, Shortlist((gardener,), {"plant": weight(6)}, 6)) is None
    assert certain(example, Shortlist((gardener,), {"plant": weight(6)}, 6)) is not None


def test_what_shares_one_word_beside_other_amounts_is_not_nearly_equal() -> None:
    explainer = Candidate(
        "saver", State.ACTIVE, "", (Example("Explain 401k", lexemes("explain 401k")),), 5.0, frozenset()
    )
    assert certain("Explain 529", Shortlist((explainer,), {"explain": 1.0, "529": 1.0}, 6)) is None


def test_a_long_task_is_known_again_and_another_with_its_beginning_is_not() -> None:
    long = " ".join(f"word{number}" for number in range(200))
    reader = Candidate("reader", State.ACTIVE, "Reads", (Example(long[:300], lexemes(long)),), 5.0, frozenset())
    assert certain(long, Shortlist((reader,), dict.fromkeys(lexemes(long), 0.1), 6)) is not None
    other = long[:300] + " but" + " something else entirely" * 40
    assert certain(other, Shortlist((reader,), dict.fromkeys(lexemes(other), 0.1), 6)) is None


def test_vowel_signs_are_part_of_a_word() -> None:
    boy, girl = "लड़का", "लड़की"
    painter = Candidate("painter", State.ACTIVE, "", (Example(boy, frozenset([boy])),), 5.0, frozenset())
    assert certain(boy, Shortlist((painter,), {boy: 0.5}, 6)) is not None
    assert certain(girl, Shortlist((painter,), {girl: 0.5}, 6)) is None


# Far ahead -------------------------------------------------------------------------------------------------------


def test_the_best_is_taken_when_it_stands_far_above_the_next() -> None:
    task = "quokka census at rottnest"
    best = candidate("quokka_counter", about="quokka census rottnest island", score=40.0)
    assert decided(task, best, candidate("island_guide", about="rottnest ferry", score=6.0)) == "quokka_counter"
    assert decided(task, best, candidate("census_taker", about="quokka census rottnest", score=38.0)) is None


def test_among_few_the_best_must_know_half_of_the_task_too() -> None:
    best = candidate("quokka_counter", about="quokka census", score=60.0)
    task = "quokka census and a cake for twelve guests"
    assert decided(task, best, among=100) == "quokka_counter"
    assert decided(task, best, among=10) is None
    assert decided("quokka census now", best, among=10) == "quokka_counter"


def test_the_reason_names_the_words_and_the_margin() -> None:
    found = certain("quokka census", shortlist("quokka census", candidate("counter", about="quokka census", score=40)))
    assert found is not None
    assert "quokka" in found.reason
    assert f"{found.margin:.0f}" in found.reason


def test_among_many_more_is_needed() -> None:
    best = candidate("quokka_counter", about="quokka census rottnest", score=20.0)
    weights = dict.fromkeys(("quokka", "census"), weight(100))
    assert certain("quokka census", Shortlist((best,), weights, 100)) is not None
    assert certain("quokka census", Shortlist((best,), weights, 100_000)) is None


# Never -----------------------------------------------------------------------------------------------------------


def test_one_on_probation_is_never_taken_by_words() -> None:
    assert decided("Boil two eggs", candidate("egg_boiler", "Boil two eggs", state=State.PROBATION)) is None


@pytest.mark.parametrize("task", ["", "🦓🦓🦓", "12 34"])
def test_a_task_without_words_is_decided_for_nobody(task: str) -> None:
    assert certain(task, Shortlist((candidate("egg_boiler", "Boil two eggs"),), {}, 10)) is None
    assert certain(task, Shortlist((), {}, 0)) is None
