-- In a transaction of its own: it locks rows, and nobody who only reads. What the release before writes after this is
-- found by its words too, only without their beginnings, until the subagent learns something.
UPDATE subagents SET search = findable(subagents.name, v.description,
    (SELECT string_agg(task, ' ') FROM subagent_examples e WHERE e.subagent_id = subagents.id))
FROM subagent_versions v WHERE v.subagent_id = subagents.id AND v.version = subagents.version;
