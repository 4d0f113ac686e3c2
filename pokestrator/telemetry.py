"""Logs: one line an event, with its fields; readable in a terminal, JSON elsewhere. Only this file renders."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

import structlog


class _Formatter(structlog.stdlib.ProcessorFormatter):
    """Takes secrets out of each line as it is written, tracebacks and libraries' records included."""

    def __init__(self, redact: Callable[[str], str], **options: Any) -> None:
        super().__init__(**options)
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(super().format(record))


def configure_logging(level: str, stream: TextIO | None = None, redact: Callable[[str], str] = str) -> None:
    """Send our events and those of all libraries to `stream` (stderr) from `level` up, each line through `redact`."""
    out = stream or sys.stderr
    renderer: Any
    if out.isatty():
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        _Formatter(
            redact,
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Libraries tell their users about their insides at INFO; ours want to hear about trouble.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # each try of an outage; we log the outage
    for noisy in ("claude_agent_sdk", "urllib3", "werkzeug", "mcp"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose calls take an event and its fields: `log.info("accepted", request_id=…)`."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger(name)
    return logger


def log_uncaught_errors() -> None:
    """Have what ends a thread, or this process, told by the log too: Python's own way writes it as it is."""

    def log_error(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if issubclass(kind, Exception):
            get_logger(__name__).critical("uncaught", exc_info=(kind, error, trace))

    sys.excepthook = log_error
    threading.excepthook = lambda args: log_error(args.exc_type, args.exc_value, args.exc_traceback)
    sys.unraisablehook = lambda args: log_error(args.exc_type, args.exc_value, args.exc_traceback)


# What turns the direction of writing, or cannot be seen, shows a reader something else than what is there.
_UNSEEN = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000), *range(0xE0000, 0xE0080)]
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *_UNSEEN], "·")


def one_line(text: str, limit: int = 200) -> str:
    """`text` on one line, cut to `limit` characters and without what a terminal would obey, for logs and timelines."""
    flat = " ".join(text.split()).translate(_CONTROLS)
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def many_lines(text: str) -> str:
    """`text` with its lines and without what a terminal would obey."""
    return "\n".join(line.expandtabs(4).translate(_CONTROLS) for line in text.replace("\r\n", "\n").split("\n"))
