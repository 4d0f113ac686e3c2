-- The release before leaves it empty: of what it adds during a deploy a roll-back takes nothing away.
ALTER TABLE subagent_examples ADD COLUMN version integer; -- the subagent's current one when this was added
