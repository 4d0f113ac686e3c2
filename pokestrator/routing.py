"""Which road a task takes: a stored subagent, a template, or a new subagent.

First form: full-text search proposes, and a candidate is taken only when it is clear. A task that nothing fits must
never be forced onto one that is merely near, so everything unclear is a case for building.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pokestrator.jobs import Route
from pokestrator.store.shortlist import Candidate
from pokestrator.subagents import Template

CLEAR = 0.6  # score from which a candidate may be taken
MARGIN = 0.15  # how far it must stand above the next one
FEWEST_SHARED = 2  # words in common with the texts, where no example is like the task
COVERAGE_WEIGHT = 0.9  # covering a task's words is worth a little less than being like an example

# Words (as lexemes) that ask without saying for what; they neither count for a candidate nor against it.
ASKING = frozenset(
    [
        *("pleas", "show", "tell", "give", "get", "want", "need", "find", "help", "check", "make", "let", "know"),
        *("look", "could", "would", "like", "latest", "current", "today"),
    ]
)


@dataclass(frozen=True)
class Decision:
    """The road and why; `name` is the subagent's or template's."""

    route: Route
    reason: str
    name: str | None = None


def score(candidate: Candidate) -> float:
    """0 to 1: how alike the most similar example is, or how much of the task its texts cover."""
    asked_for = set(candidate.lexemes) - ASKING
    shared = asked_for & set(candidate.shared)
    coverage = len(shared) / len(asked_for) if len(shared) >= FEWEST_SHARED else 0.0
    return max(candidate.similarity, COVERAGE_WEIGHT * coverage)


def decide(candidates: Sequence[Candidate]) -> Decision:
    """Take the best candidate if it is clear, else build. Between equals, or nearly so, the one stored one wins."""
    ranked = sorted(candidates, key=lambda c: (-score(c), not c.is_stored, c.name))
    if not ranked:
        return Decision(Route.BUILD_NEW, "no subagent or template shares a word with the task")
    best, best_score = ranked[0], score(ranked[0])
    if best_score < CLEAR:
        return Decision(Route.BUILD_NEW, f"nearest is {best.name} at {best_score:.2f}, below {CLEAR}")
    near = [c for c in ranked if score(c) >= max(CLEAR, best_score - MARGIN)]
    stored = [c for c in near if c.is_stored]
    if best.similarity < 1 and len(near) > 1 and len(stored) != 1:
        return Decision(Route.BUILD_NEW, f"{near[0].name} and {near[1].name} are too close to call ({best_score:.2f})")
    chosen = stored[0] if stored and best.similarity < 1 else best
    route = Route.MATCH if chosen.is_stored else Route.TEMPLATE
    return Decision(route, f"{chosen.name} at {score(chosen):.2f}, shares {', '.join(chosen.shared[:8])}", chosen.name)


def decide_from_memory(task: str, templates: Sequence[Template]) -> Decision:
    """The same decision while the database is away: templates only, whole words instead of lexemes."""
    words = _words(task)
    return decide([_measure(words, template) for template in templates])


def _measure(words: frozenset[str], template: Template) -> Candidate:
    known = _words(" ".join([template.name.replace("_", " "), template.description, *template.examples]))
    examples = [_words(example) for example in template.examples]
    similarity = max((len(words & e) / len(words | e) for e in examples if words | e), default=0.0)
    return Candidate(template.name, False, tuple(sorted(words)), tuple(sorted(words & known)), similarity)


def _words(text: str) -> frozenset[str]:
    """Words of four letters and more, roughly without their endings: short ones are mostly grammar."""
    return frozenset(re.sub(r"(ing|ed|es|s)$", "", word) for word in re.findall(r"\w{4,}", text.lower()))
