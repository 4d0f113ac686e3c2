-- The key was the task itself, and an index's row holds no more than 2,704 bytes: a long task in Chinese was too much
-- for it. The release before names no key where it adds examples, so it works on beside this.
ALTER TABLE subagent_examples DROP CONSTRAINT subagent_examples_pkey;
ALTER TABLE subagent_examples ADD COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY;
CREATE UNIQUE INDEX examples_of_a_subagent ON subagent_examples (subagent_id, hashtextextended(task, 0));
-- The task holds a secret that was known when it ended: it never becomes an example.
ALTER TABLE jobs ADD COLUMN holds_secret boolean NOT NULL DEFAULT false;
