-- The release before leaves this empty; it archives nothing.
ALTER TABLE subagents ADD COLUMN archived_from subagent_state; -- the state to go back to, of one that is archived
