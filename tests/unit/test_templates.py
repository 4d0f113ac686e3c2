"""The loader of templates, and the templates we ship."""

from __future__ import annotations

import json
import os
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from pokestrator.store.templates import MAX_BYTES, TEMPLATES_FOLDER, TemplateProblem, load_templates
from pokestrator.subagents import Template


def definition(**changes: Any) -> dict[str, Any]:
    """A good template called `tide_clock`, with some fields exchanged; a field set to None is left out."""
    good = {
        "name": "tide_clock",
        "description": "Tells when high and low water come at a harbour.",
        "system_prompt": "Look up the tide table of the harbour and return the next high and low water.",
        "examples": ["when is high water in Dover"],
    }
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def write(folder: Path, content: object, name: str = "tide_clock.json") -> None:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(text)


def test_a_good_file_becomes_a_template_with_everything_it_says(tmp_path: Path) -> None:
    write(tmp_path, definition(tools=["Bash"], max_turns=7, credentials=["TIDE_KEY"], hosts=["api.tides.example.com"]))

    templates, problems = load_templates(tmp_path)

    assert problems == ()
    [template] = templates
    assert isinstance(template, Template)
    assert (template.name, template.tools, template.max_turns) == ("tide_clock", ("Bash",), 7)
    assert (template.credentials, template.hosts) == (("TIDE_KEY",), ("api.tides.example.com",))
    assert template.examples == ("when is high water in Dover",)


def test_templates_come_in_the_order_of_their_names_and_other_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("wind_gauge", "acorn_counter", "moon_phase"):
        write(tmp_path, definition(name=name), f"{name}.json")
    write(tmp_path, b"not for us", "README.md")

    templates, problems = load_templates(tmp_path)

    assert [template.name for template in templates] == ["acorn_counter", "moon_phase", "wind_gauge"]
    assert problems == ()


def test_a_broken_file_is_reported_and_does_not_cost_the_good_ones(tmp_path: Path) -> None:
    write(tmp_path, definition())
    write(tmp_path, b"{", "broken.json")

    templates, problems = load_templates(tmp_path)

    assert [template.name for template in templates] == ["tide_clock"]
    assert [problem.file for problem in problems] == ["broken.json"]


BROKEN = {
    "not JSON": (b"{'name': 1}", r"file: is not JSON \(.*line 1.*\)"),
    "empty": (b"", r"file: is not JSON \(.*\)"),
    "a list": ([definition()], r"file: must hold one JSON object"),
    "nested too deeply": (b"[" * 100_000, r"file: is nested too deeply|file: is not JSON .*"),
    "not UTF-8": (b'{"name": "\xff"}', r"file: is not UTF-8 \(byte 10\)"),
    "too large": (b" " * (MAX_BYTES + 1), r"file: is larger than 256 KB"),
    "a key twice": (b'{"name": "tide_clock", "name": "moon_phase"}', r"name: appears more than once"),
    "NaN": (b'{"max_budget_usd": NaN}', r"file: is not JSON \(NaN .*\)"),
    "a number with 5,000 digits": (b'{"max_turns": ' + b"9" * 5_000 + b"}", r"file: is not JSON \(.*\)"),
    "a missing field": (definition(system_prompt=None), r"system_prompt: Field required"),
    "an unknown field": (definition(temperature=1), r"temperature: Extra inputs are not permitted"),
    "a wrong type": (definition(examples="high water"), r"examples: .*"),
    "a tool outside the list": (definition(tools=["Bash", "Task"]), r"tools\.1: .*"),
    "a limit out of range": (definition(timeout_seconds=0), r"timeout_seconds: .*"),
    "a bad host": (definition(hosts=["https://example.com/"]), r"hosts\.0: .*"),
    "a bad name": (definition(name="Tide Clock"), r"name: .*"),
    "another name than its file's": (
        definition(name="moon_phase"),
        r"name: must be 'tide_clock', as the file is called",
    ),
    "a NUL": (definition(examples=["high\x00water"]), r"examples\.0: holds a NUL character \(U\+0000\)"),
    "a lone surrogate": (definition(description="\ud800" * 30), r"description: .*"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_breaks_a_rule_gives_one_problem_and_no_template(
    tmp_path: Path, content: object, reason: str
) -> None:
    write(tmp_path, content)

    templates, problems = load_templates(tmp_path)

    assert templates == ()
    [problem] = problems
    assert problem.file == "tide_clock.json"
    assert re.fullmatch(reason, problem.reason), problem.reason


def test_every_problem_of_a_file_is_reported(tmp_path: Path) -> None:
    write(tmp_path, definition(description=None, max_turns=0, colour="blue"))

    _, problems = load_templates(tmp_path)

    assert {problem.reason.split(":")[0] for problem in problems} == {"description", "max_turns", "colour"}
    assert {problem.file for problem in problems} == {"tide_clock.json"}


def test_a_name_that_another_file_carries_is_refused_where_it_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, definition())
    write(tmp_path, definition(), "copy_of_it.json")

    templates, problems = load_templates(tmp_path)

    assert [template.name for template in templates] == ["tide_clock"]
    assert problems == (
        TemplateProblem(
            "copy_of_it.json",
            "name: must be 'copy_of_it', as the file is called; 'tide_clock' is the name of tide_clock.json",
        ),
    )


def test_what_is_called_json_but_is_no_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "nowhere.json").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe.json")

    templates, problems = load_templates(tmp_path)

    assert templates == ()
    assert [problem.file for problem in problems] == ["folder.json", "nowhere.json", "pipe.json"]
    assert {problem.reason for problem in problems} == {"file: is not a regular file"}


