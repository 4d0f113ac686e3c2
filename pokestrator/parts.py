"""The parts that are made of settings alone: what speaks to Claude and to Poke, and what secrets are encrypted with."""

from __future__ import annotations

from pydantic import SecretStr

from pokestrator.claude.capacity import default_concurrency, share
from pokestrator.claude.egress import Egress
from pokestrator.claude.pool import Claude, Inline, Slots
from pokestrator.poke.api import Poke
from pokestrator.redaction import Redactor
from pokestrator.settings import Settings
from pokestrator.store.secrets import Vault, key_in


def make_vault(settings: Settings) -> Vault:
    """What secrets are encrypted with; the first call makes the embedded database's key. Raises StoreUnavailable."""
    if settings.secret_key is not None:
        return Vault(settings.secret_key.get_secret_value())
    return Vault() if settings.database_url is not None else Vault(key_in(settings.data_dir.expanduser()))


def concurrency_of(settings: Settings) -> int:
    """Runs at once in one worker of the instance."""
    workers = settings.web_concurrency
    if settings.concurrency is not None:
        return share(settings.concurrency, workers)
    return default_concurrency(workers)


def make_claude(settings: Settings, slots: int, redactor: Redactor) -> Claude:
    """Agent slots, or the caller's own thread when inline; `redactor` knows the secrets of the runs that go on."""
    environment = dict(settings.agent_environment)
    given: dict[str, SecretStr | str | None] = {
        "ANTHROPIC_API_KEY": settings.anthropic_api_key,
        "CLAUDE_CODE_OAUTH_TOKEN": settings.claude_code_oauth_token,
        "ANTHROPIC_BASE_URL": settings.anthropic_base_url,
    }
    for name, value in given.items():
        if value is not None:
            environment[name] = value.get_secret_value() if isinstance(value, SecretStr) else value
    egress, all_tools = Egress(settings.egress), settings.allow_unsandboxed
    if settings.inline:
        return Inline(environment, egress, all_tools=all_tools, redactor=redactor)
    return Slots(slots, environment, egress, all_tools=all_tools, redactor=redactor)


def make_poke(settings: Settings) -> Poke:
    key = settings.poke_api_key.get_secret_value() if settings.poke_api_key else None
    return Poke(settings.poke_webhook_url, key, dry_run=settings.poke_dry_run, callback_hosts=settings.callback_hosts)
