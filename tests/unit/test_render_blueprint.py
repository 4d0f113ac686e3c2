"""render.yaml: what Render asks of a Blueprint, and what we ask of our deployment.

The schema below says, in our words, what Render's Blueprint specification (https://render.com/docs/blueprint-spec)
asks of the kinds of entries that we use: a web service with a native runtime, its environment, and a PostgreSQL
database. It was written from second-hand descriptions of that specification, not from the published JSON Schema
itself. Where the prose asks for more than the schema (`buildCommand`, `startCommand`, one source for each value, a path
that starts with a slash), so does this one.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pokestrator.settings import Settings, environment_names, secret_names

BLUEPRINT = Path(__file__).resolve().parents[2] / "render.yaml"

Document = dict[str, Any]


def closed(required: list[str], properties: Document) -> Document:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


TEXT = {"type": "string", "minLength": 1}
YES_NO = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 1}
REGION = {"enum": ["oregon", "ohio", "virginia", "frankfurt", "singapore"]}
LITERAL = {"type": ["string", "number"]}  # a bare `true` or `off` is refused: quote it
ALLOWED_ADDRESSES = {
    "type": "array",
    "items": {"type": "object", "required": ["source"], "properties": {"source": TEXT, "description": TEXT}},
}

ENVIRONMENT_VARIABLE = {
    "oneOf": [
        closed(["key", "value"], {"key": TEXT, "value": LITERAL, "previewValue": LITERAL}),
        closed(["key", "generateValue"], {"key": TEXT, "generateValue": {"const": True}}),
        closed(["key", "sync"], {"key": TEXT, "sync": {"const": False}}),
        closed(
            ["key", "fromDatabase"],
            {
                "key": TEXT,
                "fromDatabase": closed(
                    ["name", "property"],
                    {
                        "name": TEXT,
                        "property": {
                            "enum": [
                                *("connectionString", "connectionPoolString", "host"),
                                *("port", "user", "password", "database"),
                            ]
                        },
                    },
                ),
            },
        ),
    ]
}

WEB_SERVICE = closed(
    ["type", "name", "runtime", "buildCommand", "startCommand"],
    {
        "type": {"const": "web"},
        "name": TEXT,
        "runtime": {"enum": ["elixir", "go", "node", "python", "ruby", "rust"]},
        "plan": {
            "enum": [
                *("free", "starter", "standard", "pro", "pro plus", "pro max", "pro ultra"),
                *("0.5c-512mb", "1c-2g", "2c-4g", "2c-8g", "4c-8g", "4c-16g", "8c-16g", "8c-32g"),
            ]
        },
        "region": REGION,
        "repo": TEXT,
        "branch": TEXT,
        "rootDir": TEXT,
        "buildCommand": TEXT,
        "preDeployCommand": TEXT,
        "startCommand": TEXT,
        "autoDeployTrigger": {"enum": ["commit", "checksPass", "off"]},
        "healthCheckPath": {"type": "string", "pattern": "^/"},
        "maxShutdownDelaySeconds": {"type": "integer", "minimum": 1, "maximum": 300},
        "numInstances": COUNT,
        "envVars": {"type": "array", "items": ENVIRONMENT_VARIABLE},
        "domains": {"type": "array", "items": TEXT},
    },
)
# The dashboard refuses this pair ("not supported for free tier services"); the published schema does not say it.
WEB_SERVICE["not"] = {
    "required": ["plan", "maxShutdownDelaySeconds"],
    "properties": {"plan": {"const": "free"}},
}

DATABASE = closed(
    ["name"],
    {
        "name": TEXT,
        "plan": {
            "enum": [
                *("free", "basic-256mb", "basic-1gb", "basic-4gb", "pro-4gb", "pro-8gb", "pro-16gb"),
                *("0.1c-256mb", "0.5c-1g", "1c-2g", "1c-4g", "2c-4g", "2c-8g", "2c-16g", "4c-16g"),
            ]
        },
        "region": REGION,
        "postgresMajorVersion": {"enum": [str(version) for version in range(10, 19)]},  # text, never a number
        "databaseName": TEXT,
        "user": TEXT,
        "diskSizeGB": {"anyOf": [{"const": 1}, {"type": "integer", "minimum": 5, "multipleOf": 5}]},
        "storageAutoscalingEnabled": YES_NO,
        "ipAllowList": ALLOWED_ADDRESSES,
    },
)

BLUEPRINT_SCHEMA = closed(
    ["services", "databases"],
    {
        "services": {"type": "array", "items": WEB_SERVICE},
        "databases": {"type": "array", "items": DATABASE},
    },
)


def render_problems(document: Document) -> list[str]:
    """What Render would refuse, one line a problem, each starting with the place in the document."""
    errors = jsonschema.Draft202012Validator(BLUEPRINT_SCHEMA).iter_errors(document)
    problems = [f"{error.json_path}: {error.message[-200:]}" for error in errors]
    if problems:
        return problems
    databases = [database["name"] for database in document["databases"]]
    names = databases + [service["name"] for service in document["services"]]
    problems += [f"{name}: two resources with this name" for name in set(names) if names.count(name) > 1]
    for service in document["services"]:
        keys = [variable["key"] for variable in service["envVars"]]
        problems += [f"{key}: set twice" for key in set(keys) if keys.count(key) > 1]
        problems += [
            f"{variable['key']}: no database {variable['fromDatabase']['name']!r} here"
            for variable in service["envVars"]
            if "fromDatabase" in variable and variable["fromDatabase"]["name"] not in databases
        ]
    return problems


def our_problems(document: Document) -> list[str]:
    """What Render would take and we would regret."""
    [service] = document["services"]
    variables = {variable["key"]: variable for variable in service["envVars"]}
    known = {name for field in Settings.model_fields for name in environment_names(field)} | {"PYTHON_VERSION"}
    drain = int(
        variables.get("POKESTRATOR_DRAIN_SECONDS", {}).get("value", Settings.model_fields["drain_seconds"].default)
    )
    checks = {
        **{
            f"{key} must be generated": variables.get(key, {}).get("generateValue") is True
            for key in ("POKESTRATOR_API_KEY", "POKESTRATOR_SECRET_KEY")
        },
        "HOST must be 0.0.0.0, or Render finds no port": variables.get("HOST", {}).get("value") == "0.0.0.0",
        "DATABASE_URL must come from the database": "fromDatabase" in variables.get("DATABASE_URL", {}),
        "the free plan sleeps": service.get("plan", "starter") != "free",
        "startCommand must begin with exec": service["startCommand"].startswith("exec "),
        "healthCheckPath must be /healthz": service.get("healthCheckPath") == "/healthz",
        "maxShutdownDelaySeconds must be the drain + 30": service.get("maxShutdownDelaySeconds", 30) >= drain + 30,
        "PORT is Render's to give": "PORT" not in variables,
    }
    problems = [problem for problem, holds in checks.items() if not holds]
    problems += [
        f"{key}: must be asked for"
        for key in ("ANTHROPIC_API_KEY", "POKE_API_KEY")
        if variables.get(key, {}).get("sync") is not False
    ]
    problems += [f"{key}: no setting of ours" for key in variables if key not in known]
    problems += [f"{key}: a secret in plain sight" for key in secret_names() if "value" in variables.get(key, {})]
    return problems


def load(text: str) -> Document:
    document = yaml.safe_load(text)
    assert isinstance(document, dict)
    return document


@pytest.fixture
def blueprint() -> Document:
    return load(BLUEPRINT.read_text())


def test_render_would_take_the_blueprint(blueprint: Document) -> None:
    assert render_problems(blueprint) == []


def test_the_blueprint_deploys_what_we_mean(blueprint: Document) -> None:
    assert our_problems(blueprint) == []


def test_the_python_on_render_is_the_one_the_type_checker_is_told_about(blueprint: Document) -> None:
    pyproject = BLUEPRINT.with_name("pyproject.toml").read_text()
    version = variable(blueprint, "PYTHON_VERSION")["value"]
    assert isinstance(version, str) and version.count(".") == 2, "Render wants all three numbers, quoted"
    assert f'python_version = "{version.rpartition(".")[0]}"' in pyproject


def test_the_values_are_ones_that_settings_accept(blueprint: Document) -> None:
    literal = {v["key"]: str(v["value"]) for v in blueprint["services"][0]["envVars"] if "value" in v}
    generated = base64.b64encode(bytes(range(224, 256))).decode()  # as the specification has it: 256 bits in base64
    filled_in = dict.fromkeys(("POKESTRATOR_API_KEY", "POKESTRATOR_SECRET_KEY"), generated)
    filled_in |= {"DATABASE_URL": "postgresql://u:p@dpg-x-a/db", "PORT": "10000"}

    settings = Settings.from_environ({**literal, **filled_in})

    settings.refuse_open_door()
    assert (settings.host, settings.port, settings.concurrency, settings.web_concurrency) == ("0.0.0.0", 10000, 1, 1)


def service(document: Document) -> Document:
    found: Document = document["services"][0]
    return found


def variable(document: Document, key: str) -> Document:
    found: Document = next(v for v in service(document)["envVars"] if v["key"] == key)
    return found


def renamed(document: Document, old: str, new: str) -> None:
    service(document)[new] = service(document).pop(old)


# Each breaks the document in place; the second value is part of the problem that must be reported.
BREAKS: dict[str, tuple[Callable[[Document], object], str]] = {
    "env for runtime": (lambda d: renamed(d, "runtime", "env"), "'runtime' is a required property"),
    "a misspelt field": (
        lambda d: renamed(d, "healthCheckPath", "healthcheckPath"),
        "'healthcheckPath' was unexpected",
    ),
    "no start command": (lambda d: service(d).pop("startCommand"), "'startCommand' is a required property"),
    "an unknown plan": (lambda d: service(d).update(plan="tiny"), "services[0].plan"),
    "an unknown trigger": (lambda d: service(d).update(autoDeployTrigger=False), "services[0].autoDeployTrigger"),
    "a delay over 300": (lambda d: service(d).update(maxShutdownDelaySeconds=301), "greater than the maximum of 300"),
    "a delay on the free plan": (lambda d: service(d).update(plan="free"), "should not be valid under"),
    "a relative path": (lambda d: service(d).update(healthCheckPath="healthz"), "services[0].healthCheckPath"),
    "a number for a version": (lambda d: d["databases"][0].update(postgresMajorVersion=18), "postgresMajorVersion"),
    "two sources of a value": (lambda d: variable(d, "POKE_API_KEY").update(value="x"), "not valid under any"),
    "a bare yes": (lambda d: variable(d, "HOST").update(value=True), "not valid under any"),
    "another database": (
        lambda d: variable(d, "DATABASE_URL")["fromDatabase"].update(name="other"),
        "DATABASE_URL: no database 'other' here",
    ),
    "a variable twice": (lambda d: service(d)["envVars"].append({"key": "HOST", "value": "::"}), "HOST: set twice"),
    "no exec": (lambda d: service(d).update(startCommand="gunicorn wsgi:app"), "must begin with exec"),
    "a short delay": (lambda d: service(d).update(maxShutdownDelaySeconds=49), "must be the drain + 30"),
    "the default delay": (lambda d: service(d).pop("maxShutdownDelaySeconds"), "must be the drain + 30"),
    "a longer drain": (
        lambda d: service(d)["envVars"].append({"key": "POKESTRATOR_DRAIN_SECONDS", "value": "60"}),
        "must be the drain + 30",
    ),
    "another health check": (lambda d: service(d).update(healthCheckPath="/"), "healthCheckPath must be /healthz"),
    "loopback": (lambda d: variable(d, "HOST").update(value="127.0.0.1"), "HOST must be 0.0.0.0"),
    "a key for all to read": (
        lambda d: service(d)["envVars"].append({"key": "CLAUDE_CODE_OAUTH_TOKEN", "value": "x"}),
        "CLAUDE_CODE_OAUTH_TOKEN: a secret in plain sight",
    ),
    "no secret key": (
        lambda d: service(d)["envVars"].remove(variable(d, "POKESTRATOR_SECRET_KEY")),
        "POKESTRATOR_SECRET_KEY must be generated",
    ),
    "no key": (lambda d: variable(d, "POKESTRATOR_API_KEY").update(key="POKESTRATOR_KEY"), "must be generated"),
    "a key that is not asked for": (lambda d: service(d)["envVars"].pop(), "POKE_API_KEY: must be asked for"),
    "a name nobody reads": (lambda d: variable(d, "HOST").update(key="HOSTNAME"), "HOSTNAME: no setting of ours"),
}


@pytest.mark.parametrize(("break_it", "expected"), BREAKS.values(), ids=BREAKS)
def test_a_broken_blueprint_is_reported(
    blueprint: Document, break_it: Callable[[Document], object], expected: str
) -> None:
    broken = copy.deepcopy(blueprint)
    break_it(broken)

    problems = render_problems(broken) or our_problems(broken)

    assert any(expected in problem for problem in problems), problems