def test_a_missing_folder_is_one_problem(tmp_path: Path) -> None:
    templates, problems = load_templates(tmp_path / "templates")

    assert templates == ()
    assert problems == (TemplateProblem("templates", "file: the folder cannot be read (No such file or directory)"),)


# The templates we ship


@pytest.fixture(scope="module")
def shipped() -> tuple[Template, ...]:
    templates, problems = load_templates(TEMPLATES_FOLDER)
    assert problems == ()
    return templates


def words(template: Template) -> set[str]:
    """What full-text search sees of a template."""
    text = " ".join([template.name.replace("_", " "), template.description, *template.examples])
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def test_six_templates_are_shipped_and_stripe_analyst_is_one(shipped: tuple[Template, ...]) -> None:
    assert [template.name for template in shipped] == [
        "github_reporter",
        "link_summarizer",
        "number_cruncher",
        "stripe_analyst",
        "weather_forecaster",
        "web_researcher",
    ]


def test_no_two_shipped_templates_share_an_example(shipped: tuple[Template, ...]) -> None:
    for one, other in combinations(shipped, 2):
        assert not {e.lower() for e in one.examples} & {e.lower() for e in other.examples}
    for template in shipped:
        assert 5 <= len(set(template.examples)) <= 8


def test_every_shipped_template_has_mostly_words_of_its_own(shipped: tuple[Template, ...]) -> None:
    for one in shipped:
        for other in shipped:
            if one is not other:
                long_words = {word for word in words(one) if len(word) > 4}
                assert len(long_words & words(other)) <= len(long_words) / 5, (one.name, other.name)


@pytest.mark.parametrize(
    "task",
    ["Invent a toast for my grandmother's 80th birthday", "Translate 'good morning' into Finnish", "Write a limerick"],
)
def test_no_shipped_template_uses_the_words_of_tasks_that_none_of_them_takes(
    shipped: tuple[Template, ...], task: str
) -> None:
    asked = {word for word in re.findall(r"[a-z0-9]+", task.lower()) if len(word) > 3} - {"into"}
    for template in shipped:
        assert not asked & words(template), template.name


def test_shipped_templates_set_limits_that_a_person_would_wait_and_pay_for(shipped: tuple[Template, ...]) -> None:
    for template in shipped:
        assert template.tools, template.name
        assert template.max_turns is not None and 3 <= template.max_turns <= 30, template.name
        assert template.timeout_seconds is not None and 30 <= template.timeout_seconds <= 240, template.name
        assert template.max_budget_usd is not None and template.max_budget_usd <= 1, template.name
        assert template.model is None, f"{template.name}: the model is the owner's choice, POKESTRATOR_MODEL"


def test_every_prompt_says_what_to_do_without_access_and_what_the_task_text_may_not_do(
    shipped: tuple[Template, ...],
) -> None:
    for template in shipped:
        prompt = template.system_prompt
        assert re.search(r"^(Access|No access)$", prompt, re.MULTILINE), template.name
        assert re.search(r"[Nn]ever (invent|estimate|give|sum|fill)", prompt), template.name
        assert "sent by a person as a text message" in prompt, template.name
        assert "plain text without Markdown" in prompt, template.name


def test_a_template_that_needs_a_credential_says_its_name_and_lists_the_host_it_goes_to(
    shipped: tuple[Template, ...],
) -> None:
    named = {t.name: {*t.credentials, *t.optional_credentials} for t in shipped}
    assert {name for name, credentials in named.items() if credentials} == {"github_reporter", "stripe_analyst"}
    for template in shipped:
        if not named[template.name]:
            continue
        assert all(f"${name}" in template.system_prompt for name in named[template.name])
        assert template.hosts and all(f"https://{host}" in template.system_prompt for host in template.hosts)


def test_only_what_cannot_be_done_without_a_credential_demands_it(shipped: tuple[Template, ...]) -> None:
    assert {t.name: t.credentials for t in shipped if t.credentials} == {"stripe_analyst": ("STRIPE_API_KEY",)}
    github = next(template for template in shipped if template.name == "github_reporter")
    assert github.optional_credentials == ("GITHUB_TOKEN",)
    assert "Without a token, public repositories still work" in github.system_prompt
