"""The rules that templates, drafts and stored versions keep."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pokestrator.errors import InvalidDefinition
from pokestrator.subagents import Definition, Draft, Template, Tool, parse

DEFINITION: dict[str, Any] = {
    "description": "Counts sheep in photos of pastures.",
    "system_prompt": "You count the sheep that you are shown. Answer with one number.",
}
TEMPLATE: dict[str, Any] = {**DEFINITION, "name": "sheep_counter", "examples": ["how many sheep are there?"]}
DRAFT: dict[str, Any] = {**TEMPLATE, "examples": [f"how many sheep are on photo {number}?" for number in range(5)]}


def problems(model: type[BaseModel], /, **changes: object) -> tuple[str, ...]:
    base = TEMPLATE if model is Template else DRAFT if model is Draft else DEFINITION
    with pytest.raises(InvalidDefinition) as caught:
        parse(model, {**base, **changes})
    return caught.value.problems


def definition(**changes: object) -> Definition:
    return parse(Definition, {**DEFINITION, **changes})


@pytest.mark.parametrize("model", [Definition, Template, Draft])
def test_the_smallest_definition_has_no_tools_and_no_reach(model: type[BaseModel]) -> None:
    value = parse(model, {Definition: DEFINITION, Template: TEMPLATE, Draft: DRAFT}[model])
    assert value.tools == ()  # type: ignore[attr-defined]
    assert definition().hosts == definition().credentials == ()
    assert (definition().model, definition().timeout_seconds, definition().max_turns) == (None, None, None)


@pytest.mark.parametrize("model", [Template, Draft])
@pytest.mark.parametrize("field", ["name", "description", "system_prompt"])
def test_a_missing_field_is_named(model: type[BaseModel], field: str) -> None:
    with pytest.raises(InvalidDefinition) as caught:
        parse(model, {name: value for name, value in (DRAFT if model is Draft else TEMPLATE).items() if name != field})
    assert caught.value.problems == (f"{field}: Field required",)


@pytest.mark.parametrize("model", [Definition, Template, Draft])
def test_an_unknown_field_is_refused(model: type[BaseModel]) -> None:
    assert problems(model, permission_mode="bypass") == ("permission_mode: Extra inputs are not permitted",)


def test_all_problems_are_named_at_once() -> None:
    found = problems(Template, name="X", tools=["Sudo"], description="short")
    assert [problem.split(":")[0] for problem in found] == ["description", "tools.0", "name"]


@pytest.mark.parametrize("model", [Definition, Template, Draft])
@pytest.mark.parametrize("tool", ["bash", "Task", "mcp__x__y", "Bash(rm *)", "*", ""])
def test_a_tool_outside_the_list_is_refused(model: type[BaseModel], tool: str) -> None:
    (problem,) = problems(model, tools=["Read", tool])
    assert problem.startswith("tools.1: ")


def test_every_listed_tool_is_taken() -> None:
    tools = get_args(Tool)
    assert definition(tools=list(tools)).tools == tools


@pytest.mark.parametrize("name", ["abc", "a" * 48, "flight_price_watcher", "a1_", "x__2"])
def test_a_name_in_snake_case_is_taken(name: str) -> None:
    assert parse(Template, {**TEMPLATE, "name": name}).name == name


@pytest.mark.parametrize(
    "name",
    ["", "ab", "a" * 49, "Sheep", "sheep-counter", "sheep counter", "1sheep", "_sheep", "schäfer", "sheep\n", "../etc"],
)
@pytest.mark.parametrize("model", [Template, Draft])
def test_another_name_is_refused(model: type[BaseModel], name: str) -> None:
    (problem,) = problems(model, name=name)
    assert problem.startswith("name: ")


@pytest.mark.parametrize(("field", "shortest", "longest"), [("description", 20, 1_000), ("system_prompt", 40, 20_000)])
@pytest.mark.parametrize("model", [Definition, Draft])
def test_texts_have_a_shortest_and_a_longest_length(
    model: type[BaseModel], field: str, shortest: int, longest: int
) -> None:
    for length in (shortest, longest):
        value = parse(model, {**(DRAFT if model is Draft else DEFINITION), field: "x" * length})
        assert len(getattr(value, field)) == length
    for text in ("x" * (shortest - 1), "x" * (longest + 1), " " * (shortest + 5), "x" + " " * longest):
        (problem,) = problems(model, **{field: text})
        assert problem.startswith(f"{field}: ")


def test_blanks_around_texts_are_cut_off() -> None:
    assert definition(description=f"  {DEFINITION['description']}\n").description == DEFINITION["description"]


def test_a_draft_has_five_to_ten_examples() -> None:
    assert len(parse(Draft, {**DRAFT, "examples": ["count"] * 10}).examples) == 10
    for examples in ([], ["count"] * 4, ["count"] * 11):
        (problem,) = problems(Draft, examples=examples)
        assert problem.startswith("examples: ")


def test_examples_are_texts_of_up_to_2000_characters() -> None:
    assert parse(Template, {**TEMPLATE, "examples": ["x" * 2_000] * 50}).examples[0] == "x" * 2_000
    for bad in ("", "  ", "x" * 2_001, 3, None):
        (problem,) = problems(Template, examples=["fine", bad])
        assert problem.startswith("examples.1: ")
    assert problems(Template, examples=["x"] * 51)[0].startswith("examples: ")


@pytest.mark.parametrize("host", ["api.stripe.com", "*", "*.example.org", "a-b.example.co", "xn--bcher-kva.example"])
def test_a_host_is_a_name_or_all_names_below_one(host: str) -> None:
    assert definition(hosts=[host]).hosts == (host,)


@pytest.mark.parametrize(
    "host",
    [
        "**",
        "*.com",
        "a.*.com",
        "*example.com",
        "127.0.0.1",
        "10.0.0.1",
        "::1",
        "[::1]",
        "0x7f.0.0.1",
        "localhost",
        "Example.com",
        "API.STRIPE.COM",
        "example.com.",
        "-a.example.com",
        "a-.example.com",
        "a..com",
        "https://example.com",
        "example.com:443",
        "example.com/path",
        "example.com\n",
        "user@example.com",
        "exämple.com",
        "a." * 130 + "com",
    ],
)
def test_what_is_no_plain_lower_case_host_name_is_refused(host: str) -> None:
    (problem,) = problems(Definition, hosts=[host])
    assert problem.startswith("hosts.0: ")


def test_where_there_are_credentials_hosts_are_named() -> None:
    named = definition(hosts=["api.tides.example"], credentials=["TIDE_KEY"])
    assert named.hosts == ("api.tides.example",)
    (problem,) = problems(Definition, hosts=["*"], credentials=["TIDE_KEY"])
    assert "must be named" in problem


@pytest.mark.parametrize("host", ["*", "*.example.com", "localhost", "127.0.0.1"])
def test_a_draft_names_each_host_whole(host: str) -> None:
    assert parse(Draft, {**DRAFT, "hosts": ["api.example.com"]}).definition().hosts == ("api.example.com",)
    (problem,) = problems(Draft, hosts=[host])
    assert problem.startswith("hosts.0: ")


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("max_turns", [1, 100], [0, 101, -1, 1.5, "many"]),
        ("timeout_seconds", [5, 3_600], [4, 3_601]),
        ("max_budget_usd", [0.01, 100], [0, -1, 100.01, math.nan, math.inf]),
        ("model", ["sonnet", "claude-sonnet-4-5", "us.anthropic.claude:1", "opus[1m]"], ["", "-p", "a b", "x" * 101]),
        ("credentials", [["STRIPE_API_KEY"], []], [["stripe"], ["A"], ["1A"], ["A=B"], ["A\n"]]),
    ],
)
def test_limits_have_bounds(field: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert getattr(definition(**{field: value}), field) in (
            value,
            tuple(value) if isinstance(value, list) else value,
        )
    for value in bad:
        assert problems(Definition, **{field: value})[0].startswith(field)


# Digests ---------------------------------------------------------------------------------------------------------


def test_equal_definitions_have_one_digest_wherever_they_come_from() -> None:
    template = parse(Template, TEMPLATE)
    assert template.definition() == definition()
    spaced = definition(description=" " + DEFINITION["description"])
    assert template.definition().digest() == spaced.digest()
    assert parse(Draft, DRAFT).definition().digest() == definition().digest()


@pytest.mark.parametrize(
    "change",
    [
        {"description": "Counts sheep in pictures of pastures."},
        {"system_prompt": DEFINITION["system_prompt"] + " Be quick."},
        {"tools": ["Bash"]},
        {"model": "haiku"},
        {"max_turns": 3},
        {"timeout_seconds": 10},
        {"max_budget_usd": 0.5},
        {"credentials": ["SHEEP_KEY"]},
        {"hosts": ["example.com"]},
    ],
)
def test_any_change_changes_the_digest(change: dict[str, object]) -> None:
    assert definition(**change).digest() != definition().digest()


def test_a_templates_digest_tells_changed_examples_but_not_another_name() -> None:
    template = parse(Template, TEMPLATE)
    assert parse(Template, {**TEMPLATE, "name": "lamb_counter"}).digest() == template.digest()
    assert parse(Template, {**TEMPLATE, "examples": []}).digest() != template.digest()


# What Claude is held to ------------------------------------------------------------------------------------------


def test_the_schema_of_a_draft_is_one_plain_object() -> None:
    schema = Draft.model_json_schema()
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {
        *("name", "description", "system_prompt", "examples", "tools", "hosts", "widens")
    }
    assert set(schema["required"]) == {"name", "description", "system_prompt", "examples"}
    assert "$ref" not in str(schema)


def test_the_schema_of_a_draft_lists_every_tool_and_describes_every_field() -> None:
    properties = Draft.model_json_schema()["properties"]
    assert tuple(properties["tools"]["items"]["enum"]) == get_args(Tool)
    assert all(properties[name]["description"] for name in properties)
