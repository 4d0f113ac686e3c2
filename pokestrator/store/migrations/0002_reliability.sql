-- All columns have defaults: the release before this one goes on working on these tables during a deploy.
ALTER TABLE jobs
    ADD COLUMN idempotency_key text, -- a digest of the caller's own key, or of caller, task and metadata
    ADD COLUMN cancel_requested boolean NOT NULL DEFAULT false,
    ADD COLUMN api_retries integer NOT NULL DEFAULT 0,
    ADD COLUMN runs integer NOT NULL DEFAULT 0; -- agent runs that were begun: from the second on, effects may be doubled
CREATE INDEX jobs_by_idempotency_key ON jobs (idempotency_key, created_at) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_of_a_caller ON jobs (caller, created_at) WHERE caller IS NOT NULL;
CREATE INDEX jobs_to_cancel ON jobs (id) WHERE cancel_requested AND finished_at IS NULL;
CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL;

ALTER TABLE callbacks
    ADD COLUMN begun_at timestamptz NOT NULL DEFAULT now(), -- of the schedule; a replay begins it anew
    ADD COLUMN attempts_before integer NOT NULL DEFAULT 0; -- made before the last replay
CREATE INDEX callbacks_dead ON callbacks (ended_at) WHERE state = 'dead';
