"""The templates: subagents shipped as JSON files. A broken file is reported and skipped; the others work on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pokestrator.errors import InvalidDefinition
from pokestrator.subagents import Template, parse

TEMPLATES_FOLDER = Path(__file__).resolve().parents[2] / "templates"
MAX_BYTES = 256 * 1024


@dataclass(frozen=True)
class TemplateProblem:
    """One thing that is wrong with one file. `reason` is `field: why`; the field `file` is the file itself."""

    file: str
    reason: str


def load_templates(folder: Path) -> tuple[tuple[Template, ...], tuple[TemplateProblem, ...]]:
    """All good templates of `folder`, in the order of their names, and one problem for each thing that is wrong.

    A file with any problem gives no template. Never raises for what is in the folder, or for a folder that is missing.
    """
    templates: list[Template] = []
    problems: list[TemplateProblem] = []
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except OSError as error:
        return (), (TemplateProblem(folder.name, f"file: the folder cannot be read ({error.strerror})"),)
    for path in paths:
        try:
            templates.append(_load(path))
        except InvalidDefinition as error:
            problems.extend(TemplateProblem(path.name, reason) for reason in error.problems)
    return tuple(templates), tuple(problems)


def _load(path: Path) -> Template:
    template = parse(Template, read_object(path))
    problems = [*_name_problems(template, path), *_nul_problems(template)]
    if problems:
        raise InvalidDefinition(problems)
    return template


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises InvalidDefinition."""
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise InvalidDefinition(["file: is not a regular file"])
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidDefinition([f"file: cannot be read ({error.strerror})"]) from error
    return object_of(content)


def object_of(content: bytes) -> dict[str, Any]:
    """The JSON object that a file holds whose first MAX_BYTES + 1 bytes are `content`. Raises InvalidDefinition."""
    if len(content) > MAX_BYTES:
        raise InvalidDefinition([f"file: is larger than {MAX_BYTES // 1024} KB"])
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InvalidDefinition([f"file: is not UTF-8 (byte {error.start})"]) from error
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise InvalidDefinition(["file: is nested too deeply"]) from error
    except ValueError as error:  # JSONDecodeError, or a number with thousands of digits
        raise InvalidDefinition([f"file: is not JSON ({error})"]) from error
    if not isinstance(value, dict):
        raise InvalidDefinition(["file: must hold one JSON object"])
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise InvalidDefinition([f"{key}: appears more than once" for key in value if keys.count(key) > 1])
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _name_problems(template: Template, path: Path) -> list[str]:
    if template.name == path.stem:
        return []
    # Names are unique because file names are: each file carries its own.
    taken = (path.parent / f"{template.name}.json").exists()
    return [
        f"name: must be {path.stem!r}, as the file is called"
        + (f"; {template.name!r} is the name of {template.name}.json" if taken else "")
    ]


def _nul_problems(template: Template) -> list[str]:
    """PostgreSQL cannot store U+0000 in text."""
    texts = {"description": template.description, "system_prompt": template.system_prompt}
    texts |= {f"examples.{i}": example for i, example in enumerate(template.examples)}
    return [f"{field}: holds a NUL character (U+0000)" for field, text in texts.items() if "\x00" in text]
