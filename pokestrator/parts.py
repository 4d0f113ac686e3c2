"""Parts that bootstrap.py wires: what speaks to Claude and to Poke, what secrets are encrypted with, what runs jobs."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import SecretStr

from pokestrator.asking import Asker
from pokestrator.building import Builder
from pokestrator.claude.capacity import default_concurrency, share
from pokestrator.claude.egress import Egress
from pokestrator.claude.pool import Claude, Inline, Slots
from pokestrator.poke.api import Poke
from pokestrator.redaction import Redactor
from pokestrator.routing import Router
from pokestrator.running import Runner, RunPolicy
from pokestrator.settings import Settings
from pokestrator.store.budgets import Budgets
from pokestrator.store.credentials import Credentials
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.secrets import Vault, key_in
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.subagents import Subagents
from pokestrator.store.widening import Widening
from pokestrator.subagents import Template


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


def make_runner(
    settings: Settings,
    database: Database,
    vault: Vault,
    jobs: Jobs,
    templates: Sequence[Template],
    *,
    claude: Claude,
    redactor: Redactor,
) -> Runner:
    """What takes one job from its route to its result."""
    budgets = Budgets(database, settings.daily_budget_usd, settings.caller_daily_budget_usd)
    subagents, shortlists, credentials = Subagents(database), Shortlists(database), Credentials(database, vault)
    asker = Asker(jobs=jobs, credentials=credentials, budgets=budgets, claude=claude, redactor=redactor)
    builder = Builder(
        subagents=subagents,
        widening=Widening(database),
        shortlists=shortlists,
        templates=templates,
        asker=asker,
        model=settings.fast_model,
        timeout_seconds=settings.agent_timeout,
        most_usd=budgets.most_usd,
    )
    return Runner(
        jobs=jobs,
        subagents=subagents,
        router=Router(shortlists, templates, settings.fast_model),
        credentials=credentials,
        templates=templates,
        asker=asker,
        builder=builder,
        policy=RunPolicy(settings.model, settings.agent_timeout, settings.after_build, budgets.most_usd),
    )
