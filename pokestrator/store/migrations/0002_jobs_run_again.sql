-- All new columns have defaults: the release before goes on working on these tables during a deploy. One table to a
-- transaction, which waits for no long reader and holds up nobody.
ALTER TABLE jobs
    ADD COLUMN idempotency_key text, -- a digest of the caller's own key, or of caller, task and metadata
    ADD COLUMN cancel_requested boolean NOT NULL DEFAULT false,
    ADD COLUMN api_retries integer NOT NULL DEFAULT 0,
    ADD COLUMN runs integer NOT NULL DEFAULT 0; -- agent runs that were begun: from the second on, effects may be doubled
