"""The WSGI application: the MCP endpoint and /healthz."""

from __future__ import annotations

import flask

from pokestrator import __version__
from pokestrator.addresses import is_loopback
from pokestrator.bootstrap import Application
from pokestrator.settings import Settings
from pokestrator.web.guard import Guard
from pokestrator.web.mcp import mcp_blueprint

EXTENSION = "pokestrator"

# What strangers may learn of a database's trouble: none of its names and addresses. The log has the whole reason.
TROUBLES = (
    "connection refused",
    "timeout",
    "password authentication failed",
    "resolve host",
    "permission denied",
    "too many",
    "starting up",
    "shutting down",
    "read-only",
    "does not exist",
    "not connected yet",
)

# Of each response. Nothing here is a page that loads anything, and nothing may be kept or shown inside another page.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def create_app(application: Application) -> flask.Flask:
    """The Flask application for a wired Application, which the server starts once it has forked."""
    settings = application.settings
    app = flask.Flask("pokestrator", static_folder=None)
    app.extensions[EXTENSION] = application
    app.register_blueprint(
        mcp_blueprint(
            application.accept,
            application.ask,
            path=settings.mcp_path,
            guard=make_guard(settings),
            callback_hosts=settings.callback_hosts,
            after_ack=application.run_inline if settings.inline else None,
        )
    )

    @app.after_request
    def secure(response: flask.Response) -> flask.Response:
        for name, value in SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    # Without the guard: a host's own health check addresses us by a name of its own.
    @app.get("/healthz")
    def healthz() -> dict[str, object]:
        """200 while the process serves. `degraded` says why it is not whole, so that a host does not restart it."""
        held = application.confinement()
        about = {"version": __version__, "sandbox": {"tier": held.tier, "egress": held.egress}}
        why = application.degraded_because()
        if why is None:
            return {"status": "ok", **about}
        return {"status": "degraded", "why": f"database: {_in_short(why)}", **about}

    return app


def allowed_hosts(settings: Settings) -> tuple[str, ...]:
    render = settings.render_external_hostname
    return (*settings.allowed_hosts, render.lower()) if render else settings.allowed_hosts


def make_guard(settings: Settings) -> Guard:
    return Guard(
        settings.api_key.get_secret_value() if settings.api_key else None,
        hosts=allowed_hosts(settings),
        origins=settings.allowed_origins,
        is_local=is_loopback(settings.host),
        requests_per_minute=settings.requests_per_minute,
    )


def warm_up(app: flask.Flask) -> None:
    """Answer one request from within, so that the first caller does not wait for what is made at first use."""
    application: Application = app.extensions[EXTENSION]
    settings = application.settings
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    hosts = allowed_hosts(settings) if settings.api_key else ()
    host = hosts[0].replace("*", "www") if hosts else "localhost"
    app.test_client().post(
        settings.mcp_path,
        base_url=f"http://{host}",
        json={"jsonrpc": "2.0", "id": 0, "method": "tools/list"},
        headers={"Authorization": f"Bearer {key}", "Accept": "application/json, text/event-stream"},
    ).close()


def _in_short(reason: str) -> str:
    return next((trouble for trouble in TROUBLES if trouble in reason.lower()), "the log says why")
