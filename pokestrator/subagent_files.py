"""A subagent as text: the file that it is moved by, a template's file, and what the owner edits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pokestrator.errors import InvalidDefinition
from pokestrator.subagents import MAX_EXAMPLES, Definition, Name, Template, Text, parse

FORMAT = "pokestrator-subagent-1"
LONG = ("description", "system_prompt")  # texts, which are edited as they are
SHORT = tuple(name for name in Definition.model_fields if name not in LONG)

HELP = """\
# {name}, made from version {version}. Lines that begin with # are not read up to the description.
# Each value is JSON; null: not set. Save and leave to store a new version, leave without saving to change nothing.
"""

# JSON may hold them as they are, and a terminal would obey them or show something else than is there.
_RAW = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


class Document(BaseModel):
    """The file that a subagent is moved by."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["pokestrator-subagent-1"]
    name: Name
    definition: Definition
    examples: Annotated[tuple[Text, ...], Field(max_length=MAX_EXAMPLES)] = ()


def document_of(name: str, definition: Definition, examples: Sequence[str]) -> dict[str, Any]:
    """The object of a Document's file."""
    said = definition.model_dump(mode="json", include=set(Definition.model_fields))
    return {"format": FORMAT, "name": name, "definition": said, "examples": list(examples)}


def template_file_of(name: str, definition: Definition, examples: Sequence[str]) -> dict[str, Any]:
    """The object of a template's file; what is not set is left out."""
    said = definition.model_dump(mode="json", include=set(Definition.model_fields))
    texts = {field: said.pop(field) for field in LONG}
    return {"name": name, **texts, "examples": list(examples), **{field: each for field, each in said.items() if each}}


def read_file(value: Mapping[str, Any]) -> tuple[str, Definition, tuple[str, ...]]:
    """Name, definition and examples from a file of either form. Raises InvalidDefinition."""
    if "format" in value:
        document = parse(Document, value)
        return document.name, document.definition, document.examples
    template = parse(Template, value)
    return template.name, template.definition(), template.examples


def as_json(value: object) -> str:
    """JSON for people and terminals: readable, in any language, and without what a terminal would obey."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return _RAW.sub(lambda found: json.dumps(found[0])[1:-1], text)


# What the owner edits ------------------------------------------------------------------------------------------------


def form_of(name: str, version: int, definition: Definition) -> str:
    """A definition as the owner edits it."""
    return f"{HELP.format(name=name, version=version)}version: {version}\n{plain_text_of(definition)}"


def plain_text_of(definition: Definition) -> str:
    """A definition as text: a line for each short value, then the long ones as they are, each under its heading."""
    said = definition.model_dump(mode="json")
    lines = [f"{field}: {json.dumps(said[field], ensure_ascii=False)}" for field in SHORT]
    rule = "---"
    while any(line.startswith(f"{rule} ") for field in LONG for line in said[field].split("\n")):
        rule += "-"  # a heading must be a line that is in neither text
    for field in LONG:
        lines += ["", _heading(rule, field), said[field]]
    return "\n".join(lines) + "\n"


def read_form(text: str) -> tuple[int, Definition]:
    """The version that an edited form was made from, and the definition in it. Raises InvalidDefinition."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    first = re.search(r"^(-{3,}) description \1[ \t]*$", text, re.MULTILINE)
    rule = first[1] if first else "---"
    parts = []
    for field in LONG:
        heading = _heading(rule, field)
        before, *after = re.split(rf"^{heading}[ \t]*$", text, maxsplit=1, flags=re.MULTILINE)
        if not after:
            raise InvalidDefinition([f"{field}: the line above it, {heading!r}, is missing; put it back"])
        parts.append(before)
        [text] = after
    head, *long = [*parts, text]
    short, problems = _short_values(head)
    version = short.pop("version", None)
    if type(version) is not int:
        problems.append("version: must be the number of the version that this was made from")
    if problems:
        raise InvalidDefinition(problems)
    return int(version or 0), parse(Definition, {**dict(zip(LONG, long, strict=True)), **short})


def _heading(rule: str, field: str) -> str:
    return f"{rule} {field.replace('_', ' ')} {rule}"


def _short_values(head: str) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems = []
    for line in head.split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        field, _, said = line.partition(":")
        field = field.strip()
        if field not in (*SHORT, "version"):
            problems.append(f"{field[:40]}: is no field; each line above the description is one: value")
        elif field in values:
            problems.append(f"{field}: appears more than once")
        else:
            try:
                values[field] = json.loads(said)
            except (ValueError, RecursionError) as error:
                problems.append(f"{field}: is not JSON ({error})")
    return {field: value for field, value in values.items() if value is not None}, problems
