"""How well tasks find their subagents: measured on a file of subagents, their tasks, and tasks that nothing fits."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, field_validator

from pokestrator.certainty import certain
from pokestrator.errors import InvalidDefinition
from pokestrator.store.pool import Database
from pokestrator.store.scratch import Measured
from pokestrator.store.shortlist import Shortlists

RECALL_AT = (1, 5, 20, 32)


class Known(BaseModel):
    """A subagent in the file; its name may be in any form."""

    name: str = Field(min_length=1)
    description: str
    examples: tuple[str, ...] = ()


class Case(BaseModel):
    """A task, and the name of the subagent that it is for; None: of none."""

    task: str = Field(min_length=1)
    expect: str | None = None


class Material(BaseModel):
    """The file."""

    subagents: tuple[Known, ...] = Field(min_length=1)
    cases: tuple[Case, ...] = Field(min_length=1)
    nothing_fits: tuple[Case, ...] = ()

    @field_validator("nothing_fits", mode="before")
    @classmethod
    def _tasks_alone_will_do(cls, value: Any) -> Any:
        return (
            [{"task": each} if isinstance(each, str) else each for each in value] if isinstance(value, list) else value
        )


@dataclass(frozen=True)
class Figures:
    """What was measured. Shares are from 0 to 1; None where there was nothing to measure."""

    recall: dict[int, float]  # of the shortlist's first so many
    share: float  # of the cases that were decided without a model
    precision: float | None  # of those, how many rightly
    false_matches: float | None  # of the tasks that nothing fits, how many were decided for some subagent all the same
    p50: float  # milliseconds
    p95: float

    def as_json(self) -> dict[str, Any]:
        return {
            "recall": {str(at): round(share, 4) for at, share in self.recall.items()},
            "certain": {
                "share": round(self.share, 4),
                "precision": None if self.precision is None else round(self.precision, 4),
                "false_matches": None if self.false_matches is None else round(self.false_matches, 4),
            },
            "milliseconds": {"p50": round(self.p50, 2), "p95": round(self.p95, 2)},
        }


def read_material(path: Path) -> Material:
    """The file's content. Raises InvalidDefinition with one `field: reason` a problem."""
    try:
        material = Material.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            problems = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()]
        else:
            problems = [f"file: {error}"]
        raise InvalidDefinition(problems[:20]) from error
    names = [each.name for each in material.subagents]
    problems = [f"subagents: {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    unknown = sorted({str(case.expect) for case in material.cases} - set(names))
    problems += [f"cases: {name} is expected, and is no subagent of the file" for name in unknown]
    if problems:
        raise InvalidDefinition(problems[:20])
    return material


def stored_names(material: Material) -> dict[str, str]:
    """For each name in the file, the name it is stored under: its words in snake_case."""
    given: dict[str, str] = {}
    for each in material.subagents:
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", each.name)
        name = re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")[:40]
        name = name if re.match(r"[a-z][a-z0-9_]{2}", name) else f"the_{name}".rstrip("_")
        taken = set(given.values())
        given[each.name] = next(
            form for form in (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3))) if form not in taken
        )
    return given


def measured(material: Material, shots: int) -> list[Measured]:
    """The file's subagents with the first `shots` of their examples each."""
    names = stored_names(material)
    return [Measured(names[each.name], each.description, each.examples[:shots]) for each in material.subagents]


def evaluate(database: Database, material: Material) -> Figures:
    """Look for every task's subagent. `database` holds `measured` subagents. Raises StoreUnavailable."""
    names, shortlists = stored_names(material), Shortlists(database)
    found: list[list[str]] = []
    decided: list[str | None] = []
    milliseconds: list[float] = []
    for case in (*material.cases, *material.nothing_fits):
        started = time.perf_counter()
        shortlist = shortlists.find(case.task, ())
        sure = certain(case.task, shortlist)
        milliseconds.append(1000 * (time.perf_counter() - started))
        found.append([candidate.name for candidate in shortlist.candidates])
        decided.append(sure.candidate.name if sure else None)
    expected = [names[str(case.expect)] for case in material.cases]
    right = [name == decision for name, decision in zip(expected, decided, strict=False) if decision]
    false = [decision is not None for decision in decided[len(expected) :]]
    return Figures(
        recall={
            at: _share([name in list_[:at] for name, list_ in zip(expected, found, strict=False)]) for at in RECALL_AT
        },
        share=len(right) / len(expected),
        precision=_share(right) if right else None,
        false_matches=_share(false) if false else None,
        p50=statistics.median(milliseconds),
        p95=sorted(milliseconds)[math.ceil(0.95 * len(milliseconds)) - 1],
    )


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
