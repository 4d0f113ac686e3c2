"""What the scripted Messages API says: the script language, and the small model played without a script.

No model is behind any of this. A script travels in the conversation itself, so the server needs no memory of it:
the first user message with `SCRIPT:` and a JSON array of steps drives everything after it. The step is chosen by the
number of assistant messages that follow, so a retried request meets the same step; the last step repeats.

    answers   {"text": "…"}            {"tool": "Bash", "input": {…}}     {"structured": {…}}
              {"refusal": true}        {"empty": true}
    faults    {"status": 529, "type": "overloaded_error", "message": "…", "headers": {…}}
              {"hang": seconds}        {"hang": seconds, "after_start": true}
              {"cut": true}            {"malformed": true}                {"sse_error": "overloaded_error"}

Any step takes `"delay": seconds`, `"usage": {…}`, `"for": "draft" | "run" | "route"` (only where a draft is asked for,
or an agent runs; the question who a task is for meets only steps that say "route") and `"try": 1 | 2` (only in the
first question for a draft, or only in the one that is put after a draft was refused: a conversation of its own, which
begins with the first of its steps). A fault lasts for ever
or for `"times"` requests, and then the next step is played; it counts by the text of the message that holds the script,
over all sessions.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pokestrator.claude.answers import ANSWER_TOOL
from pokestrator.routing import EXAMPLE_SHOWN
from pokestrator.subagents import Draft
from pokestrator.telemetry import one_line

Step = Mapping[str, Any]
Body = Mapping[str, Any]

FAULTS = ("status", "hang", "cut", "malformed", "sse_error")
ANSWERS = ("refusal", "empty", "structured", "tool", "text")

_MARK = re.compile(r"SCRIPT:\s*(?=\[)")


class ScriptError(Exception):
    """The script, or the question, is one that nothing here can answer; becomes a 400."""


@dataclass(frozen=True)
class Turn:
    """The steps one request may meet: faults, then the answer. Retries of the request have the same `key`."""

    key: str
    steps: Sequence[Step]

    def step(self, attempt: int) -> Step:
        """The step for the `attempt`-th request (from 1) of this turn."""
        for step in self.steps:
            times = step.get("times") if kind_of(step) in FAULTS else None
            if times is None or attempt <= times:
                return step
            attempt -= times
        return {"text": "[scripted answer] The script has no more steps."}


def turn_of(body: Body) -> Turn:
    """What to play for a request to /v1/messages. Raises ScriptError."""
    wanted = _wanted(body)
    messages = body.get("messages") or []
    for index, message in enumerate(messages):
        found = _script_in(message)
        if found is None:
            continue
        text, script = found
        tried = 2 if "\n<refused_draft>\n" in text else 1
        meant = [step for step in script if _is_for(step, wanted) and step.get("try", tried) == tried]
        turns = _turns(meant)
        if not turns:
            break
        position = sum(later.get("role") == "assistant" for later in messages[index + 1 :])
        key = hashlib.sha256(f"{wanted} {position} {text}".encode("utf-8", "replace")).hexdigest()
        return Turn(key, turns[min(position, len(turns) - 1)])
    return Turn("", [_unscripted(body)])


def _is_for(step: Step, wanted: str) -> bool:
    return step.get("for") == wanted or (wanted != "route" and "for" not in step)


def kind_of(step: Step) -> str:
    """The word that says what a step is. Raises ScriptError for a step without one."""
    for kind in (*FAULTS, *ANSWERS):
        if kind in step:
            return kind
    raise ScriptError(f"no step of the script language: {json.dumps(step)[:200]}")


def message_of(step: Step, model: str) -> dict[str, Any]:
    """The whole answer as a non-streaming Messages API message."""
    kind = kind_of(step)
    content: list[dict[str, Any]] = []
    if kind == "tool":
        content.append(_tool_use(step["tool"], step.get("input", {})))
    elif kind == "structured":
        content.append(_tool_use(ANSWER_TOOL, step["structured"]))
    elif kind not in ("refusal", "empty"):
        content.append({"type": "text", "text": step.get("text", "A scripted answer that does not arrive whole.")})
    return {
        "id": f"msg_scripted_{uuid.uuid4().hex[:16]}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": {"tool": "tool_use", "structured": "tool_use", "refusal": "refusal"}.get(kind, "end_turn"),
        "stop_sequence": None,
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 5,
            **step.get("usage", {}),
        },
    }


def _tool_use(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_scripted_{uuid.uuid4().hex[:16]}", "name": name, "input": value}


def _script_in(message: Mapping[str, Any]) -> tuple[str, list[Step]] | None:
    """The text of a user message that holds a script, and the script."""
    if message.get("role") != "user":
        return None
    for text in _texts(message):
        mark = _MARK.search(text)
        if mark is None:
            continue
        try:
            script, _ = json.JSONDecoder().raw_decode(text, mark.end())
        except ValueError as error:
            raise ScriptError(f"SCRIPT: is not followed by a JSON array: {error}") from error
        if not all(isinstance(step, dict) for step in script):
            raise ScriptError("a step of the script is not an object")
        return text, script
    return None


def _turns(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps in groups: each answer with the faults before it; faults at the end are a group of their own."""
    turns: list[list[Step]] = [[]]
    for step in steps:
        turns[-1].append(step)
        if kind_of(step) in ANSWERS:
            turns.append([])
    return [turn for turn in turns if turn]


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for block in content if isinstance(content, list) else ():
        if block.get("type") == "text":
            yield block.get("text", "")


