"""What the tests of this folder attack, and the table of it in docs/security.md.

`python -m tests.security.attacks` writes the table anew.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- attacks -->", "<!-- end of attacks -->"

Test = TypeVar("Test", bound=Callable[..., object])


@dataclass(frozen=True)
class Attack:
    """`what` is tried, and the `answer` that the test expects."""

    what: str
    answer: str
    test: str


def attack(what: str, answer: str) -> Callable[[Test], Test]:
    """Marks a test as an attack; both texts are cells of a Markdown table."""

    def mark(test: Test) -> Test:
        test.attacks = [*getattr(test, "attacks", []), (what, answer)]  # type: ignore[attr-defined]
        return test

    return mark


def attacks() -> Iterator[Attack]:
    """All of them, in the order of their files and lines."""
    for path in sorted(HERE.glob("test_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for name, test in vars(module).items():
            if name.startswith("test_"):
                for what, answer in reversed(getattr(test, "attacks", [])):
                    yield Attack(what, answer, f"{path.stem}.{name}")


def table() -> str:
    rows = [f"| {each.what} | {each.answer} | `{each.test}` |" for each in attacks()]
    return "\n".join([BEGIN, "| attack | answer | shown by |", "|---|---|---|", *rows, END])


def with_table(text: str) -> str:
    """The document's text with its table made anew. Raises ValueError when it has no place for one."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{DOCUMENT} has no {BEGIN} … {END}")
    return before + table() + after


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
