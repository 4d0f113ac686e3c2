"""Subagents as text: what is exported can be taken in, what is edited says what it said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pokestrator.errors import InvalidDefinition
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates, object_of
from pokestrator.subagent_files import as_json, document_of, form_of, read_file, read_form, template_file_of
from pokestrator.subagents import Definition

SHIPPED, _ = load_templates(TEMPLATES_FOLDER)
PROMPT = 'You write poems about the sea.\n\n  Four lines, "quoted", and C:\\paths; # no comment\nmodel: null'
POET = Definition(description="Writes short poems about the sea.", system_prompt=PROMPT, tools=("Bash",), max_turns=5)
FORM = form_of("sea_poet", 3, POET)


@pytest.mark.parametrize("template", SHIPPED, ids=lambda template: template.name)
def test_shipped_templates_come_back_from_every_form_as_they_were(template, tmp_path: Path) -> None:
    definition = template.definition()
    assert read_form(form_of(template.name, 1, definition)) == (1, definition)
    for make in (document_of, template_file_of):
        text = as_json(make(template.name, definition, template.examples))
        assert read_file(object_of(text.encode())) == (template.name, definition, template.examples)
    (tmp_path / f"{template.name}.json").write_text(text, encoding="utf-8")
    assert load_templates(tmp_path) == ((template,), ())


def test_the_prompt_is_edited_as_plain_lines() -> None:
    assert FORM.endswith(f"\n--- system prompt ---\n{PROMPT}\n")
    assert 'tools: ["Bash"]\nmodel: null\nmax_turns: 5\n' in FORM
    assert read_form(FORM) == (3, POET)
    assert read_form(FORM.replace("\n", "\r\n")) == (3, POET)


def test_what_is_edited_is_read() -> None:
    changed = FORM.replace("max_turns: 5", "# fewer\nmax_turns: null").replace('["Bash"]', '["Bash", "Read"]')
    changed = changed.replace("about the sea.\n\n---", "about the sea,\nand of lakes.\n\n---").replace("Four", "Five")
    _, definition = read_form(changed)
    assert (definition.max_turns, definition.tools) == (None, ("Bash", "Read"))
    assert definition.description == "Writes short poems about the sea,\nand of lakes."
    assert definition.system_prompt == PROMPT.replace("Four", "Five")


def test_texts_that_look_like_headings_do_not_end_the_text_they_are_in() -> None:
    heading = "--- system prompt ---"
    odd = Definition(
        description=f"Writes of\n--- description ---\n{heading}\n---- system prompt ---- headings.",
        system_prompt=f"{heading}\nYou write headings, as many as are wanted.\n{heading}",
    )
    assert read_form(form_of("odd_one", 1, odd)) == (1, odd)
    # What is added to the prompt later may hold any line, too.
    _, definition = read_form(f"{FORM}{heading}\nmore\n")
    assert definition.system_prompt == f"{PROMPT}\n{heading}\nmore"


BROKEN = {
    "no heading": (FORM.replace("--- system prompt ---", ""), ["system_prompt: the line above it"]),
    "nothing": ("", ["description: the line above it"]),
    "no version": (FORM.replace("version: 3\n", ""), ["version: must be the number"]),
    "no JSON": (FORM.replace('["Bash"]', "Bash"), ["tools: is not JSON"]),
    "no field": (FORM.replace("tools:", "tool:"), ["tool: is no field"]),
    "twice": (FORM.replace("max_turns: 5", "max_turns: 5\nmax_turns: 6"), ["max_turns: appears more than once"]),
    "two mistakes": (
        FORM.replace("max_turns: 5", "max_turns: 500").replace('["Bash"]', '["Task"]'),
        ["tools.0: ", "max_turns: "],
    ),
}


@pytest.mark.parametrize(("text", "problems"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_in_a_form_names_its_field(text: str, problems: list[str]) -> None:
    with pytest.raises(InvalidDefinition) as caught:
        read_form(text)
    found = caught.value.problems
    assert len(found) == len(problems)
    assert all(each.startswith(problem) for each, problem in zip(found, problems, strict=True)), found


def test_a_file_of_another_format_is_refused() -> None:
    with pytest.raises(InvalidDefinition, match=r"format: .*pokestrator-subagent-1"):
        read_file({**document_of("sea_poet", POET, ()), "format": "pokestrator-subagent-2"})


def test_json_for_people_holds_nothing_that_a_terminal_obeys() -> None:
    said = "é 漢 \x1b[2J \x7f \x9b31m \u202e \U000e0041"
    text = as_json({"said": said})
    assert "é 漢 \\u001b[2J \\u007f \\u009b31m \\u202e " in text
    assert json.loads(text) == {"said": said}
