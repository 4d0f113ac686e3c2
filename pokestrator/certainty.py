"""Whether words alone decide which subagent a task is for. Pure; where they do not, Claude is asked.

The limits were calibrated on tasks that people wrote (docs/routing.md has the figures and the command): decisions made
here are to be right 98 times in 100, and wrong for at most one in 100 of the tasks that nothing fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pokestrator.store.shortlist import EXAMPLE_CHARACTERS, RARITY, Candidate, Example, Shortlist
from pokestrator.subagents import State

ALIKE = 0.8  # of the lexemes of a task and an example together, in common
SAME_WORDS = 0.6  # of their words as they are written, most of which a dictionary of lexemes leaves out
FEWEST_SHARED = 2  # lexemes, where only the amounts differ: "Explain 401k" says nothing of "Explain 529"
MARGIN = 19.0  # that the best must stand above the next
MARGIN_FOR_AN_EXAMPLE = 1.75  # more, for each of its second to fifth: whoever knows more tasks stands out more easily
FEW, LEAST_KNOWN = 50, 0.5  # among so few, standing above the next says little: the best must know half of the task too
CALIBRATED_ON = 103  # subagents: words weigh more among more of them
K1, B = 1.2, 0.75  # BM25's constants, for one text at a time
USUAL_LENGTH = 12.0  # lexemes in an example
FURTHER_TEXTS, THEIR_WORTH = 3, 0.3  # after a subagent's best text, how many more count, and how much

# Whoever is told not to do something is told something else. A dictionary of lexemes leaves out most of these.
_NEGATIONS = """
    not no never without don doesn didn won cannot dont cant instead except nicht kein keine keinen nie ohne ne pas
    jamais sans nunca sin não nao sem non mai senza niet geen nooit не нет без никогда
"""
NEGATIONS = frozenset(_NEGATIONS.split())
# Not \w, which the vowel signs of Hindi and the like are not.
_WORD = re.compile(r"[^\s!-/:-@\[-`{-¿\u2000-\u206f\u3000-\u303f\uff01-\uff0f]+")

Likeness = Literal["equal", "alike"]


@dataclass(frozen=True)
class Certainty:
    """The candidate that words alone decide for, and why. `margin` as in MARGIN; None where an example is alike."""

    candidate: Candidate
    margin: float | None
    reason: str


def certain(task: str, shortlist: Shortlist) -> Certainty | None:
    """The candidate that a task is for without a doubt, or None. One on probation never is: Claude must confirm it."""
    candidates = [candidate for candidate in shortlist.candidates if candidate.about is not None]
    if not candidates:
        return None
    found = _nearly_equal(task, candidates, frozenset(shortlist.weights)) or _far_ahead(candidates, shortlist)
    return None if found is None or found == "open" or found.candidate.state is State.PROBATION else found


def _nearly_equal(
    task: str, candidates: list[Candidate], lexemes: frozenset[str]
) -> Certainty | Literal["open"] | None:
    """The one candidate that has done a task like this; "open" where several have done this very task."""
    likenesses = [{_likeness(task, lexemes, example) for example in candidate.examples} for candidate in candidates]
    equal = [each for each, found in zip(candidates, likenesses, strict=True) if "equal" in found]
    alike = [each for each, found in zip(candidates, likenesses, strict=True) if "alike" in found]
    # A template that has the example too is no rival of a stored one.
    chosen = [each for each in equal if each.is_stored] or equal or alike
    if len(chosen) != 1:
        return "open" if equal else None
    # The example itself may be another person's task, which is nobody else's business.
    said = f"{'it equals' if equal else 'it is nearly'} an example of {chosen[0].name}"
    return Certainty(chosen[0], None, said)


def _likeness(task: str, lexemes: frozenset[str], example: Example) -> Likeness | None:
    """How a task and an example compare, of both of which no more is read than of an example."""
    words, others = _words(task[:EXAMPLE_CHARACTERS]), _words(example.task)
    shared = overlap(lexemes, example.lexemes)
    if words == others and words and (len(task) <= EXAMPLE_CHARACTERS or shared >= ALIKE):
        return "equal"
    if (words ^ others) & NEGATIONS:
        return None
    same = overlap(_without_amounts(words), _without_amounts(others))
    if same == 1 and len(lexemes & example.lexemes) >= FEWEST_SHARED and len(task) <= EXAMPLE_CHARACTERS:
        return "alike"
    return "alike" if shared >= ALIKE and same >= SAME_WORDS else None


def _far_ahead(candidates: list[Candidate], shortlist: Shortlist) -> Certainty | None:
    """The best candidate, if both its whole text and its single texts stand far enough above all others'."""
    best, *others = candidates
    weights = shortlist.weights
    single = [_of_single_texts(candidate, weights) for candidate in candidates]
    ahead = best.score - max((other.score for other in others), default=0.0)
    ahead += single[0] - max(single[1:], default=0.0)
    margin = max(0.0, ahead) * _covered(best, weights) ** 0.25
    needed = MARGIN + MARGIN_FOR_AN_EXAMPLE * min(max(len(best.examples) - 1, 0), 4)
    needed *= max(1.0, math.log(1 + 2 * shortlist.among) / math.log(1 + 2 * CALIBRATED_ON)) ** RARITY
    if margin < needed or (shortlist.among < FEW and _covered(best, weights) < LEAST_KNOWN):
        return None
    shared = sorted((weights[word], word) for word in weights if word in frozenset().union(*_texts(best)))
    words = ", ".join(word for _, word in reversed(shared[-5:]))
    return Certainty(best, margin, f"{best.name} is far ahead by {words} ({margin:.0f}, needed {needed:.0f})")


def _texts(candidate: Candidate) -> list[frozenset[str]]:
    return [text for text in (candidate.about or frozenset(), *(e.lexemes for e in candidate.examples)) if text]


def _of_single_texts(candidate: Candidate, weights: Mapping[str, float]) -> float:
    """BM25 of a candidate's best text by itself, and a little for the next ones: examples that agree say more."""
    scores = sorted((_bm25(text, weights) for text in _texts(candidate)), reverse=True)
    return sum(scores[:1]) + THEIR_WORTH * sum(scores[1 : 1 + FURTHER_TEXTS])


def _bm25(text: frozenset[str], weights: Mapping[str, float]) -> float:
    length = K1 * (1 - B + B * len(text) / USUAL_LENGTH)
    return sum(weight for word, weight in weights.items() if word in text) * (K1 + 1) / (1 + length)


def _covered(candidate: Candidate, weights: Mapping[str, float]) -> float:
    """How much of the task's weight is in words that the candidate knows, 0 to 1."""
    known = frozenset().union(*_texts(candidate))
    total = sum(weights.values())
    return sum(weight for word, weight in weights.items() if word in known) / total if total else 0.0


def _words(text: str) -> frozenset[str]:
    """Its words as they are written: all that stands between spaces and punctuation."""
    return frozenset(_WORD.findall(text.casefold()))


def _without_amounts(words: frozenset[str]) -> frozenset[str]:
    """Amounts, dates and times do not tell kinds of tasks apart."""
    return frozenset(word for word in words if not word[0].isdecimal()) or words


def overlap(some: frozenset[str], others: frozenset[str]) -> float:
    """The Jaccard index; 0 for two empty sets."""
    return len(some & others) / len(some | others) if some or others else 0.0
