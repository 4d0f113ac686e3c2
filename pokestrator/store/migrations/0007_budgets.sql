-- What running jobs may still spend, and what was spent on each day (UTC) for each caller ('': those without a name). The
-- release before neither reserves nor writes down; it goes on working on these tables during a deploy.
ALTER TYPE error_kind ADD VALUE IF NOT EXISTS 'budget_spent';
ALTER TABLE jobs ADD COLUMN reserved_usd double precision NOT NULL DEFAULT 0; -- counts only while the job is running
CREATE TABLE spending (
    day date NOT NULL,
    caller text NOT NULL,
    usd double precision NOT NULL CHECK (usd >= 0),
    PRIMARY KEY (day, caller)
);
