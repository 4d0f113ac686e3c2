"""Builds the application for gunicorn. `python wsgi.py` serves it for stepping: jobs run in their requests' threads."""

import os
import sys

from pokestrator import bootstrap
from pokestrator.environ import process_redactor, process_settings
from pokestrator.errors import SettingsError, StoreUnavailable
from pokestrator.telemetry import configure_logging
from pokestrator.web.app import EXTENSION, create_app
from pokestrator.web.stepping import listen

if __name__ == "__main__":
    os.environ["POKESTRATOR_INLINE"] = "1"

try:
    settings = process_settings()
    settings.refuse_open_door()
except SettingsError as error:
    sys.exit("\n".join(f"cannot start: {problem}" for problem in error.problems))

configure_logging(settings.log_level, redact=process_redactor())
try:
    app = create_app(bootstrap.build(settings, bootstrap.database_url(settings), redactor=process_redactor()))
except StoreUnavailable as error:
    sys.exit(f"cannot start: {error}")

if __name__ == "__main__":
    try:
        app.extensions[EXTENSION].start()
        server, address = listen(app, settings.host, settings.port)
        print(f"{address}{settings.mcp_path}, one process, for stepping", file=sys.stderr)
        server.serve_forever()
    except StoreUnavailable as error:
        sys.exit(f"database init failed: {error}")
    finally:
        app.extensions[EXTENSION].close()
        bootstrap.leave_embedded_database(settings)
