"""Which template a task is for while the database, and with it the search, is away. Only a clear case is decided."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pokestrator.subagents import Template

CLEAR = 0.6  # score from which a template may be taken
MARGIN = 0.15  # how far it must stand above the next one
FEWEST_SHARED = 2  # words in common with the texts, where no example is like the task
COVERAGE_WEIGHT = 0.9  # covering a task's words is worth a little less than being like an example

# Words (roughly without their endings) that ask without saying for what; they neither count for a template nor against.
ASKING = frozenset(
    [
        *("pleas", "please", "show", "tell", "give", "want", "need", "find", "help", "check", "make", "know"),
        *("look", "could", "would", "like", "latest", "current", "today"),
    ]
)


def template_for(task: str, templates: Sequence[Template]) -> Template | None:
    """The template that is clearly meant, or None. One of whose examples the task is, is."""
    words = _words(task)
    ranked = sorted(((_score(words, template), template) for template in templates), key=lambda each: -each[0])
    if not ranked or ranked[0][0] < CLEAR:
        return None
    (best, template), *others = ranked
    return template if best == 1 or not others or best - others[0][0] > MARGIN else None


def _score(words: frozenset[str], template: Template) -> float:
    """0 to 1: how alike the most similar example is, or how much of the task the template's texts cover."""
    examples = [_words(example) for example in template.examples]
    similarity = max((len(words & e) / len(words | e) for e in examples if words | e), default=0.0)
    known = _words(" ".join([template.name.replace("_", " "), template.description, *template.examples]))
    asked_for = words - ASKING
    shared = len(asked_for & known)
    coverage = shared / len(asked_for) if shared >= FEWEST_SHARED else 0.0
    return max(similarity, COVERAGE_WEIGHT * coverage)


def _words(text: str) -> frozenset[str]:
    """Words of four letters and more, roughly without their endings: short ones are mostly grammar."""
    return frozenset(re.sub(r"(ing|ed|es|s)$", "", word) for word in re.findall(r"\w{4,}", text.lower()))
