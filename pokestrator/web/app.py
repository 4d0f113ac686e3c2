"""The WSGI application: the MCP endpoint and /healthz."""

from __future__ import annotations

import flask

from pokestrator import __version__
from pokestrator.bootstrap import Application
from pokestrator.web.mcp import mcp_blueprint

EXTENSION = "pokestrator"


def create_app(application: Application) -> flask.Flask:
    """The Flask application for a wired Application, which the server starts once it has forked."""
    settings = application.settings
    app = flask.Flask("pokestrator", static_folder=None)
    app.extensions[EXTENSION] = application
    app.register_blueprint(
        mcp_blueprint(
            application.accept,
            path=settings.mcp_path,
            api_key=settings.api_key.get_secret_value() if settings.api_key else None,
            after_ack=application.run_inline if settings.inline else None,
        )
    )

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        """200 while the process serves. `degraded` says why it is not whole, so that a host does not restart it."""
        why = application.degraded_because()
        if why is None:
            return {"status": "ok", "version": __version__}
        return {"status": "degraded", "why": f"database: {why}", "version": __version__}

    return app
