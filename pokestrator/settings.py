"""All settings: their names in an environment, their checks, their defaults. environ.py reads this process's.

The table in the README lists the same names; a test holds the two together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from pokestrator.addresses import is_loopback
from pokestrator.errors import SettingsError
from pokestrator.postgres_url import check_postgres_url
from pokestrator.redaction import passwords
from pokestrator.setting_checks import (
    check_hosts,
    check_origins,
    check_path,
    check_secret_key,
    check_url,
    secret_keys,
    upper,
    without_brackets,
)

POKE_MESSAGE_URL = "https://poke.com/api/v1/inbound/api-message"

# What an agent's process may see of our environment; everything else stays out.
INHERITED_BY_AGENTS = frozenset(
    {"PATH", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"}
    | {"HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy"}
)


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _default_data_dir() -> Path:
    # The embedded PostgreSQL, started by root, opens every parent of its folder to others: keep it out of home folders.
    return Path("/var/lib/pokestrator") if _is_root() else Path(".pokestrator")


HttpUrl = Annotated[str, BeforeValidator(check_url)]
Hosts = Annotated[tuple[str, ...], BeforeValidator(check_hosts)]
Origins = Annotated[tuple[str, ...], BeforeValidator(check_origins)]


class Settings(BaseModel):
    """Every setting, checked. Field aliases are the environment's names, in the order they are tried."""

    # An error that shows its input would show a database URL with its password.
    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    # Where we listen
    host: Annotated[str, BeforeValidator(without_brackets)] = Field(
        "127.0.0.1", alias="HOST", description="address to listen on"
    )
    port: int = Field(8000, alias="PORT", ge=0, le=65_535, description="port to listen on; 0 takes a free one")
    mcp_path: Annotated[str, BeforeValidator(check_path)] = Field(
        "/mcp", alias="MCP_PATH", description="path of the MCP endpoint"
    )
    api_key: SecretStr | None = Field(
        None,
        alias="POKESTRATOR_API_KEY",
        description="key that callers of the MCP endpoint must send; needed unless HOST is loopback",
    )
    web_concurrency: int = Field(1, alias="WEB_CONCURRENCY", ge=1, le=32, description="gunicorn workers")

    allowed_hosts: Hosts = Field(
        (),
        alias="POKESTRATOR_ALLOWED_HOSTS",
        description="names that requests may be addressed to, with commas between; none: any, where a key is needed",
    )
    render_external_hostname: str | None = Field(
        None, alias="RENDER_EXTERNAL_HOSTNAME", description="set by Render; one more allowed host"
    )
    allowed_origins: Origins = Field(
        (), alias="POKESTRATOR_ALLOWED_ORIGINS", description="web origins whose pages may call, with commas between"
    )
    requests_per_minute: int = Field(
        600, alias="POKESTRATOR_REQUESTS_PER_MINUTE", ge=1, le=1_000_000, description="for each key and address"
    )
    tasks_per_minute: int = Field(
        20, alias="POKESTRATOR_TASKS_PER_MINUTE", ge=1, le=100_000, description="accepted tasks for each caller"
    )
    tasks_per_day: int = Field(
        500, alias="POKESTRATOR_TASKS_PER_DAY", ge=1, le=10_000_000, description="accepted tasks for each caller"
    )
    unfinished_tasks: int = Field(
        50, alias="POKESTRATOR_UNFINISHED_TASKS", ge=1, le=100_000, description="tasks under way for each caller"
    )

    # Database
    database_url: Annotated[SecretStr | None, BeforeValidator(check_postgres_url)] = Field(
        None,
        validation_alias=AliasChoices(
            "DATABASE_URL", "POSTGRES_URL", "POSTGRESQL_URL", "RENDER_DATABASE_URL", "DB_URL"
        ),
        description="PostgreSQL to use, the first of these that is set; none: an embedded one",
    )
    db_pool_min_size: int = Field(
        1, alias="DB_POOL_MIN_SIZE", ge=0, le=100, description="connections kept open, per worker"
    )
    db_pool_max_size: int = Field(
        5,
        alias="DB_POOL_MAX_SIZE",
        ge=1,
        le=100,
        description="connections at most, per worker (three more serve the dispatcher)",
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir,
        alias="POKESTRATOR_DATA_DIR",
        description="folder of the embedded PostgreSQL; default `.pokestrator/`, as root `/var/lib/pokestrator`",
    )

    secret_key: Annotated[SecretStr | None, BeforeValidator(check_secret_key)] = Field(
        None,
        alias="POKESTRATOR_SECRET_KEY",
        description="key that credentials and callback tokens are encrypted with; the embedded database brings its own",
    )

    # Claude
    anthropic_api_key: SecretStr | None = Field(None, alias="ANTHROPIC_API_KEY", description="key for Claude's API")
    claude_code_oauth_token: SecretStr | None = Field(
        None,
        alias="CLAUDE_CODE_OAUTH_TOKEN",
        description="token of a Claude subscription (`claude setup-token`), in place of a key",
    )
    anthropic_base_url: HttpUrl | None = Field(
        None, alias="ANTHROPIC_BASE_URL", description="another address for Claude's API"
    )
    model: str = Field("sonnet", alias="POKESTRATOR_MODEL", min_length=1, description="model that runs subagents")
    fast_model: str = Field(
        "haiku", alias="POKESTRATOR_FAST_MODEL", min_length=1, description="model that chooses and drafts subagents"
    )

    daily_budget_usd: float = Field(
        20, alias="POKESTRATOR_DAILY_BUDGET_USD", gt=0, le=100_000, description="spent on Claude a day (UTC)"
    )
    caller_daily_budget_usd: float = Field(
        10, alias="POKESTRATOR_CALLER_DAILY_BUDGET_USD", gt=0, le=100_000, description="of it for each caller"
    )

    # Agents
    egress: Literal["listed", "any", "none"] = Field(
        "listed",
        alias="POKESTRATOR_EGRESS",
        description="hosts that agents reach: `listed` in their version, `any` public one, or `none`",
    )
    allow_unsandboxed: bool = Field(
        False,
        alias="POKESTRATOR_ALLOW_UNSANDBOXED",
        description="give agents their tools even where they cannot be confined",
    )

    # Jobs
    concurrency: int | None = Field(
        None,
        alias="POKESTRATOR_CONCURRENCY",
        ge=1,
        le=64,
        description="runs at once in this instance; default: cores, but no more than memory allows at 250 MB a run",
    )
    agent_timeout: int = Field(
        90, alias="POKESTRATOR_AGENT_TIMEOUT", ge=5, le=3_600, description="seconds that a run may take"
    )
    drain_seconds: int = Field(
        20, alias="POKESTRATOR_DRAIN_SECONDS", ge=0, le=240, description="seconds that runs get to end after SIGTERM"
    )
    after_build: Literal["ask", "run"] = Field(
        "ask",
        alias="POKESTRATOR_AFTER_BUILD",
        description="`ask` the person to send the task again once a subagent is built, or `run` it at once",
    )
    retention_days: int = Field(
        30,
        alias="POKESTRATOR_RETENTION_DAYS",
        ge=1,
        le=3_650,
        description="days that ended tasks are kept; those with an undelivered result are kept beyond them",
    )
    inline: bool = Field(
        False,
        alias="POKESTRATOR_INLINE",
        description="run each job in its request's own thread, for stepping with a debugger",
    )

    # Poke
    poke_api_key: SecretStr | None = Field(
        None, alias="POKE_API_KEY", description="key for Poke's message API, made at poke.com/kitchen"
    )
    poke_webhook_url: HttpUrl = Field(POKE_MESSAGE_URL, alias="POKE_WEBHOOK_URL", description="where results are sent")
    poke_dry_run: bool = Field(
        False, alias="POKE_DRY_RUN", description="send nothing to Poke: log, record, mark delivered"
    )

    callback_hosts: Hosts = Field(
        ("poke.com", "*.poke.com"),
        alias="POKESTRATOR_CALLBACK_HOSTS",
        description="hosts of the callback addresses that requests may bring, with commas between",
    )

    # Logs
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(upper)] = Field(
        "INFO", alias="LOG_LEVEL", description="least severe events that are logged"
    )

    agent_environment: dict[str, str] = Field(
        default_factory=dict,
        repr=False,  # the address of a proxy can hold a password
        description="set by from_environ, not by a name",
    )

    @model_validator(mode="after")
    def _pool_sizes_agree(self) -> Settings:
        if self.db_pool_min_size > self.db_pool_max_size:
            most = self.db_pool_max_size
            raise ValueError(f"DB_POOL_MIN_SIZE={self.db_pool_min_size}: must not be above DB_POOL_MAX_SIZE ({most})")
        return self

    @model_validator(mode="after")
    def _each_worker_has_a_run(self) -> Settings:
        if self.concurrency is not None and self.web_concurrency > self.concurrency:
            raise ValueError(
                f"WEB_CONCURRENCY={self.web_concurrency}: must not be above POKESTRATOR_CONCURRENCY "
                f"({self.concurrency}), because each worker has at least one run"
            )
        return self

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read and check everything; a blank value counts as unset. Raises SettingsError with every problem."""
        given = {name: value.strip() for name, value in environ.items() if value.strip()}
        inherited = {name: value for name, value in given.items() if name in INHERITED_BY_AGENTS}
        try:
            return cls.model_validate({**given, "agent_environment": inherited})
        except ValidationError as error:
            raise SettingsError([_problem(given, e["loc"], e["msg"]) for e in error.errors()]) from error

    def secret_values(self) -> list[str]:
        """All values that must never reach a log, a page, a message or another process."""
        given = (getattr(self, name) for name in type(self).model_fields)
        values = [value.get_secret_value() for value in given if isinstance(value, SecretStr)]
        if self.secret_key is not None:
            values += [key.decode() for key in secret_keys(self.secret_key.get_secret_value())]
        # A driver or a proxy may quote the password alone.
        addresses = [*values, *self.agent_environment.values()]
        return [*values, *(secret for address in addresses for secret in passwords(address))]

    def refuse_open_door(self) -> None:
        """Raise SettingsError when strangers could reach the MCP endpoint without a key."""
        if self.api_key is None and not is_loopback(self.host):
            raise SettingsError(
                [
                    f"HOST={self.host}: listening beyond this machine needs a key. Set POKESTRATOR_API_KEY "
                    "to a long random value (`openssl rand -hex 32` makes one), or set HOST=127.0.0.1"
                ]
            )


def environment_names(field: str) -> tuple[str, ...]:
    """The environment names of one field of Settings, first tried first; empty for fields without one."""
    info = Settings.model_fields[field]
    if isinstance(info.validation_alias, AliasChoices):
        return tuple(str(choice) for choice in info.validation_alias.choices)
    return (info.alias,) if info.alias else ()


def setting_names() -> frozenset[str]:
    """Every environment name that settings are read from."""
    return frozenset(name for field in Settings.model_fields for name in environment_names(field))


def secret_names() -> frozenset[str]:
    """Environment names whose values must never reach a log, a page or another process."""
    secret_fields = (name for name, info in Settings.model_fields.items() if "SecretStr" in str(info.annotation))
    return frozenset(name for field in secret_fields for name in environment_names(field))


def _problem(given: Mapping[str, str], location: tuple[int | str, ...], message: str) -> str:
    if not location:  # a rule about two settings names them itself
        return message.removeprefix("Value error, ")
    name = str(location[0])
    if name not in given:  # validation aliases report the first choice
        field = next((f for f in Settings.model_fields if name in environment_names(f)), None)
        name = next((n for n in environment_names(field) if n in given), name) if field else name
    value = "(secret)" if name in secret_names() else given.get(name, "")
    return f"{name}={value}: must be {_allowed(location[0], message)}"


def _allowed(name: int | str, message: str) -> str:
    """What a setting may be, in words: the range of a number, or what its check said."""
    field = next((f for f in Settings.model_fields if name in environment_names(f)), None)
    info = Settings.model_fields[field] if field else None
    limits = {
        kind: getattr(m, kind) for m in (info.metadata if info else ()) for kind in ("ge", "le") if hasattr(m, kind)
    }
    if {"ge", "le"} <= limits.keys():
        return f"a whole number from {limits['ge']} to {limits['le']}"
    if info and info.annotation is bool:
        return "1 or 0 (or true or false)"
    return message.removeprefix("Value error, ").removeprefix("Input should be ")
