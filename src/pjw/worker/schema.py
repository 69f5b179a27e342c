"""The schema of the job table, version by version. A script here is never changed once it was released."""

import sqlite3
from typing import Final

from pjw.errors import ConfigError

# Number N brings a table from version N to N + 1; an empty file has version 0.
MIGRATIONS: Final = (
    # `state` is NULL until the job has ended: where a living job is, only its own processes know,
    # and after a restart they are asked, not the table.
    """
CREATE TABLE clients (
    name TEXT PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE
) WITHOUT ROWID;
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    client_name TEXT NOT NULL,
    command TEXT NOT NULL,
    limits TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    state TEXT,
    end_ns INTEGER,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT,
    usage TEXT
);
CREATE INDEX jobs_of_client ON jobs (client_name, id);
CREATE INDEX jobs_alive ON jobs (id) WHERE state IS NULL;
""",
    # `output_bytes` is NULL where version 1 wrote the end. What each client's ended jobs come to is
    # kept by triggers: nothing has to be summed over a million rows. `removals` are jobs whose row
    # is gone and whose files are about to be. `host` is where the table was last in use.
    """
ALTER TABLE jobs ADD COLUMN output_bytes INTEGER;
ALTER TABLE clients ADD COLUMN ended_jobs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE clients ADD COLUMN ended_bytes INTEGER NOT NULL DEFAULT 0;
UPDATE clients SET ended_jobs = (
    SELECT count(*) FROM jobs WHERE client_name = clients.name AND state IS NOT NULL
);
CREATE TRIGGER job_ended AFTER UPDATE OF state ON jobs WHEN OLD.state IS NULL AND NEW.state IS NOT NULL BEGIN
    UPDATE clients SET ended_jobs = ended_jobs + 1, ended_bytes = ended_bytes + coalesce(NEW.output_bytes, 0)
    WHERE name = NEW.client_name;
END;
CREATE TRIGGER job_removed AFTER DELETE ON jobs WHEN OLD.state IS NOT NULL BEGIN
    UPDATE clients SET ended_jobs = ended_jobs - 1, ended_bytes = ended_bytes - coalesce(OLD.output_bytes, 0)
    WHERE name = OLD.client_name;
END;
CREATE INDEX jobs_ended ON jobs (end_ns) WHERE state IS NOT NULL;
CREATE INDEX jobs_ended_of_client ON jobs (client_name, end_ns) WHERE state IS NOT NULL;
CREATE INDEX jobs_with_output ON jobs (client_name, end_ns) WHERE output_bytes > 0;
CREATE TABLE removals (id INTEGER PRIMARY KEY);
CREATE TABLE host (boot_id TEXT NOT NULL);
""",
    # What a job is called and how it reads and writes. `labels` is a JSON object. A name is taken for as
    # long as its job has not ended, a request id for as long as its job is kept.
    """
ALTER TABLE jobs ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN labels TEXT NOT NULL DEFAULT '{}';
ALTER TABLE jobs ADD COLUMN split_stderr INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN input INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN request_id TEXT;
CREATE UNIQUE INDEX jobs_alive_of_name ON jobs (client_name, name) WHERE state IS NULL AND name <> '';
CREATE INDEX jobs_of_name ON jobs (client_name, name, id) WHERE name <> '';
CREATE UNIQUE INDEX jobs_of_request ON jobs (client_name, request_id) WHERE request_id IS NOT NULL;
""",
    # Where the command began; empty for jobs from before.
    """
ALTER TABLE jobs ADD COLUMN workdir TEXT NOT NULL DEFAULT '';
""",
)
SCHEMA_VERSION: Final = len(MIGRATIONS)


def migrate(db: sqlite3.Connection, path: str) -> None:
    """Bring a table to the newest version, each step whole or not at all.

    Raises ConfigError when a newer pjw wrote it, and sqlite3.Error.
    """
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise ConfigError(
            f"the job table {path} has version {version}, and this pjw knows only {SCHEMA_VERSION}",
            hint="a newer pjw has written it; run that one",
        )
    for number in range(version, SCHEMA_VERSION):
        db.executescript(f"BEGIN; {MIGRATIONS[number]} PRAGMA user_version = {number + 1}; COMMIT;")
