"""Assembly: the one place that wires the parts together. Building opens nothing; start() does."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pokestrator.asking import Asker
from pokestrator.building import Builder
from pokestrator.claude import processes
from pokestrator.claude.confinement import Confinement
from pokestrator.claude.pool import Claude, Slots
from pokestrator.claude.probing import probe
from pokestrator.delivery import LEAVE_SECONDS, Delivery
from pokestrator.dispatcher import LEASE_SECONDS, Dispatcher
from pokestrator.intake import Action, Question, TaskLimits
from pokestrator.jobs import Acknowledgement, Job, JobState, JobStatus, NewJob
from pokestrator.liveness import Liveness, owner_name
from pokestrator.parts import concurrency_of, make_claude, make_poke, make_vault
from pokestrator.redaction import Redactor
from pokestrator.running import Runner, RunPolicy
from pokestrator.service import ACCEPT_SECONDS, Service
from pokestrator.setting_checks import MAKE_SECRET_KEY
from pokestrator.settings import Settings
from pokestrator.store.budgets import Budgets
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.credentials import Credentials
from pokestrator.store.embedded import embedded_in
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import IDLE_SECONDS, Database, Line
from pokestrator.store.recovery import Recovery
from pokestrator.store.rows import WAKE_CHANNEL
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.subagents import Subagents
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from pokestrator.store.widening import Widening
from pokestrator.subagents import Template
from pokestrator.sweeping import Sweeper
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

STEPPING_SECONDS = 3_600  # that somebody may stand at a breakpoint: inline, nobody renews a lease
OWNERS_FOLDER = "owners"  # in the data folder: a lock for each process that owns runs


def database_url(settings: Settings) -> str:
    """The database to use; starts or joins the embedded one when none is set. Raises StoreUnavailable."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    make_vault(settings)  # first: where its key cannot be used, no server is left running
    return embedded_in(settings.data_dir).url


def leave_embedded_database(settings: Settings) -> None:
    """Stop the embedded PostgreSQL, if that is what we use and nobody else does."""
    if settings.database_url is None:
        embedded_in(settings.data_dir).leave()


def revive_embedded_database(settings: Settings) -> None:
    """Start the embedded PostgreSQL again if that is what we use and it has died. Raises StoreUnavailable."""
    if settings.database_url is None and embedded_in(settings.data_dir).revive():
        log.warning("embedded_database_revived")


@dataclass
class Application:
    """One process's parts, wired."""

    settings: Settings
    database: Database
    jobs: Jobs
    history: History
    subagents: Subagents
    claude: Claude
    delivery: Delivery
    dispatcher: Dispatcher
    service: Service
    templates: tuple[Template, ...]
    lines: tuple[Line, ...]
    owner: str  # this process's name in the rows that it owns
    liveness: Liveness
    abort_runs: Callable[[], None]  # end all runs at once, writing no result of theirs

    def start(self) -> None:
        """Open connections, start threads and slots. Without its database it starts degraded (inline: raises)."""
        processes.hide_memory()  # the settings are in it, with their secrets
        for notice in notices(self.settings):
            log.warning(notice)
        confinement = self.confinement()
        (log.info if confinement.tier == "confined" else log.warning)(str(confinement))
        self.database.open()
        if isinstance(self.claude, Slots):
            self.claude.start()
        if self.settings.inline:
            self._prepare_inline()
            return
        self.liveness.declare(self.owner)
        self.dispatcher.start()
        self.delivery.start()

    def accept(self, job: NewJob) -> Acknowledgement:
        """Take a job in. Raises TryAgainLater."""
        if self.settings.inline:
            return self.service.accept(job, lambda _work: False)
        impatient = self.dispatcher.database_error is not None
        acknowledgement = self.service.accept(job, self.dispatcher.submit_from_memory, impatient=impatient)
        self.dispatcher.wake()
        return acknowledgement

    def ask(self, question: Question) -> JobStatus:
        """The status of a caller's job, after cancelling it if that is asked. Raises InvalidTask, TryAgainLater."""
        status = self.service.ask(question)
        if question.action is Action.CANCEL and status.state is JobState.RUNNING:
            self.service.end_run(status.request_id)
        return status

    def claim_here(self, job: NewJob) -> Job:
        """Store a job that only this process will run. Its lease is short: renew it while it runs."""
        return self.jobs.insert_claimed(job, self.owner, LEASE_SECONDS)

    def renew(self, job: Job) -> bool:
        """Renew the lease of a job claimed here; whether it still was ours and running."""
        return bool(self.jobs.renew([job], LEASE_SECONDS))

    def run_inline(self, job_id: uuid.UUID) -> None:
        """Run an accepted job in this thread, callback included."""
        self.service.run_now(job_id, self.owner, float(STEPPING_SECONDS))

    def confinement(self) -> Confinement:
        """What holds this service's agents."""
        return probe(all_tools=self.settings.allow_unsandboxed)

    def degraded_because(self) -> str | None:
        """Why the service is not whole, or None."""
        return None if self.settings.inline else self.dispatcher.database_error

    def request_drain(self, *, at_once: bool = False) -> None:
        """Begin to leave. Safe in a signal handler."""
        self.dispatcher.request_drain(at_once=at_once)

    def close(self) -> None:
        """Drain and leave nothing behind: no thread, process or connection."""
        self.dispatcher.close()
        self.claude.close()
        self.delivery.close()
        # While the database is away, a claim of ours may be written there that we never heard of.
        unsure = self.dispatcher.leaves_runs or self.dispatcher.database_error is not None
        self.liveness.withdraw(leaves_runs=unsure)
        for line in self.lines:
            line.close()
        self.database.close()

    def _prepare_inline(self) -> None:
        prepare_database(self.database, self.subagents, self.templates)
        log.info("PostgreSQL initialized and subagents table is ready")