def _wanted(body: Body) -> str:
    """What the request asks for: a "draft" or a "route", which are structured, or a "run" of an agent."""
    schema = _output_schema(body)
    if schema is None:
        return "run"
    return "route" if "subagent" in schema.get("properties", {}) else "draft"


def _output_schema(body: Body) -> Mapping[str, Any] | None:
    """The JSON Schema of the structured output the request asks for."""
    for tool in body.get("tools") or ():
        if tool.get("name") == ANSWER_TOOL:
            schema: Mapping[str, Any] = tool.get("input_schema", {})
            return schema
    return None


# The model that is played without a script.

_COMMON_WORDS = """
    a about an and any are as at be but by can could do does for from get give go has have help how i if im in into is
    it its just know let like make me my need of on or our please should show so some tell than that the their them
    then there these they this to up us want was we what whats when where which who why will with would you your
"""
_STOP_WORDS = frozenset(_COMMON_WORDS.split())

_SYSTEM_PROMPT = (
    "You do tasks of one kind for people who read your answer on a phone. Work out what is asked, do it with what you "
    "have, and check it. Answer in a few short sentences of plain text, the result first. If you lack access to "
    "something you need, say in one sentence what is missing."
)

_VARIATIONS = ("", ", please", ", as last week", ", for a friend of mine", ", but in fewer words")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _unscripted(body: Body) -> Step:
    task = _task(body)
    schema = _output_schema(body)
    if schema is None:
        return {
            "text": f"[scripted answer] This is where Claude would answer: “{one_line(task, 80)}”. "
            "Set ANTHROPIC_API_KEY to have the real one."
        }
    if _wanted(body) == "route":
        return {"structured": route_for(task, "\n".join(_said(body)))}
    properties = set(schema.get("properties", {}))
    if properties != set(Draft.model_fields):
        raise ScriptError(f"the script has no answer for a schema with the properties {sorted(properties)}")
    return {"structured": draft_for(task)}


def route_for(task: str, question: str) -> dict[str, Any]:
    """Who `task` is for, of those that the question lists: the first that has this very task as an example, or none."""
    name = None
    for line in question.rpartition("<subagents>")[2].splitlines():
        if entry := re.match(r"\d+\. ([a-z][a-z0-9_]+): ", line):
            name = entry[1]
        elif name and line == f"   - {one_line(task, EXAMPLE_SHOWN)}":
            return {"subagent": name, "reason": f"{name} has done this very task."}
    return {"subagent": None, "reason": "None of them has done this very task."}


def draft_for(task: str) -> dict[str, Any]:
    """A subagent for `task`, whatever it says: always a valid pokestrator.subagents.Draft."""
    task = _CONTROLS.sub(" ", task).encode("utf-8", "replace").decode().strip() or "(a task without words)"
    return {
        "name": _name(task),
        "description": f"Takes tasks such as: {one_line(task, 300)}",
        "system_prompt": _SYSTEM_PROMPT,
        "examples": [task[:1_950] + more for more in _VARIATIONS],
        "tools": [],
        "hosts": [],
    }


def _name(task: str) -> str:
    """Two or three content words of the task in snake_case; a digest where it has none in Latin letters."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", task.casefold()) if not unicodedata.combining(c))
    words: list[str] = []
    for word in re.findall(r"(?<![a-z0-9])[a-z][a-z0-9]*", re.sub(r"['\u2019]", "", plain)):
        if word not in _STOP_WORDS and word[:15] not in words:
            words.append(word[:15])  # three of them and two underscores are 47 characters; a name has at most 48
    if not words:
        return f"task_{hashlib.sha256(task.encode()).hexdigest()[:8]}"
    return "_".join(words[:3]) if len(words) > 1 else f"{words[0]}_task"


def _said(body: Body) -> list[str]:
    """All texts of the user's messages."""
    return [text for m in body.get("messages") or () if m.get("role") == "user" for text in _texts(m)]


def _task(body: Body) -> str:
    """What stands between <task> and </task> in the conversation, or else the last text a person wrote."""
    texts = _said(body)
    for text in texts:
        before, closing, _ = text.rpartition("</task>")
        task = before.rpartition("<task>")[2].strip()
        if closing and "<task>" in before and task:
            return task
    written = [text for text in texts if not text.lstrip().startswith("<system-reminder>")]
    return written[-1].strip() if written else ""
