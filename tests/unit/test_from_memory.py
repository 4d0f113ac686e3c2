"""Which template a task is for while the database is away, with the shipped templates."""

from __future__ import annotations

import pytest

from pokestrator.from_memory import template_for
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from pokestrator.subagents import Template

TEMPLATES, _ = load_templates(TEMPLATES_FOLDER)
OWN_EXAMPLES = [(template, example) for template in TEMPLATES for example in template.examples]


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
    assert template_for(task, TEMPLATES) is None


def test_every_templates_own_examples_come_to_it() -> None:
    taken = [template_for(example, TEMPLATES) for _, example in OWN_EXAMPLES]
    assert taken == [template for template, _ in OWN_EXAMPLES]


def test_an_example_that_the_template_does_not_list_goes_to_no_other_one() -> None:
    """Each example in turn is taken out of its template: what people write is never listed word for word."""
    taken = [template_for(example, _without(example, template)) for template, example in OWN_EXAMPLES]
    names = [(template.name, found.name) for (template, _), found in zip(OWN_EXAMPLES, taken, strict=True) if found]
    assert [pair for pair in names if pair[0] != pair[1]] == []
    assert names


def _without(example: str, template: Template) -> list[Template]:
    others = tuple(other for other in template.examples if other != example)
    return [each.model_copy(update={"examples": others}) if each is template else each for each in TEMPLATES]
