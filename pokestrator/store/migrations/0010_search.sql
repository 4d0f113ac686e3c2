-- What a subagent is found by: its name (three times over: who says it means it), its description, its examples; and the
-- beginnings of their longer words, which tell that photographer and photo have to do with each other.
CREATE FUNCTION beginnings(words tsvector) RETURNS text[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT ARRAY(SELECT DISTINCT '~' || left(lexeme, 3) FROM unnest(words) WHERE length(lexeme) > 3)
$$;

CREATE FUNCTION findable(name text, description text, examples text) RETURNS tsvector
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT words || array_to_tsvector(beginnings(words))
    FROM (SELECT searchable(concat_ws(' ', n, n, n, description, examples)) AS words FROM replace(name, '_', ' ') n) w
$$;

-- How many words a text has, each counted as often as it occurs; beginnings, which have no positions, are none.
CREATE FUNCTION words_in(words tsvector) RETURNS integer LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(sum(cardinality(positions)), 0)::integer FROM unnest(words)
$$;

-- The query that only this lexeme answers, whatever is in it.
CREATE FUNCTION exactly(lexeme text) RETURNS tsquery LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT ('''' || replace(replace(lexeme, '\', '\\'), '''', '''''') || '''')::tsquery
$$;

-- How many subagents know a lexeme, and how long their texts are. Counted in the background: what is newer than that is
-- found all the same, and only weighed a little wrong.
CREATE TABLE lexeme_statistics (
    lexeme text PRIMARY KEY,
    subagents integer NOT NULL
);
CREATE TABLE search_statistics (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    subagents integer NOT NULL DEFAULT 0,
    mean_length double precision NOT NULL DEFAULT 60, -- words in a subagent's text
    counted_at timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO search_statistics DEFAULT VALUES;

ALTER TABLE subagents
    ADD COLUMN search_made_at timestamptz NOT NULL DEFAULT now(),
    ADD COLUMN search_length integer GENERATED ALWAYS AS (words_in(search)) STORED;
-- Whether something has changed since the last count is asked every few seconds.
CREATE INDEX subagents_search_made ON subagents (search_made_at);
