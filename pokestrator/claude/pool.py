"""Claude as the service sees it: a call that blocks until the run has ended, and leaves no process behind.

Slots runs each request in one of N warm processes of its own; Inline runs it in the caller's thread. Both keep the
owner's key from it, and let it out only through the relay. A question, which needs no agent, takes neither: it is put
from here (questions.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from pokestrator.claude import processes
from pokestrator.claude.calls import Call, Calls, OnEvent
from pokestrator.claude.egress import Egress
from pokestrator.claude.folders import remove_abandoned, run_folder
from pokestrator.claude.outcomes import failure
from pokestrator.claude.probing import probe
from pokestrator.claude.questions import Questions
from pokestrator.claude.relay import Relay, of_agents
from pokestrator.claude.slot_process import SlotProcess
from pokestrator.claude.upstream import Upstream
from pokestrator.redaction import Redactor
from pokestrator.runs import ErrorKind, RunRequest, RunResult


class Claude(Protocol):
    """Runs requests. Thread-safe."""

    def run(self, request: RunRequest, on_event: OnEvent) -> RunResult:
        """Run `request`, telling `on_event` what happens, in the caller's thread. Every failure is a result."""

    def cancel(self, run_id: str) -> None:
        """End the run of this id now, if there is one here; it returns AGENT_CRASHED.

        Does not wait for the end; may be called again and again. An id that runs nowhere, or an empty one, is ignored.
        """

    def close(self) -> None:
        """End all runs; they and later ones return AGENT_CRASHED. No process is left."""


class Slots:
    """`size` agent slots. Nothing is started before start().

    `environment` is the owner's: Claude's key, address and proxy in it are the relay's, agents see what is left.
    `redactor` is who shall know each run's secrets while it goes on.
    `all_tools` is the owner's word that agents keep all their tools where they cannot be confined.
    """

    def __init__(
        self,
        size: int,
        environment: Mapping[str, str],
        egress: Egress | None = None,
        *,
        all_tools: bool = False,
        redactor: Redactor | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}: at least one slot is needed")
        upstream = Upstream(environment)
        self._relay = Relay(upstream, egress or Egress())
        self._redactor = redactor or Redactor()
        self._slots = [SlotProcess(of_agents(environment), all_tools=all_tools) for _ in range(size)]
        self._free = list(self._slots)
        self._calls = Calls()
        self._questions = Questions(upstream, self._calls)

    def start(self) -> None:
        """Start the relay and all slots' processes; they warm up on their own. Makes this process a child subreaper."""
        processes.become_subreaper()
        remove_abandoned()
        self._relay.start()
        for each in self._slots:
            each.start()

    def run(self, request: RunRequest, on_event: OnEvent) -> RunResult:
        with self._calls.open(request, on_event) as call:
            if self._questions.takes(request):
                return self._questions.answer(call)
            chosen = self._take(call)
            if chosen is None:
                return call.ended() or failure(ErrorKind.TIMEOUT, f"no slot was free in {request.timeout_seconds:g} s")
            try:
                with _admitted(self._relay, call, self._redactor) as settle:
                    result = chosen.run(call)
                return settle(result)
            finally:
                self._give_back(chosen)

    def cancel(self, run_id: str) -> None:
        for call in self._calls.cancel(run_id):
            for each in self._slots:
                each.end(call)

    def close(self) -> None:
        self._calls.close()
        for each in self._slots:
            each.hang_up()
        for each in self._slots:
            each.close()
        self._relay.close()

    def _take(self, call: Call) -> SlotProcess | None:
        with self._calls.changed:
            return self._free.pop() if self._calls.wait(call, lambda: self._free) else None

    def _give_back(self, chosen: SlotProcess) -> None:
        with self._calls.changed:
            # One that was just replaced is still warming up: let the others go first.
            self._free.insert(len(self._free) if chosen.is_warm else 0, chosen)
            self._calls.changed.notify_all()  # one alone may have been told to end, and would leave the slot unused


class Inline:
    """Runs in the caller's own thread and process, one at a time: for a debugger, or a single run at a terminal.

    While a run goes on, what its agent sees is this whole process's environment. `environment` is the owner's, as for
    Slots.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        egress: Egress | None = None,
        *,
        all_tools: bool = False,
        redactor: Redactor | None = None,
    ) -> None:
        self._all_tools = all_tools
        upstream = Upstream(environment)
        self._relay = Relay(upstream, egress or Egress())
        self._redactor = redactor or Redactor()
        self._environment = of_agents(environment)
        self._calls = Calls()
        self._questions = Questions(upstream, self._calls)
        # Both are guarded by `changed`: no run begins while another one's processes are being killed.
        self._running: Call | None = None
        self._kill: Callable[[], object] = list

    def run(self, request: RunRequest, on_event: OnEvent) -> RunResult:
        with self._calls.open(request, on_event) as call:
            if self._questions.takes(request):
                return self._questions.answer(call)
            if not self._take_turn(call):
                late = f"another run took all of {request.timeout_seconds:g} s"
                return call.ended() or failure(ErrorKind.TIMEOUT, late)
            try:
                self._relay.start()
                with _admitted(self._relay, call, self._redactor) as settle:
                    result = self._attend(call)
                result = settle(result)
            finally:
                self._relay.close()
                self._pass_turn()
            if call.end_reason and result.error:
                return failure(ErrorKind.AGENT_CRASHED, call.end_reason, result.usage)
            return result

    def cancel(self, run_id: str) -> None:
        self._end(self._calls.cancel(run_id))

    def close(self) -> None:
        self._end(self._calls.close())

    def _take_turn(self, call: Call) -> bool:
        with self._calls.changed:
            if not self._calls.wait(call, lambda: self._running is None):
                return False
            self._running = call
            return True

    def _pass_turn(self) -> None:
        with self._calls.changed:
            self._running = None
            self._kill = list
            self._calls.changed.notify_all()

    def _attend(self, call: Call) -> RunResult:
        from pokestrator.claude import worker  # the SDK is half a second and 60 MB that a service with slots can save

        processes.become_subreaper()
        confinement = probe(all_tools=self._all_tools)
        since = processes.now()
        with run_folder() as folder:

            def kill() -> object:
                return processes.kill(lambda: processes.strays(folder.name, since, bystanders=processes.bystanders()))

            self._kill = kill
            result = worker.run(
                call.request,
                self._environment,
                confinement,
                folder,
                call.deadline,
                kill,
                call.tell,
                lambda: bool(call.end_reason),
            )
            processes.reap_orphans(since, processes.bystanders())
        return result

    def _end(self, calls: list[Call]) -> None:
        with self._calls.changed:
            if self._running in calls:
                self._kill()


@contextmanager
def _admitted(relay: Relay, call: Call, redactor: Redactor) -> Iterator[Callable[[RunResult], RunResult]]:
    """Let a call's run in at the relay while the block lasts; what settles its result afterwards.

    For as long, `redactor` knows all its secrets, the relay's token too.
    """
    with (
        relay.admit(call.request, call.tell) as (admission, request),
        redactor.also(request.variables.values()),
    ):
        call.request = request
        yield admission.settled
