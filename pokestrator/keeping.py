"""What the owner does to subagents, by whatever door: looks at them, changes them, moves them. All is checked here.

The owner may name credentials and hosts, which drafts may not.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pokestrator.errors import CannotChange, InvalidDefinition, UnknownSubagent
from pokestrator.store.lives import Lives
from pokestrator.store.pool import ConnectionSource
from pokestrator.store.subagents import Subagents
from pokestrator.store.versions import Judged, Version, Versions
from pokestrator.subagent_checks import alike, problems_of, words_of
from pokestrator.subagents import MAX_EXAMPLES, Author, Definition, Origin, Subagent, Template

NAMES_SEARCHED = 10_000  # for one that is like a name that does not exist
MAX_NOTE = 500


@dataclass(frozen=True)
class Moved:
    """A subagent as it is exported. `left_out`: how many of its examples are not, because no import would take them."""

    name: str
    definition: Definition
    examples: tuple[str, ...]
    left_out: int


class Keeper:
    """The owner's hand. A shipped template that no task has used yet is found by its name too, and is stored when it
    is changed.

    All functions raise UnknownSubagent, whose text names others that are written alike, and StoreUnavailable; those
    that change something CannotChange, and InvalidDefinition for what breaks the rules.
    """

    def __init__(
        self, source: ConnectionSource, templates: Sequence[Template], redact: Callable[[str], str] = str
    ) -> None:
        """`redact` takes this service's secrets out of a text: what holds one is refused."""
        self._subagents, self._versions, self._lives = Subagents(source), Versions(source), Lives(source)
        self._templates = {template.name: template for template in templates}
        self._redact = redact

    # Looking

    def all(self, limit: int, *, archived: bool = False) -> list[tuple[Subagent, Version]]:
        """Stored subagents by their names, each with its current version and its figures."""
        return self._versions.current(limit, archived=archived)

    def unused(self) -> list[str]:
        """The names of templates that are not stored, because no task has used them yet."""
        return [name for name in self._templates if self._subagents.get(name) is None]

    def get(self, name: str) -> Subagent | None:
        """The stored subagent; None for a template that no task has used yet."""
        subagent = self._subagents.get(name)
        if subagent is None and name not in self._templates:
            raise self._unknown(name)
        return subagent

    def template(self, name: str) -> Template:
        """The shipped template of this name, for which `get` gave None."""
        return self._templates[name]

    def versions(self, name: str) -> list[Version]:
        """All its versions, the first one first; none of a template that no task has used yet."""
        return self._versions.of(name) if self.get(name) else []

    def version(self, name: str, number: int) -> Version:
        versions = {version.number: version for version in self.versions(name)}
        if number not in versions:
            known = f"its versions are 1 to {max(versions)}" if versions else "it is a template that is not used yet"
            raise UnknownSubagent(f"{name} has no version {number}: {known}")
        return versions[number]

    def examples(self, name: str) -> list[tuple[str, Author]]:
        """The tasks that it is known to take, and where each came from; the most useful ones first."""
        if self.get(name) is None:
            return [(task, Author.TEMPLATE) for task in self._templates[name].examples]
        return self._lives.examples(name)

    def verdicts(self, name: str, limit: int) -> list[Judged]:
        """What people said of its results, the latest first; of results that are still kept."""
        return self._versions.verdicts(name, limit)

    # Changing

    def stored(self, name: str) -> Subagent:
        """The stored subagent; a template is stored by this."""
        return self.get(name) or self._subagents.adopt(self._templates[name])

    def as_it_is(self, name: str) -> Subagent:
        """The subagent, or what a template that no task has used yet would be stored as; nothing is stored by this."""
        return self.get(name) or Subagent(0, name, Origin.TEMPLATE, 1, self._templates[name].definition())

    def check_edit(self, subagent: Subagent, definition: Definition) -> None:
        """Raises InvalidDefinition if `definition` may not become a version of it."""
        # What was accepted before is not held against an edit of something else.
        is_new = definition.description != subagent.definition.description
        self._check(subagent.name, definition, (), self._others() if is_new else {})

    def edit(self, name: str, definition: Definition, *, based_on: int, note: str = "") -> Subagent:
        """Store a new version, made from version `based_on`; none if nothing is changed."""
        self.check_edit(self.as_it_is(name), definition)
        self.stored(name)
        return self._lives.edit(name, definition, based_on=based_on, note=checked_note(note))

    def roll_back(self, name: str, to: int | None = None, *, based_on: int | None = None) -> tuple[Subagent, int]:
        """Go back to what version `to` said, or else to the version before the current one, by a new version.

        `based_on`: what the caller takes for the current version. Returns the version gone back to, too.
        """
        subagent = self.get(name)
        current = based_on or (subagent.version if subagent else 1)
        wanted = current - 1 if to is None else to
        if wanted < 1:
            raise CannotChange(f"{name} has no version before version {current}")
        return self._lives.roll_back(name, to=wanted, based_on=current), wanted

    def archive(self, name: str) -> Subagent:
        self.stored(name)
        return self._lives.archive(name)

    def restore(self, name: str) -> Subagent:
        if self.get(name) is None:
            raise CannotChange(f"{name} is not archived")
        return self._lives.restore(name)

    def twins(self, name: str) -> list[str]:
        """Others that a task could be matched with as well: their descriptions say nearly the same."""
        own = words_of(self.as_it_is(name).definition.description)
        return [other for other, said in self._others().items() if other != name and alike(own, words_of(said))]

    def rename(self, name: str, new_name: str) -> Subagent:
        subagent = self.get(name)
        if subagent is None or (subagent.origin is Origin.TEMPLATE and name in self._templates):
            raise CannotChange(
                f"{name} is a template, which follows its file by its name: renamed, it would be left behind, and the "
                f"file be taken in again beside it. Rename the file and the name in it; or export {name}, archive it, "
                "and import the file with another name in it"
            )
        if new_name in self._templates:
            raise CannotChange(f"{new_name} is the name of a template, which would be hidden by it")
        # The name's form alone: nothing else changes.
        problems = problems_of(new_name, subagent.definition, (), others={}, redact=str)
        if wrong := [problem for problem in problems if problem.startswith("name:")]:
            raise InvalidDefinition(wrong)
        return self._lives.rename(name, new_name)

    # Moving

    def export(self, name: str, *, learned: bool = True) -> Moved:
        """All that an import needs. Not `learned`: without tasks that are examples because somebody sent them."""
        definition = self.as_it_is(name).definition
        known = self.examples(name)
        tasks = [task for task, author in known if learned or author is not Author.PERSON][:MAX_EXAMPLES]
        problems = problems_of(name, definition, tasks, others={}, redact=self._redact)
        wrong = {problem.partition(":")[0] for problem in problems}
        kept = tuple(task for number, task in enumerate(tasks) if f"examples.{number}" not in wrong)
        return Moved(name, definition, kept, len(known) - len(kept))

    def take_in(
        self, name: str, definition: Definition, examples: Sequence[str], *, replace: bool = False, note: str = ""
    ) -> tuple[Subagent, Subagent | None]:
        """Store what was exported: as a new subagent, or with `replace` as a new version of the one of this name.

        Returns it, and what it was before.
        """
        note = checked_note(note)
        before = self._subagents.get(name)
        if (before or name in self._templates) and not replace:
            is_what = "a template" if before is None else before.state.replace("probation", "on probation")
            raise CannotChange(f"there is a subagent {name} already ({is_what}); it can be replaced by a new version")
        is_new = before is None or definition.description != before.definition.description
        self._check(name, definition, examples, self._others() if is_new else {})
        if before is None and name not in self._templates:
            return self._lives.add(name, definition, examples, note), None
        before = self.stored(name)
        return self._lives.replace(name, definition, examples, based_on=before.version, note=note), before

    def _check(self, name: str, definition: Definition, examples: Sequence[str], others: Mapping[str, str]) -> None:
        if problems := problems_of(name, definition, examples, others=others, redact=self._redact):
            raise InvalidDefinition(problems)

    def _others(self) -> Mapping[str, str]:
        """The descriptions of all that a task could be matched with."""
        stored = {name for name in self._templates if self._subagents.get(name) is not None}
        shipped = {name: each.description for name, each in self._templates.items() if name not in stored}
        return {**shipped, **self._versions.descriptions()}

    def _unknown(self, name: str) -> UnknownSubagent:
        names = [*self._templates, *self._subagents.names(NAMES_SEARCHED)]
        near = difflib.get_close_matches(name, dict.fromkeys(names), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return UnknownSubagent(f"there is no subagent {name!r}{hint}")


def checked_note(note: str) -> str:
    """A note as it is stored. Raises InvalidDefinition."""
    note = " ".join(note.split())
    if len(note) > MAX_NOTE or not note.isprintable():
        raise InvalidDefinition([f"note: must be text of at most {MAX_NOTE} characters, without control characters"])
    return note
