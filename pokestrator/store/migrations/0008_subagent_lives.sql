-- The release before works on beside this: what it inserts gets the defaults, and it reads nothing of what is new. No
-- statement here uses the new word of the enum, so that it can be added in a transaction.
CREATE TYPE subagent_state AS ENUM ('probation', 'active', 'archived');
ALTER TYPE version_author ADD VALUE 'person'; -- of an example: somebody's task, which was done well
ALTER TABLE subagents ADD COLUMN state subagent_state NOT NULL DEFAULT 'active';
ALTER TABLE subagent_versions ADD COLUMN note text NOT NULL DEFAULT ''; -- why this version was made
ALTER TABLE subagent_examples
    ADD COLUMN version integer, -- the subagent's current one when this was added; NULL: added by the release before
    ADD COLUMN job_id uuid, -- that taught it; no reference: it stays when that job is removed
    ADD COLUMN uses integer NOT NULL DEFAULT 0, -- how often it was the most like a task that was then done well
    ADD COLUMN used_at timestamptz NOT NULL DEFAULT now();
