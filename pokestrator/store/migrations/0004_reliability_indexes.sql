CREATE INDEX jobs_by_idempotency_key ON jobs (idempotency_key, created_at) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_of_a_caller ON jobs (caller, created_at) WHERE caller IS NOT NULL;
CREATE INDEX jobs_to_cancel ON jobs (id) WHERE cancel_requested AND finished_at IS NULL;
CREATE INDEX jobs_ended ON jobs (finished_at) WHERE finished_at IS NOT NULL;
CREATE INDEX callbacks_dead ON callbacks (ended_at) WHERE state = 'dead';
