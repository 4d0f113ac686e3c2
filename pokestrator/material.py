"""Texts of others as Claude is shown them: material between tags that nothing in it can open or close."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

Tag = Literal["task", "metadata", "subagents", "current_prompt", "refused_draft", "problems"]

_OUR_TAGS = re.compile(
    r"<(?=\s*/?\s*(?:task|metadata|subagents|current_prompt|refused_draft|problems)\b)", re.IGNORECASE
)


def tagged(tag: Tag, text: str) -> str:
    """`text` between these tags. The like of our tags in it is escaped; what no UTF-8 can hold is replaced."""
    sendable = text.encode("utf-8", "replace").decode()
    return f"<{tag}>\n{_OUR_TAGS.sub('&lt;', sendable)}\n</{tag}>"


def task_text(task: str, metadata: str | Mapping[str, Any], most: int | None = None) -> str:
    """A task as an agent sees it; with `most`, no more than so many characters of it, and of its metadata."""
    text = tagged("task", _beginning(task, most))
    if metadata:
        shown = metadata if isinstance(metadata, str) else json.dumps(metadata, ensure_ascii=False)
        text += "\n\n" + tagged("metadata", _beginning(shown, most))
    return text


def _beginning(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else f"{text[:most]} […]"
