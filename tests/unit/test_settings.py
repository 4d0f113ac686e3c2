"""Settings from an environment: defaults, checks, secrets, and the table in the README."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import psycopg
import psycopg.conninfo
import pytest

from pokestrator.addresses import is_safe_url
from pokestrator.environ import demo_environment, environment, minimal_environment, remove_secrets
from pokestrator.errors import SettingsError
from pokestrator.settings import Settings, environment_names, secret_names

ROOT = Path(__file__).resolve().parents[2]
DATABASE_NAMES = ("DATABASE_URL", "POSTGRES_URL", "POSTGRESQL_URL", "RENDER_DATABASE_URL", "DB_URL")
PASSWORD = "correct-horse-battery"
SECRETS = {
    "POKESTRATOR_API_KEY": PASSWORD,
    "DATABASE_URL": f"postgres://me:{PASSWORD}@db.example/app",
    "ANTHROPIC_API_KEY": PASSWORD,
    "CLAUDE_CODE_OAUTH_TOKEN": PASSWORD,
    "POKE_API_KEY": PASSWORD,
    "POKESTRATOR_SECRET_KEY": base64.urlsafe_b64encode(PASSWORD.ljust(32).encode()).decode(),
}


def problems(**environ: str) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ(environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# Values ----------------------------------------------------------------------------------------------------------


def test_an_empty_environment_gives_a_service_for_this_machine_only() -> None:
    settings = Settings.from_environ({})
    assert (settings.host, settings.port, settings.mcp_path) == ("127.0.0.1", 8000, "/mcp")
    assert (settings.agent_timeout, settings.drain_seconds, settings.concurrency) == (90, 20, None)
    assert (settings.db_pool_min_size, settings.db_pool_max_size, settings.web_concurrency) == (1, 5, 1)
    assert (settings.after_build, settings.inline, settings.poke_dry_run, settings.log_level) == (
        "ask",
        False,
        False,
        "INFO",
    )
    assert settings.poke_webhook_url == "https://poke.com/api/v1/inbound/api-message"
    assert settings.api_key is settings.database_url is settings.anthropic_api_key is settings.poke_api_key is None
    settings.refuse_open_door()


def test_values_are_read_as_their_types_and_trimmed() -> None:
    settings = Settings.from_environ(
        {
            "PORT": " 9000 ",
            "POKESTRATOR_INLINE": "1",
            "POKE_DRY_RUN": "true",
            "LOG_LEVEL": "debug",
            "MCP_PATH": "/tools/mcp/",
            "POKESTRATOR_DATA_DIR": "/tmp/data",
            "POKE_API_KEY": f"{PASSWORD}\n",
            "UNRELATED": "ignored",
        }
    )
    assert (settings.port, settings.inline, settings.poke_dry_run) == (9000, True, True)
    assert (settings.log_level, settings.mcp_path) == ("DEBUG", "/tools/mcp")
    assert settings.data_dir == Path("/tmp/data")
    assert settings.poke_api_key is not None
    assert settings.poke_api_key.get_secret_value() == PASSWORD


def test_a_blank_value_counts_as_unset() -> None:
    blank = {name: " \t" for field in Settings.model_fields for name in environment_names(field)}
    assert Settings.from_environ(blank) == Settings.from_environ({})


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("POKESTRATOR_AGENT_TIMEOUT", "abc", "a whole number from 5 to 3600"),
        ("POKESTRATOR_AGENT_TIMEOUT", "4", "a whole number from 5 to 3600"),
        ("POKESTRATOR_AGENT_TIMEOUT", "3601", "a whole number from 5 to 3600"),
        ("POKESTRATOR_AGENT_TIMEOUT", "90.5", "a whole number from 5 to 3600"),
        ("PORT", "65536", "a whole number from 0 to 65535"),
        ("WEB_CONCURRENCY", "0", "a whole number from 1 to 32"),
        ("POKESTRATOR_CONCURRENCY", "none", "a whole number from 1 to 64"),
        ("POKESTRATOR_DRAIN_SECONDS", "-1", "a whole number from 0 to 240"),
        ("DB_POOL_MAX_SIZE", "many", "a whole number from 1 to 100"),
        ("POKESTRATOR_INLINE", "maybe", "1 or 0 (or true or false)"),
        ("POKE_DRY_RUN", "2", "1 or 0 (or true or false)"),
        ("POKESTRATOR_AFTER_BUILD", "sometimes", "'ask' or 'run'"),
        ("LOG_LEVEL", "loud", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("MCP_PATH", "mcp", "a path such as /mcp"),
        ("MCP_PATH", "/", "a path such as /mcp"),
        ("MCP_PATH", "/healthz/", "not /healthz"),
        ("POKE_WEBHOOK_URL", "http://poke.com/x", "an https:// address, or http:// on this machine"),
        ("ANTHROPIC_BASE_URL", "ftp://127.0.0.1", "an https:// address, or http:// on this machine"),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_is_allowed(name: str, value: str, allowed: str) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(f"{name}={value}: must be ")
    assert allowed in problem


def test_all_bad_values_are_named_at_once() -> None:
    found = problems(PORT="x", LOG_LEVEL="loud", POKE_DRY_RUN="perhaps", POKE_WEBHOOK_URL="poke.com")
    assert sorted(problem.split("=")[0] for problem in found) == [
        "LOG_LEVEL",
        "POKE_DRY_RUN",
        "POKE_WEBHOOK_URL",
        "PORT",
    ]


def test_pool_sizes_must_agree() -> None:
    (problem,) = problems(DB_POOL_MIN_SIZE="9", DB_POOL_MAX_SIZE="3")
    assert problem == "DB_POOL_MIN_SIZE=9: must not be above DB_POOL_MAX_SIZE (3)"
    assert Settings.from_environ({"DB_POOL_MIN_SIZE": "3", "DB_POOL_MAX_SIZE": "3"}).db_pool_min_size == 3


def test_each_worker_must_have_a_run() -> None:
    (problem,) = problems(WEB_CONCURRENCY="3", POKESTRATOR_CONCURRENCY="2")
    assert problem.startswith("WEB_CONCURRENCY=3: must not be above POKESTRATOR_CONCURRENCY (2)")
    assert Settings.from_environ({"WEB_CONCURRENCY": "2", "POKESTRATOR_CONCURRENCY": "2"}).web_concurrency == 2
    assert Settings.from_environ({"WEB_CONCURRENCY": "32"}).web_concurrency == 32


def test_an_ipv6_host_is_taken_with_and_without_brackets() -> None:
    assert Settings.from_environ({"HOST": "[::1]"}).host == Settings.from_environ({"HOST": "::1"}).host == "::1"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://poke.com/x", True),
        ("http://127.0.0.1:8080/x", True),
        ("http://[::1]/x", True),
        ("http://localhost/x", True),
        ("http://poke.com/x", False),
        ("http://localhost.example.com/x", False),
        ("http://127.0.0.1@evil.example/x", False),
        ("https://", False),
        ("https://[::1", False),
        ("https://poke.com:99999/", False),
        ("file:///etc/passwd", False),
        ("//poke.com/x", False),
    ],
)
def test_only_https_and_loopback_are_safe_addresses(url: str, safe: bool) -> None:
    assert is_safe_url(url) is safe


# The database's address ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(len(DATABASE_NAMES)))
def test_the_first_name_that_is_set_gives_the_database(position: int) -> None:
    environ = {name: f"postgresql://{name.lower()}/app" for name in DATABASE_NAMES[position:]}
    settings = Settings.from_environ({**dict.fromkeys(DATABASE_NAMES[:position], ""), **environ})
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == f"postgresql://{DATABASE_NAMES[position].lower()}/app"


def test_both_schemes_of_postgresql_are_taken() -> None:
    for scheme in ("postgres", "postgresql"):
        assert Settings.from_environ({"DATABASE_URL": f"{scheme}://db/app"}).database_url is not None


@pytest.mark.parametrize("name", DATABASE_NAMES)
def test_a_bad_database_address_is_refused_by_the_name_it_was_given_under(name: str) -> None:
    (problem,) = problems(**{name: f"mysql://me:{PASSWORD}@db/app"})
    assert problem.startswith(f"{name}=(secret): must be an address that starts with postgres://")


@pytest.mark.parametrize(
    ("rest", "fix"),
    [
        (f"me:{PASSWORD}@home@db/app", "as %40"),
        (f"me:{PASSWORD}%@db/app", "as %25"),
        (f"me:{PASSWORD}%4@db/app", "as %25"),
        (f"me:{PASSWORD}%00@db/app", "other than 00"),
        (f"me:{PASSWORD}/more@db/app", "as %2F"),
        (f"me:{PASSWORD}@db:{PASSWORD}/app", "a number from 1 to 65535"),
        (f"me:{PASSWORD}@db:0/app", "a number from 1 to 65535"),
        (f"me:{PASSWORD}@db:65536/app", "a number from 1 to 65535"),
        (f"me:{PASSWORD}@one:5432,two:x/app", "a number from 1 to 65535"),
        (f"me:{PASSWORD}@::1/app", "in brackets"),
        (f"me:{PASSWORD}@[::1/app", "in brackets"),
    ],
)
def test_a_database_address_that_libpq_would_misread_is_refused_with_the_fix(rest: str, fix: str) -> None:
    (problem,) = problems(DB_URL=f"postgresql://{rest}")
    assert problem.startswith("DB_URL=(secret): must be an address ")
    assert fix in problem
    assert PASSWORD not in problem


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "/app",
        "/app?host=/var/run/postgresql",
        "me:@/app?host=/var/run/postgresql",
        "?host=/tmp",
        "%2Fvar%2Frun/app",
        f"me:{PASSWORD}%40%2F%25@db:5432/app?sslmode=require",
        f"me:{PASSWORD}:?#@db/app",
        "me@db?application_name=a@b",
        "me@one:5432,two:5433,[::1]:5434,[::2]/app",
        "me@db:/app",
    ],
)
def test_every_form_of_address_that_libpq_knows_is_taken(rest: str) -> None:
    url = f"postgresql://{rest}"
    psycopg.conninfo.conninfo_to_dict(url)
    settings = Settings.from_environ({"DATABASE_URL": url})
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url


# Secrets ---------------------------------------------------------------------------------------------------------


def test_a_refused_secret_is_not_shown_even_in_the_traceback() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"DB_URL": f"mysql://me:{PASSWORD}@db/app", "PORT": "x"})
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_settings_never_show_a_secret() -> None:
    settings = Settings.from_environ({**SECRETS, "HTTPS_PROXY": f"http://me:{PASSWORD}@proxy:3128"})
    assert PASSWORD not in f"{settings!r} {settings}"
    assert settings.agent_environment == {"HTTPS_PROXY": f"http://me:{PASSWORD}@proxy:3128"}


def test_all_secrets_are_known_by_name() -> None:
    assert secret_names() == SECRETS.keys() | set(DATABASE_NAMES)


def test_agents_inherit_no_secret() -> None:
    settings = Settings.from_environ({**SECRETS, "PATH": "/bin", "TZ": "UTC", "HOME": "/root", "AWS_SECRET": "x"})
    assert settings.agent_environment == {"PATH": "/bin", "TZ": "UTC"}


def test_agents_inherit_the_proxy_in_both_spellings() -> None:
    names = [name for upper in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY") for name in (upper, upper.lower())]
    given = dict.fromkeys(names, "http://127.0.0.1:3128")
    assert Settings.from_environ(given).agent_environment == given


def test_remove_secrets_leaves_everything_else() -> None:
    environ = {**SECRETS, "DB_URL": PASSWORD, "PATH": "/bin", "PORT": "1"}
    remove_secrets(environ)
    assert environ == {"PATH": "/bin", "PORT": "1"}


def test_process_settings_takes_the_secrets_out_of_the_environment_and_keeps_them() -> None:
    script = (
        "import os, subprocess\n"
        "from pokestrator.environ import process_settings\n"
        "settings = process_settings()\n"
        "print(subprocess.run(['env'], capture_output=True, text=True).stdout)\n"
        "assert process_settings() is settings\n"
        "assert settings.api_key.get_secret_value() == settings.poke_api_key.get_secret_value()\n"
    )
    environ = {**SECRETS, "PATH": os.environ["PATH"], "PORT": "8123"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PORT=8123" in done.stdout
    assert PASSWORD not in done.stdout


def test_helpers_and_demos_see_neither_the_owners_database_nor_poke() -> None:
    with environment({**SECRETS, "PATH": "/bin", "HOME": "/root", "PORT": "1", "ANTHROPIC_BASE_URL": " "}):
        assert minimal_environment() == {"PATH": "/bin", "HOME": "/root"}
        assert demo_environment() == {
            "PATH": "/bin",
            "HOME": "/root",
            "ANTHROPIC_API_KEY": PASSWORD,
            "CLAUDE_CODE_OAUTH_TOKEN": PASSWORD,
        }


def test_environment_is_exchanged_for_a_while_and_comes_back_after_an_error() -> None:
    before = dict(os.environ)
    with pytest.raises(RuntimeError), environment({"ONLY": "this"}):
        assert dict(os.environ) == {"ONLY": "this"}
        os.environ["ADDED"] = "inside"
        raise RuntimeError
    assert dict(os.environ) == before


def test_lists_of_hosts_and_origins_are_read_without_blanks_and_in_lower_case() -> None:
    given = {
        "POKESTRATOR_ALLOWED_HOSTS": " Example.com, *.example.org,,[::1] ",
        "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
    }
    settings = Settings.from_environ({**given, "POKESTRATOR_ALLOWED_ORIGINS": "https://App.example.com"})
    assert settings.allowed_hosts == ("example.com", "*.example.org", "[::1]")
    assert settings.callback_hosts == ("127.0.0.1",)
    assert settings.allowed_origins == ("https://app.example.com",)
    assert Settings.from_environ({}).callback_hosts == ("poke.com", "*.poke.com")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("POKESTRATOR_ALLOWED_HOSTS", "https://example.com"),
        ("POKESTRATOR_ALLOWED_HOSTS", "example.com:443"),
        ("POKESTRATOR_CALLBACK_HOSTS", "*"),
        ("POKESTRATOR_ALLOWED_ORIGINS", "example.com"),
        ("POKESTRATOR_ALLOWED_ORIGINS", "https://example.com/path"),
        ("POKESTRATOR_SECRET_KEY", "too short"),
        ("POKESTRATOR_EGRESS", "all"),
    ],
)
def test_security_settings_that_cannot_be_meant_are_refused_by_name(name: str, value: str) -> None:
    (problem,) = problems(**{name: value})
    assert problem.startswith(f"{name}=")
    assert "must be" in problem
    assert ("too short" in problem) is False


# The open door ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "192.0.2.1", "myserver", "localhost.example.com"])
def test_listening_beyond_this_machine_without_a_key_is_refused(host: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({"HOST": host}).refuse_open_door()
    (problem,) = caught.value.problems
    assert problem.startswith(f"HOST={host.strip('[]')}: ")
    assert "POKESTRATOR_API_KEY" in problem
    Settings.from_environ({"HOST": host, "POKESTRATOR_API_KEY": PASSWORD}).refuse_open_door()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_key(host: str) -> None:
    Settings.from_environ({"HOST": host}).refuse_open_door()


# The README ------------------------------------------------------------------------------------------------------


def readme_rows() -> list[list[str]]:
    """The cells of every table row of the README."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if line.startswith("|")]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([A-Z][A-Z0-9_]+)`", cell)


@pytest.mark.parametrize("field", [field for field in Settings.model_fields if environment_names(field)])
def test_the_readme_lists_the_setting_with_its_default(field: str) -> None:
    names = environment_names(field)
    row = next((row for row in readme_rows() if names_in(row[0])[:1] == [names[0]]), None)
    assert row is not None, f"no row of a table begins with `{names[0]}`"
    assert set(names) <= set(names_in(" ".join(row)))
    default = Settings.model_fields[field].default
    if isinstance(default, (str, int)) and not isinstance(default, bool):
        assert str(default) in row[1].replace("`", " ").split(), f"{names[0]}: the default {default} is missing"


def test_the_readme_lists_no_setting_that_does_not_exist() -> None:
    known = {name for field in Settings.model_fields for name in environment_names(field)}
    listed = {name for row in readme_rows() for name in names_in(row[0])}
    assert listed <= known
