"""What a subagent may not say, beyond the lengths and forms that subagents.py holds: a lint for drafts, for what the
owner writes and for what is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import get_args

from pokestrator.redaction import REDACTED
from pokestrator.subagents import MAX_EXAMPLE_CHARACTERS, MAX_EXAMPLES, NAME_PATTERN, Definition, Tool

ALIKE = 0.8  # shared words over all words of two descriptions, from which one could stand for the other

TOOLS = frozenset[str](get_args(Tool))
# Tools that the CLI knows and no subagent can have.
_FOREIGN_TOOLS = ("Task", "Agent", "Skill", "MultiEdit", "NotebookEdit", "TodoWrite", "KillShell", "BashOutput")
# Their names are everyday words too: only "the Read tool" means the tool.
_WORDS = frozenset({"Read", "Write", "Edit", "Task", "Agent", "Skill"})

# Line feeds and tabs are fine. Marks that turn the direction of writing, and invisible letters, show a reader
# something else than a model reads.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")

_SECRETS = {
    "an Anthropic key": re.compile(r"\bsk-ant-[\w-]{16,}"),
    "an OpenAI key": re.compile(r"\bsk-(?:proj-|svcacct-)?[A-Za-z0-9_]{24,}"),
    "a Stripe key": re.compile(r"\b(?:[sr]k_(?:live|test)|whsec)_[A-Za-z0-9]{12,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    "a GitLab token": re.compile(r"\bglpat-[\w-]{16,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    "a Google key": re.compile(r"\bAIza[\w-]{35}"),
    "a Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----"),
    "a JSON Web Token": re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"),
}

_SENTENCE = re.compile(r"[.!?](?=\s|$)|[;\n]")
_FORBIDS = re.compile(r"\b(?:never|not?|nor|none|cannot|without|avoid|refuse|neither)\b|n['\u2019]t\b", re.IGNORECASE)
# What is only spoken of is no order: "if you have Bash", "people who use Bash", "explain how to use Bash".
_SPEAKS_OF = re.compile(r"\b(?:if|unless|when|who|whose|whether|how|what|explains?)\b", re.IGNORECASE)
_USES = r"\b(?i:use|using|call|calling|invoke|invoking|run|running)\s+(?i:the\s+|your\s+|its\s+)?"
_ESCAPES = {
    "to get past what confines it": re.compile(
        r"\b(?:ignor|bypass|disabl|circumvent|evad|escap|overrid|disregard|exceed)(?:e|es|ing)?\s+(?:from\s+)?"
        r"(?:(?:the|your|its|this|these|any|all|every|of|our|service['\u2019]s|tool|time|turn|budget|token|spending|rate)"
        r"\s+)*(?:sandbox|jail|confinement|permissions?|restrictions?|limits?|guardrails?|ceilings?)\b"
        r"|\b(?:break|get)\s+out\s+of\s+(?:the|your|its)\s+(?:sandbox|jail|confinement)\b"
        r"|\b(?:turn|switch)\s+off\s+(?:the|your|its|all)\s+(?:sandbox|confinement|permissions?|guardrails?)\b"
        r"|dangerously-skip-permissions|bypassPermissions",
        re.IGNORECASE,
    ),
    "to become another user": re.compile(
        r"\b(?:use|using|with|via|through|call|calling)\s+sudo\b|[`$]\s*sudo\s|^\s*(?:[-*]\s*)?sudo\s"
        r"|\b(?:run|running|act|work)\s+(?:\S+\s+){0,3}as\s+root\b"
        r"|\bbecome\s+root\b|\bescalat(?:e|ing)\s+(?:your\s+|its\s+)?privileges\b",
        re.IGNORECASE,
    ),
}


def problems_of(
    name: str,
    definition: Definition,
    examples: Sequence[str],
    *,
    others: Mapping[str, str],
    redact: Callable[[str], str],
) -> list[str]:
    """`field: reason` lines, each of which names what would mend it; none for a subagent that may be stored.

    `others`: descriptions of other subagents by name (one under `name` itself is passed over). `redact` takes this
    service's secrets out of a text.

    What it says of tools and limits reads English sentences by their words: it mends drafts that would fail when they
    run, and finds what is said outright. It does not see other languages, paraphrases or orders put together from
    pieces, and need not: what a run can do is held by its jail and the ceiling of tools, whatever its prompt says.
    """
    texts = {"name": name, "description": definition.description, "system_prompt": definition.system_prompt}
    texts |= {f"examples.{number}": example for number, example in enumerate(examples)}
    return [
        *_of_forms(name, examples),
        *(problem for field, text in texts.items() for problem in _of_text(field, text, redact)),
        *_of_tools(definition),
        *_of_escapes(definition.system_prompt),
        *_of_likeness(name, definition.description, others),
        *_of_repetition(examples),
    ]


def _of_forms(name: str, examples: Sequence[str]) -> Iterator[str]:
    if not re.fullmatch(NAME_PATTERN, name):
        yield "name: must be snake_case of 3 to 48 characters a-z, 0-9 and _, a letter first, such as price_watcher"
    if len(examples) > MAX_EXAMPLES:
        yield f"examples: are {len(examples)}; keep the {MAX_EXAMPLES} that differ most"
    for number, example in enumerate(examples):
        if not 1 <= len(example.strip()) <= MAX_EXAMPLE_CHARACTERS:
            yield f"examples.{number}: must have 1 to {MAX_EXAMPLE_CHARACTERS} characters; shorten it or take it out"


def _of_text(field: str, text: str, redact: Callable[[str], str]) -> Iterator[str]:
    if found := _CONTROLS.search(text):
        character = "a NUL character" if found[0] == "\x00" else "a control character"
        yield f"{field}: holds {character} (U+{ord(found[0]):04X}); take it out"
    if secret := secret_in(text, redact):
        yield f"{field}: holds {secret}; take it out: credentials are given to runs by name"


def secret_in(text: str, redact: Callable[[str], str]) -> str | None:
    """What kind of secret a text holds, or has had taken out of it; None if it seems to hold none."""
    if REDACTED in text or redact(text) != text:
        return "a secret of this service"
    return next((f"what looks like {kind}" for kind, form in _SECRETS.items() if form.search(text)), None)


def _of_tools(definition: Definition) -> Iterator[str]:
    """Tools that the prompt has it use, and that it does not have."""
    orders = [
        each
        for each in _SENTENCE.split(definition.system_prompt)
        if not _FORBIDS.search(each) and not _SPEAKS_OF.search(each)
    ]
    for tool in (*sorted(TOOLS), *_FOREIGN_TOOLS):
        if tool in definition.tools:
            continue
        called = f"[`'\"*]*{tool}[`'\"*]*" + (r"\s+tool\b" if tool in _WORDS else r"\b(?!\s*-)")
        if not any(re.search(_USES + called, order) for order in orders):
            continue
        if tool in TOOLS:
            yield f"system_prompt: tells it to use {tool}, which is not in its tools; add it there, or take that out"
        else:
            yield f"system_prompt: tells it to use {tool}, which no subagent has; the tools are {_listed(TOOLS)}"


def _of_escapes(prompt: str) -> Iterator[str]:
    for sentence in _SENTENCE.split(prompt):
        if _FORBIDS.search(sentence):
            continue
        for what, form in _ESCAPES.items():
            if form.search(sentence):
                yield f"system_prompt: tells it {what}, which no run can; take that out, and have it say what it lacks"


def _of_likeness(name: str, description: str, others: Mapping[str, str]) -> Iterator[str]:
    own = words_of(description)
    for other, said in others.items():
        if other != name and alike(own, words_of(said)):
            yield f"description: says nearly what {other} says; widen {other}, or say which tasks only this one takes"


def _of_repetition(examples: Sequence[str]) -> Iterator[str]:
    first: dict[object, int] = {}
    for number, example in enumerate(examples):
        key = tuple(re.findall(r"\w+", example.casefold())) or example.strip()
        if (before := first.setdefault(key, number)) != number:
            yield f"examples.{number}: repeats examples.{before}; write another task"


def words_of(text: str) -> frozenset[str]:
    """The words of a text, whatever their case."""
    return frozenset(re.findall(r"\w+", text.casefold()))


def alike(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two sets of words are nearly equal (Jaccard index)."""
    return len(one & other) >= ALIKE * len(one | other) > 0


def _listed(tools: frozenset[str]) -> str:
    return ", ".join(sorted(tools))
