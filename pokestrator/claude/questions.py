"""Questions that need no agent: one structured answer, asked of the Messages API with the owner's key, from here.

A question is a request with an output schema and no tools. By the CLI it costs the start of a process; here it costs a
thread that waits. How it ends is said in the same words (outcomes.py), and what it costs is counted in the same way
(counting.py). The `anthropic` package would be no quicker and take 43 MB of each worker: docs/performance.md.
"""

from __future__ import annotations

import json
import threading
from dataclasses import replace

from pokestrator.claude.admission import Admission, Finished
from pokestrator.claude.answers import (
    HEADERS,
    Answer,
    Failed,
    Message,
    asked_again,
    body_of,
    broken,
    fault_of,
    message_in,
    read_whole,
)
from pokestrator.claude.calls import Call, Calls
from pokestrator.claude.counting import Meter
from pokestrator.claude.models import model_of
from pokestrator.claude.outcomes import Ending, failure, result_of
from pokestrator.claude.relay_messages import MESSAGES
from pokestrator.claude.upstream import KEY, Broken, Connections, Unreachable, Upstream
from pokestrator.redaction import Redactor
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

ASKS = 2  # a first answer that does not fit may be mended
RETRY_SECONDS = (0.5, 1.0)  # before the second and the third try, when the API had trouble; the CLI has three too
MOST_TOKENS = 16_000  # of an answer, its thoughts included
LEAST_TOKENS = 200  # of an answer that is worth asking for


class Questions:
    """Answers questions, each in the caller's thread. Thread-safe; opens nothing by itself.

    `calls` are the pool's: what it tells a call to end ends here at once.
    """

    def __init__(self, upstream: Upstream, calls: Calls) -> None:
        self._upstream = upstream
        self._calls = calls

    def takes(self, request: RunRequest) -> bool:
        """Whether this request is a question that can be put without the CLI, which alone may use an OAuth token."""
        is_question = request.output_schema is not None and not request.tools
        return is_question and self._upstream.token_name == KEY and model_of(request.model) is not None

    def answer(self, call: Call) -> RunResult:
        """How the question ended. Returns by its deadline, or when it is told to end, whatever the API does."""
        if ended := call.ended():
            return ended
        admission = Admission(call.request, call.tell)
        connections = self._upstream.connections(admission.cuts)
        asking = _Asking(call, self._calls, admission, connections, Redactor(self._upstream.secrets))
        try:
            threading.Thread(target=asking.run, name="question", daemon=True).start()
            with self._calls.changed:
                self._calls.wait(call, lambda: asking.result)
                result = asking.result or asking.late()
                if result.error:  # that it was told to end says more than what came of it
                    result = call.ended() or result
        except RuntimeError as error:  # the machine has no thread left for us
            result = failure(ErrorKind.INTERNAL, str(error))
        finally:
            admission.end()  # cuts what the thread may still wait for
            connections.close()
        return replace(result, usage=admission.ledger.usage(result.usage))


