-- All new columns are empty at first: the release before goes on working on this table during a deploy.
CREATE TYPE verdict AS ENUM ('good', 'bad');
ALTER TABLE jobs
    ADD COLUMN decision jsonb, -- candidates, scores, who decided, why, milliseconds, cost
    ADD COLUMN run_began_at timestamptz, -- of the last run of its subagent
    ADD COLUMN verdict verdict, -- what the person said of the result
    ADD COLUMN verdict_note text,
    ADD COLUMN verdict_at timestamptz;
CREATE INDEX jobs_of_a_version ON jobs (subagent_id, subagent_version) WHERE subagent_id IS NOT NULL;
