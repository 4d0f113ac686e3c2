ALTER TABLE callbacks
    ADD COLUMN begun_at timestamptz NOT NULL DEFAULT now(), -- of the schedule; a replay begins it anew
    ADD COLUMN attempts_before integer NOT NULL DEFAULT 0; -- made before the last replay
