-- The words of each enum stand in pokestrator/jobs.py, runs.py and subagents.py too; a test holds them equal.
CREATE TYPE job_state AS ENUM ('queued', 'running', 'succeeded', 'failed', 'cancelled');
CREATE TYPE job_route AS ENUM ('match', 'template', 'build_new');
CREATE TYPE channel AS ENUM ('callback', 'api_message', 'none');
CREATE TYPE callback_state AS ENUM ('pending', 'delivered', 'dead');
CREATE TYPE subagent_origin AS ENUM ('built', 'template');
CREATE TYPE version_author AS ENUM ('drafter', 'template', 'owner');
CREATE TYPE error_kind AS ENUM (
    'unauthorized', 'rate_limited', 'overloaded', 'api_error', 'unreachable', 'stream_cut', 'timeout', 'agent_crashed',
    'no_output', 'turn_limit', 'budget_limit', 'refusal', 'invalid_draft', 'interrupted', 'not_stored', 'internal'
);

-- How tasks, examples and descriptions are read for search: an address says only that there is a link, and numbers
-- (amounts, dates) do not tell kinds of tasks apart.
CREATE FUNCTION searchable(words text) RETURNS tsvector LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT to_tsvector('english'::regconfig,
        regexp_replace(regexp_replace(words, 'https?://\S+|www\.\S+', ' link ', 'gi'), '\y\d+\y', ' ', 'g'))
$$;

CREATE TABLE subagents (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name ~ '^[a-z][a-z0-9_]{2,47}$'),
    origin subagent_origin NOT NULL,
    version integer NOT NULL CHECK (version >= 1), -- the current one
    -- What full-text search looks in: name, description and examples. Written whenever one of them changes.
    search tsvector NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX subagents_search ON subagents USING gin (search);

CREATE TABLE subagent_versions (
    subagent_id bigint NOT NULL REFERENCES subagents ON DELETE CASCADE,
    version integer NOT NULL CHECK (version >= 1),
    author version_author NOT NULL,
    description text NOT NULL,
    system_prompt text NOT NULL,
    tools text[] NOT NULL,
    model text,
    max_turns integer CHECK (max_turns >= 1),
    timeout_seconds integer CHECK (timeout_seconds >= 1),
    max_budget_usd double precision CHECK (max_budget_usd > 0),
    credentials text[] NOT NULL,
    hosts text[] NOT NULL,
    digest text NOT NULL, -- equal for equal definitions (a template's: and equal examples)
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subagent_id, version)
);
ALTER TABLE subagents ADD FOREIGN KEY (id, version) REFERENCES subagent_versions (subagent_id, version)
    DEFERRABLE INITIALLY DEFERRED;

CREATE TABLE subagent_examples (
    subagent_id bigint NOT NULL REFERENCES subagents ON DELETE CASCADE,
    task text NOT NULL CHECK (length(task) BETWEEN 1 AND 2000),
    source version_author NOT NULL, -- a template's examples come and go with its file
    search tsvector GENERATED ALWAYS AS (searchable(task)) STORED,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subagent_id, task)
);

CREATE TABLE jobs (
    id uuid PRIMARY KEY,
    task text NOT NULL CHECK (length(task) BETWEEN 1 AND 20000),
    metadata jsonb NOT NULL,
    caller text,
    channel channel NOT NULL,
    callback_url text,
    callback_token text,
    state job_state NOT NULL DEFAULT 'queued',
    route job_route,
    route_reason text,
    subagent_id bigint REFERENCES subagents ON DELETE SET NULL,
    subagent_version integer,
    interruptions integer NOT NULL DEFAULT 0,
    claim_seq bigint NOT NULL DEFAULT 0, -- the fence: only ever grows
    owner text,
    lease_until timestamptz,
    run_at timestamptz NOT NULL DEFAULT now(),
    result text,
    error_kind error_kind,
    error_detail text,
    cost_usd double precision NOT NULL DEFAULT 0,
    input_tokens bigint NOT NULL DEFAULT 0,
    output_tokens bigint NOT NULL DEFAULT 0,
    turns integer NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    finished_at timestamptz,
    CONSTRAINT callback_target_goes_with_its_channel
        CHECK ((channel = 'callback') = (callback_url IS NOT NULL)
            AND (callback_url IS NULL) = (callback_token IS NULL)),
    CONSTRAINT only_running_jobs_are_owned
        CHECK ((state = 'running') = (owner IS NOT NULL AND lease_until IS NOT NULL)),
    CONSTRAINT ended_jobs_say_when
        CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)),
    CONSTRAINT failed_jobs_say_why CHECK ((state = 'failed') = (error_kind IS NOT NULL)),
    CONSTRAINT succeeded_jobs_have_a_result CHECK (state <> 'succeeded' OR result IS NOT NULL)
);
CREATE INDEX jobs_ready ON jobs (run_at) WHERE state = 'queued';
CREATE INDEX jobs_leased ON jobs (lease_until) WHERE state = 'running';

CREATE TABLE job_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id uuid NOT NULL REFERENCES jobs ON DELETE CASCADE,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    kind text NOT NULL,
    text text NOT NULL
);
CREATE INDEX job_events_of_a_job ON job_events (job_id, id);

-- The outbox: a row is written in the transaction that ends its job.
CREATE TABLE callbacks (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    job_id uuid NOT NULL UNIQUE REFERENCES jobs ON DELETE CASCADE,
    content text NOT NULL,
    channel channel NOT NULL CHECK (channel <> 'none'),
    state callback_state NOT NULL DEFAULT 'pending',
    attempts integer NOT NULL DEFAULT 0, -- also the fence of a claim
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz,
    last_status integer,
    last_error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    CONSTRAINT ended_callbacks_say_when CHECK ((state = 'pending') = (ended_at IS NULL))
);
CREATE INDEX callbacks_due ON callbacks (next_attempt_at) WHERE state = 'pending';
