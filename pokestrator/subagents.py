"""A subagent: a name, a description and a system prompt, with the limits its runs keep.

Templates, drafts and stored versions are all checked by the rules in this file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from pokestrator.credential_names import PATTERN as CREDENTIAL_PATTERN
from pokestrator.credential_names import check_credential_name
from pokestrator.errors import InvalidDefinition

# The ceiling: no template, draft or stored version can name a tool outside this list.
Tool = Literal["Bash", "Read", "Write", "Edit", "Glob", "Grep", "WebFetch", "WebSearch"]

NAME_PATTERN = r"^[a-z][a-z0-9_]{2,47}$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Hostname = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}$", max_length=253)]
ANY_HOST = "*"  # in `hosts`: every public one
HostPattern = Annotated[
    str, StringConstraints(pattern=r"^(\*|(\*\.)?([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,})$", max_length=253)
]
CredentialName = Annotated[str, StringConstraints(pattern=CREDENTIAL_PATTERN), AfterValidator(check_credential_name)]
MAX_EXAMPLES = 50
MAX_EXAMPLE_CHARACTERS = 2_000
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_EXAMPLE_CHARACTERS)]


class Origin(StrEnum):
    BUILT = "built"
    TEMPLATE = "template"


class State(StrEnum):
    """Where a subagent is in its life."""

    PROBATION = "probation"  # new: Claude has to confirm each match, until two runs went well
    ACTIVE = "active"
    ARCHIVED = "archived"  # never matched; its name, versions and examples are kept


class Author(StrEnum):
    """Who wrote a version, or an example."""

    DRAFTER = "drafter"
    TEMPLATE = "template"
    OWNER = "owner"
    PERSON = "person"  # an example: somebody's task, which was done well


class Definition(BaseModel):
    """What a version of a subagent says. Unset limits fall back to the service's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: Annotated[str, StringConstraints(strip_whitespace=True, min_length=20, max_length=1_000)]
    system_prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=40, max_length=20_000)]
    tools: tuple[Tool, ...] = ()
    model: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/\[\]@-]{0,99}$")] | None = None
    max_turns: Annotated[int, Field(ge=1, le=100)] | None = None
    timeout_seconds: Annotated[int, Field(ge=5, le=3_600)] | None = None
    max_budget_usd: Annotated[float, Field(gt=0, le=100)] | None = None
    credentials: tuple[CredentialName, ...] = ()  # it cannot work without them
    optional_credentials: tuple[CredentialName, ...] = ()  # it can do more with them
    hosts: tuple[HostPattern, ...] = ()  # that its runs reach, by https; `*.` in front of a name is all below it

    @model_validator(mode="after")
    def _secrets_go_to_known_hosts(self) -> Self:
        if ANY_HOST in self.hosts and (self.credentials or self.optional_credentials):
            raise ValueError("hosts: must be named, not *, where there are credentials")
        return self

    def digest(self) -> str:
        """The same for equal definitions."""
        canonical = json.dumps(self.model_dump(include=set(Definition.model_fields)), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


class Template(Definition):
    """A subagent shipped as a file in templates/."""

    name: Name
    examples: Annotated[tuple[Text, ...], Field(max_length=MAX_EXAMPLES)] = ()

    def definition(self) -> Definition:
        return Definition(**self.model_dump(include=set(Definition.model_fields)))

    def digest(self) -> str:
        """The same for equal definitions with equal examples; tells whether the file has changed."""
        return hashlib.sha256(json.dumps([super().digest(), *self.examples]).encode()).hexdigest()


class Draft(BaseModel):
    """What the drafter answers: a new subagent, or a wider version of one. Claude is held to its JSON Schema."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[Name, Field(description="snake_case, what it does, e.g. flight_price_watcher")]
    description: Annotated[str, StringConstraints(strip_whitespace=True, min_length=20, max_length=1_000)] = Field(
        description="One or two sentences: which tasks it takes, in the words people use for them."
    )
    system_prompt: Annotated[str, StringConstraints(strip_whitespace=True, min_length=40, max_length=20_000)] = Field(
        description="How it works, what it returns on a phone screen, what it says when it has no access."
    )
    examples: Annotated[tuple[Text, ...], Field(min_length=5, max_length=10)] = Field(
        description="Five to ten different tasks that people would send it, each as they would write it."
    )
    tools: tuple[Tool, ...] = Field(default=(), description="The tools it needs and no more.")
    # Whole names alone: it is Claude that proposes them, for a task that a stranger may have worded.
    hosts: Annotated[tuple[Hostname, ...], Field(max_length=10)] = Field(
        default=(), description="The public hosts it has to reach, each by its whole name, e.g. api.example.com."
    )
    widens: Name | None = Field(
        default=None,
        description="The existing subagent that should take this task too, and whose new version this is; else null.",
    )

    def definition(self) -> Definition:
        return Definition(
            description=self.description, system_prompt=self.system_prompt, tools=self.tools, hosts=self.hosts
        )


@dataclass(frozen=True)
class Subagent:
    """A stored subagent with its current version."""

    id: int
    name: str
    origin: Origin
    version: int
    definition: Definition
    state: State = State.ACTIVE


Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], value: Mapping[str, Any]) -> Model:
    """`value` as a Template, Draft or Definition. Raises InvalidDefinition with one `field: reason` a problem."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise InvalidDefinition(
            [f"{'.'.join(str(part) for part in e['loc']) or 'file'}: {e['msg']}" for e in error.errors()]
        ) from error
