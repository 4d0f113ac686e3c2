"""Whether words alone decide which subagent a task is for. Pure; where they do not, Claude is asked.

The limits were calibrated on tasks that people wrote (docs/routing.md has the figures and the command): decisions made
here are to be right 98 times in 100, and wrong for at most one in 100 of the tasks that nothing fits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pokestrator.store.shortlist import RARITY, Candidate, Shortlist
from pokestrator.subagents import State

ALIKE = 0.8  # of the lexemes of a task and an example together, in common
SAME_WORDS = 0.6  # of their words as they are written: of "don't" and "do" a dictionary of lexemes knows nothing
MARGIN = 19.0  # that the best must stand above the next
MARGIN_FOR_AN_EXAMPLE = 1.75  # more, for each of its second to fifth: whoever knows more tasks stands out more easily
FEW, LEAST_KNOWN = 50, 0.5  # among so few, standing above the next says little: the best must know half of the task too
CALIBRATED_ON = 103  # subagents: words weigh more among more of them
K1, B = 1.2, 0.75  # BM25's constants, for one text at a time
USUAL_LENGTH = 12.0  # lexemes in an example
FURTHER_TEXTS, THEIR_WORTH = 3, 0.3  # after a subagent's best text, how many more count, and how much


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
    found = _nearly_equal(task, candidates, shortlist.weights) or _far_ahead(candidates, shortlist)
    return found if found and found.candidate.state is not State.PROBATION else None


def _nearly_equal(task: str, candidates: list[Candidate], weights: Mapping[str, float]) -> Certainty | None:
    """The one candidate that has done a task like this; where another has too, the one whose words are the same."""
    words, lexemes = _words(task), frozenset(weights)
    found: list[tuple[float, Candidate, str]] = []
    for candidate in candidates:
        for example in candidate.examples:
            same = _overlap(words, _words(example.task))
            alike = _overlap(lexemes, example.lexemes)
            if same == 1 or (alike >= ALIKE and same >= SAME_WORDS):
                found.append((same, candidate, example.task))
    if not found:
        return None
    best, candidate, example_task = max(found, key=lambda each: each[0])
    # Of equals the first in the shortlist is meant: a stored one before a template of the same score.
    rivals = {other.name for same, other, _ in found if other is not candidate and (same == best or best < 1)}
    if rivals and best < 1:
        return None
    return Certainty(candidate, None, f"{candidate.name} takes a task like this: {example_task[:100]}")


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
    """Its words as they are written. Amounts, dates and times do not tell kinds of tasks apart."""
    words = frozenset(re.findall(r"\w+", text.casefold()))
    return frozenset(word for word in words if not word[0].isdecimal()) or words


def _overlap(some: frozenset[str], others: frozenset[str]) -> float:
    """The Jaccard index; 0 for two empty sets."""
    return len(some & others) / len(some | others) if some or others else 0.0