class _Asking:
    """One question, put in a thread of its own: no time limit of a socket holds against names that are looked up, or
    an answer that comes byte by byte. `result` is set once there is one.
    """

    def __init__(
        self, call: Call, calls: Calls, admission: Admission, connections: Connections, censor: Redactor
    ) -> None:
        self.result: RunResult | None = None
        self._call = call
        self._request = call.request
        self._calls = calls
        self._admission = admission
        self._ledger = admission.ledger
        self._connections = connections
        self._censor = censor
        self._model = model_of(call.request.model) or call.request.model
        self._most_tokens = MOST_TOKENS  # that the last answer could have
        self._last_retry = ""

    def run(self) -> None:
        try:
            result = self._ask()
        except Failed as error:
            result = error.result
        except Finished:  # nobody waits any more
            return
        except Exception as error:
            log.exception("question_broke")
            result = failure(ErrorKind.INTERNAL, repr(error))
        with self._calls.changed:
            self.result = replace(result, detail=self._censor(result.detail), text=self._censor(result.text))
            self._calls.changed.notify_all()

    def late(self) -> RunResult:
        """The result of a question that took all its time."""
        retried = f"; last API retry: {self._last_retry}" if self._last_retry else ""
        return failure(ErrorKind.TIMEOUT, f"no result after {self._request.timeout_seconds:g} s{retried}")

    def _ask(self) -> RunResult:
        """The answer, or what is wrong with the last one. Raises Failed, Finished."""
        messages: list[Message] = [{"role": "user", "content": self._request.prompt}]
        fault = ""
        for _ in range(ASKS):
            answer = self._put(messages)
            if answer.text.strip():
                self._tell("text", answer.text)
            if answer.stop_reason == "refusal":
                return result_of(
                    Ending(False, "refusal", stop_reason="refusal", text=answer.text), structured_wanted=True
                )
            if answer.stop_reason == "max_tokens":
                return self._too_long()
            fault = fault_of(answer, self._request.output_schema or {})
            if not fault:
                return result_of(
                    Ending(False, "success", text=answer.text, structured=answer.value), structured_wanted=True
                )
            messages = [*messages, *asked_again(answer, fault)]
        return failure(ErrorKind.NO_OUTPUT, fault)

    def _put(self, messages: list[Message]) -> Answer:
        """One answer, by as many tries as its trouble allows. Raises Failed, Finished."""
        for attempt, pause in enumerate(RETRY_SECONDS, 1):
            try:
                return self._post(messages)
            except Failed as error:
                # A try that would come too late is not waited for: what is wrong says more than that time was short.
                if not error.result.is_transient or not self._calls.pause(self._call, max(pause, error.wait)):
                    raise
                self._last_retry = f"{self._censor(str(error))}, attempt {attempt} of {len(RETRY_SECONDS)}"
                self._tell("retry", self._last_retry)
        return self._post(messages)

    def _post(self, messages: list[Message]) -> Answer:
        """One try. Raises Failed, Finished."""
        self._most_tokens = self._affordable(messages)
        if self._most_tokens < LEAST_TOKENS:
            spent, budget = self._ledger.spent_usd(), self._ledger.budget_usd
            detail = f"{spent:.4f} of {budget:g} US dollars were spent; the rest is too little for an answer"
            raise Failed(failure(ErrorKind.BUDGET_LIMIT, detail))
        body = json.dumps(body_of(self._request, self._model, self._most_tokens, messages)).encode()
        meter = Meter(self._model, len(body))
        with self._admission.asking():  # it may have ended while this was made
            self._ledger.open(meter)
        counts = True
        try:
            answer = self._connections.post(MESSAGES, body, HEADERS)
            counts = answer.status == 200
            data = read_whole(answer)
            meter.feed_whole(data.rstrip())
            return message_in(data)
        except Unreachable as error:
            counts = False  # it never arrived
            raise Failed(failure(ErrorKind.UNREACHABLE, str(error), is_transient=True)) from error
        except Broken as error:
            raise broken(str(error)) from error
        finally:
            self._ledger.close(meter, counts=counts)

    def _affordable(self, messages: list[Message]) -> int:
        """Tokens that the budget can pay for an answer in any case, up to MOST_TOKENS: no token is under a byte."""
        asked = body_of(self._request, self._model, MOST_TOKENS, messages)
        most_tokens = len(json.dumps(asked, ensure_ascii=False).encode(errors="replace"))
        return min(MOST_TOKENS, self._ledger.output_tokens_left(self._model, most_tokens))

    def _too_long(self) -> RunResult:
        """The answer was cut at the tokens it could have; fewer than usual were the budget's doing."""
        kind = ErrorKind.NO_OUTPUT if self._most_tokens == MOST_TOKENS else ErrorKind.BUDGET_LIMIT
        return failure(kind, f"the answer is longer than {self._most_tokens} tokens")

    def _tell(self, kind: str, text: str) -> None:
        self._call.tell(RunEvent(kind, one_line(self._censor(text))))