def build(
    settings: Settings,
    url: str,
    *,
    claude: Claude | None = None,
    templates_folder: Path = TEMPLATES_FOLDER,
    redactor: Redactor | None = None,
) -> Application:
    """Wire an application for the database at `url`; `claude` and `templates_folder` may be exchanged.

    `redactor`: the one that the log uses too; runs add their secrets to it. Without one, there is one of the settings.

    Raises StoreUnavailable when the embedded database's key cannot be used.
    """
    templates = _templates(templates_folder)
    database = Database(
        url,
        min_size=settings.db_pool_min_size,
        max_size=settings.db_pool_max_size,
        idle_seconds=STEPPING_SECONDS if settings.inline else IDLE_SECONDS,
    )
    vault = make_vault(settings)
    limits = TaskLimits(settings.tasks_per_minute, settings.tasks_per_day, settings.unfinished_tasks)
    jobs, history, subagents = Jobs(database, vault, limits), History(database), Subagents(database)
    concurrency = concurrency_of(settings)
    redactor = redactor or Redactor(settings.secret_values())
    redactor.learn(vault.keys)
    runs = claude or make_claude(settings, concurrency, redactor)
    delivery = Delivery(Callbacks(database, vault), make_poke(settings))
    stopping = threading.Event()
    budgets = Budgets(database, settings.daily_budget_usd, settings.caller_daily_budget_usd)
    policy = RunPolicy(
        settings.model, settings.fast_model, settings.agent_timeout, settings.after_build, budgets.most_usd
    )
    credentials = Credentials(database, vault)
    shortlists = Shortlists(database)
    asker = Asker(jobs=jobs, credentials=credentials, budgets=budgets, claude=runs, redactor=redactor)
    builder = Builder(
        subagents=subagents,
        widening=Widening(database),
        shortlists=shortlists,
        templates=templates,
        asker=asker,
        model=settings.fast_model,
        timeout_seconds=settings.agent_timeout,
        most_usd=budgets.most_usd,
    )
    runner = Runner(
        jobs=jobs,
        subagents=subagents,
        shortlists=shortlists,
        credentials=credentials,
        templates=templates,
        asker=asker,
        builder=builder,
        policy=policy,
    )
    service = Service(
        jobs=jobs,
        history=history,
        runner=runner,
        claude=runs,
        delivery=delivery,
        stopping=stopping,
        redact=redactor,
        accept_seconds=None if settings.inline else ACCEPT_SECONDS,
    )

    def abort_runs() -> None:
        stopping.set()
        runs.close()
        delivery.stop(max(LEAVE_SECONDS, dispatcher.drain_left()))

    owner, liveness = owner_name(), Liveness(settings.data_dir.expanduser() / OWNERS_FOLDER)
    claims, heartbeats = database.line(), database.line()
    recovery = Recovery(claims)  # used by the same thread
    dispatcher = Dispatcher(
        owner=owner,
        claims=Jobs(claims),
        heartbeats=Jobs(heartbeats),
        cancellations=recovery,
        sweeper=Sweeper(
            recovery, liveness, owner=owner, lease_seconds=LEASE_SECONDS, retention_days=settings.retention_days
        ),
        notifications=lambda stop: database.notifications(WAKE_CHANNEL, stop),
        prepare=lambda: prepare_database(database, subagents, templates),
        revive=lambda: revive_embedded_database(settings),
        run=service.run_job,
        cancel_run=runs.cancel,
        abort_runs=abort_runs,
        concurrency=concurrency,
        drain_seconds=settings.drain_seconds,
    )
    return Application(
        settings=settings,
        database=database,
        jobs=jobs,
        history=history,
        subagents=subagents,
        claude=runs,
        delivery=delivery,
        dispatcher=dispatcher,
        service=service,
        templates=templates,
        lines=(claims, heartbeats),
        owner=owner,
        liveness=liveness,
        abort_runs=abort_runs,
    )


def prepare_database(database: Database, subagents: Subagents, templates: tuple[Template, ...]) -> None:
    """Apply migrations and let stored templates follow their files. Raises StoreUnavailable, MigrationChanged."""
    for name in migrate(database):
        log.info("migrated", migration=name)
    for name in subagents.follow(templates):
        log.info("template_followed", subagent=name)


def notices(settings: Settings) -> list[str]:
    """What the owner should know at start: settings that are fine to miss but leave something undone."""
    found = []
    if settings.anthropic_api_key is None and settings.claude_code_oauth_token is None:
        found.append("neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set: every run will fail")
    if settings.poke_api_key is None and not settings.poke_dry_run:
        found.append(
            "POKE_API_KEY is not set and POKE_DRY_RUN is off: jobs run, but results without a callback address of "
            "their own wait until there is a key (make one at poke.com/kitchen)"
        )
    if settings.secret_key is None and settings.database_url is not None:
        found.append(
            "POKESTRATOR_SECRET_KEY is not set: callback tokens are stored in the clear, and no credential can be "
            f"stored (`{MAKE_SECRET_KEY}` prints a key)"
        )
    return found


def _templates(folder: Path) -> tuple[Template, ...]:
    templates, problems = load_templates(folder)
    for problem in problems:
        log.error("template_skipped", file=problem.file, reason=problem.reason)
    return templates
