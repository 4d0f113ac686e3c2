"""The production server: one master, gthread workers. All its values come from the same settings as everything else."""

import logging
import os
import signal
import sys
from pathlib import Path

ROOT = str(Path(__file__).parent)
sys.path.insert(0, ROOT)  # the `gunicorn` command does not look where this file lies

from pokestrator import bootstrap  # noqa: E402
from pokestrator.claude.processes import hide_memory  # noqa: E402
from pokestrator.environ import process_redactor, process_settings  # noqa: E402
from pokestrator.errors import SettingsError, StoreUnavailable  # noqa: E402
from pokestrator.telemetry import configure_logging, log_uncaught_errors  # noqa: E402
from pokestrator.web.app import warm_up  # noqa: E402
from pokestrator.web.server import application_of  # noqa: E402

try:
    settings = process_settings()  # also takes the secrets out of os.environ; forked workers have them by memory
    settings.refuse_open_door()
except SettingsError as error:
    sys.exit("\n".join(f"cannot start: {problem}" for problem in error.problems))

configure_logging(settings.log_level, redact=process_redactor())
log_uncaught_errors()
hide_memory()  # workers are forked, and as hidden

wsgi_app = "wsgi:app"
pythonpath = ROOT
bind = f"[{settings.host}]:{settings.port}" if ":" in settings.host else f"{settings.host}:{settings.port}"
worker_class = "pokestrator.web.server.Worker"
logger_class = "pokestrator.web.server.Logger"
workers = settings.web_concurrency
threads = 16  # a request takes milliseconds: it waits for one COMMIT
worker_connections = 512  # fewer than a process may have files open, which is often 1,024
forwarded_allow_ips = ""  # nobody's word is taken for where a request comes from, or what its path is
timeout = 60
graceful_timeout = settings.drain_seconds + 10
control_socket_disable = True  # there is one per HOME: two instances would fight over it
proc_name = "pokestrator"


def on_starting(server):
    try:
        bootstrap.database_url(settings)  # starts the embedded PostgreSQL before any worker is forked
    except StoreUnavailable as error:
        sys.exit(f"cannot start: {error}")


def when_ready(server):
    host, port = server.LISTENERS[0].sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"Pokestrator listens on {url}{settings.mcp_path}", flush=True)
    deployed = f"https://YOUR-HOST{settings.mcp_path}"
    print(f"Connect Poke: npx poke@latest tunnel {url}{settings.mcp_path} -n pokestrator", flush=True)
    print(f"Deployed:     npx poke@latest mcp add {deployed} -n pokestrator -k YOUR_POKESTRATOR_API_KEY", flush=True)


def post_fork(server, worker):
    # Until the worker has handlers of its own it has the master's, which would swallow a SIGTERM.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def post_worker_init(worker):
    application_of(worker).start()
    warm_up(worker.wsgi)


def worker_exit(server, worker):
    if application := application_of(worker):
        application.close()
        # Not by the interpreter's own way out, which waits for threads that serve requests nobody ends.
        logging.shutdown()
        os._exit(0)


def on_exit(server):
    bootstrap.leave_embedded_database(settings)
