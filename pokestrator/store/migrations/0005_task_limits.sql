-- How many tasks a caller has sent lately, and how many are under way. Those without a name share one place; a
-- terminal's tasks (channel none) have no limit and are in neither.
CREATE INDEX jobs_sent_by ON jobs (coalesce(caller, ''), created_at) WHERE channel <> 'none';
CREATE INDEX jobs_under_way ON jobs (coalesce(caller, '')) WHERE finished_at IS NULL AND channel <> 'none';
