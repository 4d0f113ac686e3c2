"""The WSGI application: the MCP endpoint and /healthz."""

from __future__ import annotations

import flask

from pokestrator import __version__
from pokestrator.bootstrap import Application
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
            api_key=settings.api_key.get_secret_value() if settings.api_key else None,
            after_ack=application.run_inline if settings.inline else None,
        )
    )

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


def warm_up(app: flask.Flask) -> None:
    """Answer one request from within, so that the first caller does not wait for what is made at first use."""
    application: Application = app.extensions[EXTENSION]
    settings = application.settings
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    app.test_client().post(
        settings.mcp_path,
        base_url="http://localhost",
        json={"jsonrpc": "2.0", "id": 0, "method": "tools/list"},
        headers={"Authorization": f"Bearer {key}", "Accept": "application/json, text/event-stream"},
    ).close()


def _in_short(reason: str) -> str:
    return next((trouble for trouble in TROUBLES if trouble in reason.lower()), "the log says why")
