"""gunicorn's side of the service: a worker that begins to drain when SIGTERM reaches it, and our logs for its own."""

from __future__ import annotations

import logging
import select
from typing import Any

from pokestrator.bootstrap import Application
from pokestrator.web.app import EXTENSION
from pokestrator.web.gathering import GatheringWorker


def application_of(worker: Any) -> Application | None:
    """The Application that a gunicorn worker serves; None while it has not loaded it."""
    app = getattr(worker, "wsgi", None)
    return app.extensions[EXTENSION] if app is not None else None


# Of gunicorn's graceful_timeout, at whose end the master kills the worker, this much is kept for closing the
# application: a client that never ends its request must not use all of it up.
CLOSE_SECONDS = 7


class Worker(GatheringWorker):
    """Told apart by how it leaves.

    It stops claiming jobs at the signal, not after its HTTP connections have ended. It answers whoever has connected by
    then, and refuses whoever comes later: they are free to try another instance.
    """

    def init_process(self) -> None:
        # This process's own copy: how long run() waits for open requests after SIGTERM.
        self.cfg.set("graceful_timeout", max(1, self.cfg.graceful_timeout - CLOSE_SECONDS))
        super().init_process()

    def handle_exit(self, sig: int, frame: object) -> None:
        if application := application_of(self):
            application.request_drain()
        super().handle_exit(sig, frame)  # type: ignore[no-untyped-call]

    def handle_quit(self, sig: int, frame: object) -> None:
        if application := application_of(self):
            application.request_drain(at_once=True)
        super().handle_quit(sig, frame)  # type: ignore[no-untyped-call]

    def is_parent_alive(self) -> bool:
        """Called about once a second. False ends run(), as SIGTERM does."""
        if super().is_parent_alive():  # type: ignore[no-untyped-call]
            return True
        if application := application_of(self):
            application.request_drain()
        self.alive = False
        return False

    def set_accept_enabled(self, enabled: bool) -> None:
        """Also called when run() begins to leave."""
        super().set_accept_enabled(enabled)  # type: ignore[no-untyped-call]
        if not enabled and not self.alive:
            self._leave_door()

    def _leave_door(self) -> None:
        # gthread itself keeps its listeners while open requests end: the kernel would go on taking connections, and
        # reset all of them, earlier ones too that were not accepted yet, when it lets go.
        for listener in self.sockets:
            waiting = select.poll()
            waiting.register(listener, select.POLLIN)
            while self.nr_conns < self.worker_connections and waiting.poll(0):
                self.accept(listener)
            listener.close()


class Logger:
    """What gunicorn logs, sent through our own logging. It takes gunicorn's Config and asks nothing of it."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.error_log = logging.getLogger("gunicorn")
        # gunicorn tells its life's story at INFO.
        self.error_log.setLevel(max(logging.WARNING, logging.getLogger().level))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.error_log, name)

    def access(self, *_: object) -> None:
        """No access log: the service logs what was asked of it, with request ids."""

    def reopen_files(self) -> None:
        """We log to stderr only."""

    def close_on_exec(self) -> None:
        """We log to stderr only."""
