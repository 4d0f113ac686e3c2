-- The release before knows nothing of these and goes on working beside them. No statement here uses the new word of the
-- enum, so that it can be added in a transaction.
CREATE TABLE credentials (
    name text PRIMARY KEY CHECK (name ~ '^[A-Z][A-Z0-9_]{1,63}$'), -- also of the variable in an agent's environment
    secret text NOT NULL CHECK (secret LIKE 'fernet:%'), -- encrypted with POKESTRATOR_SECRET_KEY, never in the clear
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
ALTER TYPE error_kind ADD VALUE 'needs_credentials';
ALTER TABLE subagent_versions ADD COLUMN optional_credentials text[] NOT NULL DEFAULT '{}';
