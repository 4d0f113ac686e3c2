"""docs/security.md says what the tests of this folder show."""

from __future__ import annotations

from tests.security.attacks import DOCUMENT, with_table


def test_the_table_of_attacks_is_what_the_tests_say() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_table(text), "write it anew: python -m tests.security.attacks"
