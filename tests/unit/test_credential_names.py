"""Which names a credential may have: never one that our settings or an agent's processes read."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from pokestrator.credential_names import check_credential_name
from pokestrator.errors import InvalidDefinition
from pokestrator.settings import INHERITED_BY_AGENTS, setting_names
from pokestrator.subagents import Definition, Draft, Template, parse

DEFINITION = {
    "description": "Counts sheep in photos of pastures.",
    "system_prompt": "You count the sheep that you are shown. Answer with one number.",
}


@pytest.mark.parametrize(
    "name",
    ["STRIPE_API_KEY", "GITHUB_TOKEN", "NOTION_TOKEN", "AWS_SECRET_ACCESS_KEY", "RENDER_API_KEY", "X1"],
)
def test_names_that_providers_use_are_taken(name: str) -> None:
    assert check_credential_name(name) == name


@pytest.mark.parametrize("name", sorted(setting_names()))
def test_no_setting_of_ours_is_a_credential(name: str) -> None:
    with pytest.raises(ValueError, match="take another name"):
        check_credential_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *sorted(name for name in INHERITED_BY_AGENTS if name.isupper()),
        *("HOME", "TMPDIR", "LD_PRELOAD", "LD_LIBRARY_PATH", "DYLD_INSERT_LIBRARIES", "NODE_OPTIONS", "PYTHONPATH"),
        *("PYTHONSTARTUP", "BASH_ENV", "BASH_MAX_TIMEOUT_MS", "ENV", "IFS", "PROMPT_COMMAND", "ALL_PROXY"),
        *("CLAUDE_CONFIG_DIR", "CLAUDECODE", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_CUSTOM_HEADERS", "GIT_SSH_COMMAND"),
        *("PERL5OPT", "RUBYOPT", "JAVA_TOOL_OPTIONS", "OPENSSL_CONF", "SSLKEYLOGFILE", "CURL_HOME", "XDG_CONFIG_HOME"),
        *("POKESTRATOR_ANYTHING", "DISABLE_TELEMETRY"),
    ],
)
def test_no_name_that_a_process_of_an_agent_obeys_is_a_credential(name: str) -> None:
    with pytest.raises(ValueError, match="take another name"):
        check_credential_name(name)


@pytest.mark.parametrize("name", ["", "A", "stripe", "1A", "A=sk_live_51", "sk_live_51", "A\n", "A B", "Ä_KEY"])
def test_a_name_of_a_wrong_form_is_not_repeated_for_it_can_be_the_value(name: str) -> None:
    with pytest.raises(ValueError, match="capital letters") as caught:
        check_credential_name(name)
    assert "sk_live" not in str(caught.value)


@pytest.mark.parametrize("field", ["credentials", "optional_credentials"])
@pytest.mark.parametrize("model", [Definition, Template])
def test_no_template_and_no_stored_version_names_one_of_these(model: type[BaseModel], field: str) -> None:
    named = {} if model is Definition else {"name": "sheep_counter"}
    for name in ("LD_PRELOAD", "ANTHROPIC_API_KEY", "DATABASE_URL", "HTTPS_PROXY"):
        with pytest.raises(InvalidDefinition, match=f"^{field}.1: .*take another name"):
            parse(model, {**DEFINITION, **named, field: ["STRIPE_API_KEY", name]})


def test_a_draft_names_no_credential_at_all() -> None:
    drafted = {
        **DEFINITION,
        "name": "sheep_counter",
        "examples": [f"how many sheep are on photo {number}?" for number in range(5)],
        "credentials": ["STRIPE_API_KEY"],
    }
    with pytest.raises(InvalidDefinition, match="credentials: Extra inputs"):
        parse(Draft, drafted)
