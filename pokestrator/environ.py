"""This process's environment: read once, cleared of its secrets, and what others may see of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from pokestrator.redaction import Redactor
from pokestrator.settings import INHERITED_BY_AGENTS, Settings, environment_names, secret_names


@functools.cache
def process_settings() -> Settings:
    """This process's settings. The first call also takes the secrets out of `os.environ`, so that no child
    process is started with them; forked workers and gunicorn's reload get the same object again."""
    settings = Settings.from_environ(os.environ)
    remove_secrets(os.environ)
    return settings


@functools.cache
def process_redactor() -> Redactor:
    """Takes this process's secrets out of texts; runs add theirs for as long as they last."""
    return Redactor(process_settings().secret_values())


def server_environment() -> dict[str, str]:
    """This process's environment, secrets included, for the server that takes its place. Raises SettingsError."""
    Settings.from_environ(os.environ).refuse_open_door()
    # gunicorn reads this one itself, and a blank one is no number.
    return {name: value for name, value in os.environ.items() if name != "WEB_CONCURRENCY" or value.strip()}


def remove_secrets(environ: MutableMapping[str, str]) -> None:
    for name in secret_names():
        environ.pop(name, None)


def demo_environment() -> dict[str, str]:
    """This process's environment without the owner's database, Poke and server settings: what a demo may use."""
    fields = ("anthropic_api_key", "claude_code_oauth_token", "anthropic_base_url", "model", "fast_model")
    names = {name for field in (*fields, "agent_timeout") for name in environment_names(field)} | INHERITED_BY_AGENTS
    return minimal_environment() | {name: os.environ[name] for name in names if os.environ.get(name, "").strip()}


def minimal_environment() -> dict[str, str]:
    """What a helper process of ours needs of our environment, and no secret."""
    return {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}


def names_editor() -> bool:
    """Whether the person has said what to edit texts with."""
    return any(os.environ.get(name) for name in ("VISUAL", "EDITOR"))


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Make `values` this process's whole environment for a while: the Claude SDK hands all of `os.environ` on."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
