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
    # `output_bytes` is NULL where version 1 wrote the end. Triggers keep the sums of each client's ended
    # jobs: no query has to sum over a million rows. `removals` are jobs whose row is gone and whose files are
    # about to be. `host` is where the table was last in use.
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
    # Name, labels and streams of a job. `labels` is a JSON object. A name is taken for as long as its job has
    # not ended, a request id for as long as its job is kept.
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
    # The queue. `queued_ns` is when a job was put into it, and NULL for one that was started at once. A job
    # waits there while it has not ended and `start_ns` is 0, as it is for ever in one that ended without a
    # start. `not_before_ns` becomes 0 when that time has come. `specs` has the spec to execute, until that
    # has happened: one with a row there and a `start_ns` may have been executed or not. Triggers keep the
    # number of such rows of each client, and their bytes.
    """
ALTER TABLE jobs ADD COLUMN queued_ns INTEGER;
ALTER TABLE jobs ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN not_before_ns INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN detail TEXT NOT NULL DEFAULT '';
DROP INDEX jobs_alive;
CREATE INDEX jobs_alive ON jobs (id) WHERE state IS NULL AND start_ns > 0;
CREATE INDEX jobs_queued ON jobs (id) WHERE state IS NULL AND start_ns = 0;
CREATE INDEX jobs_queued_of_client ON jobs (client_name, id) WHERE state IS NULL AND start_ns = 0;
CREATE INDEX jobs_ready ON jobs (client_name, priority DESC, id)
    WHERE state IS NULL AND start_ns = 0 AND held = 0 AND not_before_ns = 0;
CREATE INDEX jobs_early ON jobs (not_before_ns) WHERE state IS NULL AND start_ns = 0 AND not_before_ns > 0;
CREATE TABLE specs (
    id INTEGER PRIMARY KEY,
    client_name TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    spec TEXT NOT NULL
);
ALTER TABLE clients ADD COLUMN queued_jobs INTEGER NOT NULL DEFAULT 0;
ALTER TABLE clients ADD COLUMN queued_bytes INTEGER NOT NULL DEFAULT 0;
CREATE TRIGGER spec_kept AFTER INSERT ON specs BEGIN
    UPDATE clients SET queued_jobs = queued_jobs + 1, queued_bytes = queued_bytes + NEW.bytes
    WHERE name = NEW.client_name;
END;
CREATE TRIGGER spec_gone AFTER DELETE ON specs BEGIN
    UPDATE clients SET queued_jobs = queued_jobs - 1, queued_bytes = queued_bytes - OLD.bytes
    WHERE name = OLD.client_name;
END;
""",
    # `waits_for` has the jobs that a job was to wait for, to be shown: ID:CONDITION, separated by blanks. In
    # `dependencies` are ends that have not come yet, or have had no effect yet; `unmet` counts those of a
    # job. A job is newer than all that it waits for, so no two can wait for each other.
    """
ALTER TABLE jobs ADD COLUMN waits_for TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN unmet INTEGER NOT NULL DEFAULT 0;
DROP INDEX jobs_ready;
CREATE INDEX jobs_ready ON jobs (client_name, priority DESC, id)
    WHERE state IS NULL AND start_ns = 0 AND held = 0 AND not_before_ns = 0 AND unmet = 0;
CREATE TABLE dependencies (
    after_id INTEGER NOT NULL,
    id INTEGER NOT NULL,
    condition TEXT NOT NULL,
    PRIMARY KEY (after_id, id),
    CHECK (after_id < id)
) WITHOUT ROWID;
CREATE INDEX dependencies_of_job ON dependencies (id);
""",
    # Retries. `attempt` is 0 for a job that is not tried again. `specs` keeps the spec of the next attempt
    # until the job's end; `executed` says that it was executed, so that it is in the queue no more. A job
    # that waited for a job waits for its next attempt, whose id is higher. There are no cycles for all that:
    # an attempt waits for no other job.
    """
ALTER TABLE jobs ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN retried_as INTEGER;
ALTER TABLE specs ADD COLUMN executed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE dependencies RENAME TO dependencies_checked;
CREATE TABLE dependencies (
    after_id INTEGER NOT NULL,
    id INTEGER NOT NULL,
    condition TEXT NOT NULL,
    PRIMARY KEY (after_id, id)
) WITHOUT ROWID;
INSERT INTO dependencies SELECT after_id, id, condition FROM dependencies_checked;
DROP TABLE dependencies_checked;
CREATE INDEX dependencies_of_job ON dependencies (id);
DROP TRIGGER spec_gone;
CREATE TRIGGER spec_gone AFTER DELETE ON specs BEGIN
    UPDATE clients SET queued_jobs = queued_jobs - 1 + OLD.executed, queued_bytes = queued_bytes - OLD.bytes
    WHERE name = OLD.client_name;
END;
CREATE TRIGGER spec_executed AFTER UPDATE OF executed ON specs BEGIN
    UPDATE clients SET queued_jobs = queued_jobs + OLD.executed - NEW.executed WHERE name = NEW.client_name;
END;
""",
    # Changes of state, for watchers of jobs. `told` is the state of a job that was begun, as far as it is
    # written down: running or stopping, empty before that; it may be written down with the end. A plain start
    # is a change when its command runs: one that fails leaves no trace. Triggers write changes, so a change
    # and its row are one transaction. Of each client the newest 20,000 are kept, and 500,000 in all: of the
    # older ones only the number of the last is known (`changes_from`, `change_floor`). `removed_jobs` has the
    # facts still known of a removed job, for as long as its removal is kept.
    """
ALTER TABLE jobs ADD COLUMN told TEXT NOT NULL DEFAULT '';
ALTER TABLE clients ADD COLUMN changes_from INTEGER NOT NULL DEFAULT 0;
CREATE TABLE change_floor (seq INTEGER NOT NULL);
INSERT INTO change_floor VALUES (0);
CREATE TABLE changes (
    seq INTEGER PRIMARY KEY,
    time_ms INTEGER NOT NULL DEFAULT (CAST(round((julianday('now') - 2440587.5) * 86400000) AS INTEGER)),
    job_id INTEGER NOT NULL,
    client_name TEXT NOT NULL,
    state TEXT NOT NULL
);
CREATE INDEX changes_of_client ON changes (client_name, seq);
CREATE TABLE removed_jobs (
    id INTEGER PRIMARY KEY,
    client_name TEXT NOT NULL,
    command TEXT NOT NULL,
    limits TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    state TEXT,
    end_ns INTEGER,
    exit_code INTEGER,
    signal INTEGER,
    reason TEXT,
    output_bytes INTEGER,
    name TEXT NOT NULL,
    labels TEXT NOT NULL,
    queued_ns INTEGER,
    attempt INTEGER NOT NULL,
    retried_as INTEGER
);
CREATE TRIGGER removal_forgotten AFTER DELETE ON changes WHEN OLD.state = 'removed' BEGIN
    DELETE FROM removed_jobs WHERE id = OLD.job_id;
END;
CREATE TRIGGER change_queued AFTER INSERT ON jobs WHEN NEW.start_ns = 0 BEGIN
    INSERT INTO changes (job_id, client_name, state) VALUES (NEW.id, NEW.client_name, 'queued');
END;
CREATE TRIGGER change_of_state AFTER UPDATE OF state, start_ns, told ON jobs WHEN
    coalesce(NEW.state, iif(NEW.start_ns = 0, 'queued', iif(NEW.told = '', 'starting', NEW.told)))
    <> coalesce(OLD.state, iif(OLD.start_ns = 0, 'queued', iif(OLD.told = '', 'starting', OLD.told)))
BEGIN
    INSERT INTO changes (job_id, client_name, state)
    SELECT NEW.id, NEW.client_name, NEW.told WHERE NEW.state IS NOT NULL AND NEW.told <> OLD.told;
    INSERT INTO changes (job_id, client_name, state) VALUES (
        NEW.id, NEW.client_name,
        coalesce(NEW.state, iif(NEW.start_ns = 0, 'queued', iif(NEW.told = '', 'starting', NEW.told)))
    );
END;
CREATE TRIGGER change_removed AFTER DELETE ON jobs
WHEN OLD.state IS NOT NULL OR OLD.queued_ns IS NOT NULL OR OLD.told <> '' BEGIN
    INSERT INTO removed_jobs VALUES (
        OLD.id, OLD.client_name, substr(OLD.command, 1, 256), OLD.limits, OLD.start_ns, OLD.state, OLD.end_ns,
        OLD.exit_code, OLD.signal, OLD.reason, OLD.output_bytes, OLD.name,
        iif(length(OLD.labels) <= 1000, OLD.labels, '{}'), OLD.queued_ns, OLD.attempt, OLD.retried_as
    );
    INSERT INTO changes (job_id, client_name, state) VALUES (OLD.id, OLD.client_name, 'removed');
END;
CREATE TRIGGER changes_bounded AFTER INSERT ON changes WHEN NEW.seq % 500 = 0 BEGIN
    UPDATE clients SET changes_from = max(changes_from, coalesce((
        SELECT seq FROM changes WHERE client_name = NEW.client_name ORDER BY seq DESC LIMIT 1 OFFSET 20000
    ), 0)) WHERE name = NEW.client_name;
    DELETE FROM changes WHERE client_name = NEW.client_name
    AND seq <= (SELECT changes_from FROM clients WHERE name = NEW.client_name);
    UPDATE change_floor SET seq = max(seq, NEW.seq - 500000);
    DELETE FROM changes WHERE seq <= (SELECT seq FROM change_floor);
END;
""",
    # `secrets` is the name of a file with those of the job, which no copy of the table has; several jobs may
    # share it. `spent_secrets` are files that no job needs, and that are about to be removed.
    """
ALTER TABLE specs ADD COLUMN secrets TEXT;
CREATE INDEX specs_with_secrets ON specs (secrets) WHERE secrets IS NOT NULL;
CREATE TABLE spent_secrets (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TRIGGER secrets_spent AFTER DELETE ON specs WHEN OLD.secrets IS NOT NULL
AND NOT EXISTS (SELECT 1 FROM specs WHERE secrets = OLD.secrets) BEGIN
    INSERT OR IGNORE INTO spent_secrets VALUES (OLD.secrets);
END;
""",
    # Arrays. An array is one row of `jobs`, and one of `arrays`; an element has a row of `jobs` from its turn
    # on, or when a client holds or stops it before. `next` is the place of the first element that had no turn
    # yet. `unseen` elements wait and have no row; `waiting` are these and those with one. `array_taken` has
    # the places behind `next` whose elements have had a row out of turn. An array waits (`start_ns` is 0)
    # while one of its elements does. `queued_more` is the number by which the elements without a row exceed
    # the arrays in the queue, to count elements without looking at each. An array runs (`told`) when it waits
    # no more; its changes of state are reported like those of jobs.
    """
ALTER TABLE jobs ADD COLUMN array_id INTEGER;
ALTER TABLE jobs ADD COLUMN array_index INTEGER;
DROP INDEX jobs_ready;
CREATE INDEX jobs_ready ON jobs (client_name, priority DESC, id)
    WHERE state IS NULL AND start_ns = 0 AND held = 0 AND not_before_ns = 0 AND unmet = 0
    AND array_id IS NULL;
CREATE INDEX jobs_of_array ON jobs (array_id, array_index, id) WHERE array_id IS NOT NULL;
CREATE INDEX jobs_waiting_of_array ON jobs (array_id, held, not_before_ns, id)
    WHERE state IS NULL AND start_ns = 0 AND array_id IS NOT NULL;
CREATE TABLE arrays (
    id INTEGER PRIMARY KEY,
    client_name TEXT NOT NULL,
    indices TEXT NOT NULL,
    count INTEGER NOT NULL,
    unseen INTEGER NOT NULL,
    waiting INTEGER NOT NULL,
    next INTEGER NOT NULL DEFAULT 0,
    taken INTEGER NOT NULL DEFAULT 0,
    succeeded INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    worst INTEGER NOT NULL DEFAULT 0,
    started_ns INTEGER NOT NULL DEFAULT 0,
    stopped_ns INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX arrays_being_stopped ON arrays (id) WHERE stopped_ns > 0 AND waiting > 0;
CREATE TABLE array_taken (
    array_id INTEGER NOT NULL,
    place INTEGER NOT NULL,
    PRIMARY KEY (array_id, place)
) WITHOUT ROWID;
ALTER TABLE clients ADD COLUMN queued_more INTEGER NOT NULL DEFAULT 0;
CREATE TRIGGER element_admitted AFTER UPDATE OF start_ns ON jobs
    WHEN NEW.array_id IS NOT NULL AND NEW.state IS NULL AND OLD.start_ns = 0 AND NEW.start_ns > 0 BEGIN
    UPDATE arrays SET waiting = waiting - 1, started_ns = coalesce(nullif(started_ns, 0), NEW.start_ns)
    WHERE id = NEW.array_id;
END;
CREATE TRIGGER element_put_back AFTER UPDATE OF start_ns ON jobs
    WHEN NEW.array_id IS NOT NULL AND NEW.state IS NULL AND OLD.start_ns > 0 AND NEW.start_ns = 0 BEGIN
    UPDATE arrays SET waiting = waiting + 1 WHERE id = NEW.array_id;
END;
CREATE TRIGGER element_cancelled AFTER UPDATE OF state ON jobs
    WHEN NEW.array_id IS NOT NULL AND OLD.state IS NULL AND NEW.state IS NOT NULL AND OLD.start_ns = 0 BEGIN
    UPDATE arrays SET waiting = waiting - 1 WHERE id = NEW.array_id;
END;
CREATE TRIGGER array_waits AFTER UPDATE OF waiting ON arrays WHEN (OLD.waiting > 0) <> (NEW.waiting > 0) BEGIN
    UPDATE jobs SET start_ns = iif(NEW.waiting > 0, 0, NEW.started_ns),
        told = iif(NEW.waiting > 0 OR NEW.started_ns = 0, '', 'running')
    WHERE id = NEW.id AND state IS NULL;
    UPDATE specs SET executed = NEW.waiting = 0 WHERE id = NEW.id;
END;
CREATE TRIGGER array_made AFTER INSERT ON arrays BEGIN
    UPDATE clients SET queued_more = queued_more + NEW.unseen - (NEW.waiting > 0)
    WHERE name = NEW.client_name;
END;
CREATE TRIGGER array_counted AFTER UPDATE OF unseen, waiting ON arrays BEGIN
    UPDATE clients SET queued_more =
        queued_more - OLD.unseen + (OLD.waiting > 0) + NEW.unseen - (NEW.waiting > 0)
    WHERE name = NEW.client_name;
END;
CREATE TRIGGER array_gone AFTER DELETE ON arrays BEGIN
    UPDATE clients SET queued_more = queued_more - OLD.unseen + (OLD.waiting > 0)
    WHERE name = OLD.client_name;
    DELETE FROM array_taken WHERE array_id = OLD.id;
END;
ALTER TABLE removed_jobs ADD COLUMN array_id INTEGER;
ALTER TABLE removed_jobs ADD COLUMN array_index INTEGER;
ALTER TABLE removed_jobs ADD COLUMN array_counts TEXT;
DROP TRIGGER change_removed;
CREATE TRIGGER change_removed AFTER DELETE ON jobs
WHEN OLD.state IS NOT NULL OR OLD.queued_ns IS NOT NULL OR OLD.told <> '' BEGIN
    INSERT INTO removed_jobs VALUES (
        OLD.id, OLD.client_name, substr(OLD.command, 1, 256), OLD.limits, OLD.start_ns, OLD.state, OLD.end_ns,
        OLD.exit_code, OLD.signal, OLD.reason, OLD.output_bytes, OLD.name,
        iif(length(OLD.labels) <= 1000, OLD.labels, '{}'), OLD.queued_ns, OLD.attempt, OLD.retried_as,
        OLD.array_id, OLD.array_index, (
            SELECT '["' || indices || '",' || count || ',' || waiting || ',' || succeeded || ',' || failed
                || ',' || cancelled || ']' FROM arrays WHERE id = OLD.id
        )
    );
    INSERT INTO changes (job_id, client_name, state) VALUES (OLD.id, OLD.client_name, 'removed');
    DELETE FROM arrays WHERE id = OLD.id;
END;
""",
    # Workspaces: each that a job has named, until it is removed. One that is `removing` is on its way out,
    # and can be used no more. Each job that has not ended has a row for its workspace. `bytes` and `inodes`
    # are as last counted. The indexes find the jobs that use one, and the first job of each.
    """
ALTER TABLE jobs ADD COLUMN workspace TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN exclusive INTEGER NOT NULL DEFAULT 0;
CREATE INDEX jobs_alive_of_workspace ON jobs (client_name, workspace, id)
    WHERE state IS NULL AND workspace <> '';
CREATE INDEX jobs_ready_of_workspace ON jobs (client_name, workspace, exclusive, priority DESC, id)
    WHERE state IS NULL AND start_ns = 0 AND held = 0 AND not_before_ns = 0 AND unmet = 0
    AND array_id IS NULL;
CREATE TABLE workspaces (
    client_name TEXT NOT NULL,
    name TEXT NOT NULL,
    made_ns INTEGER NOT NULL,
    used_ns INTEGER NOT NULL,
    bytes INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0,
    removing INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (client_name, name)
) WITHOUT ROWID;
""",
    # Artifacts. `artifacts` is empty for a job that keeps no files, and `pending` until it has ended.
    # Artifacts count as output does in the sums of a client's ended jobs.
    """
ALTER TABLE jobs ADD COLUMN artifacts TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN artifact_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN artifacts_detail TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN artifacts_required INTEGER NOT NULL DEFAULT 0;
CREATE TRIGGER artifacts_kept AFTER UPDATE OF state ON jobs
    WHEN OLD.state IS NULL AND NEW.state IS NOT NULL AND NEW.artifact_bytes > 0 BEGIN
    UPDATE clients SET ended_bytes = ended_bytes + NEW.artifact_bytes WHERE name = NEW.client_name;
END;
CREATE TRIGGER artifacts_removed AFTER DELETE ON jobs WHEN OLD.artifact_bytes > 0 BEGIN
    UPDATE clients SET ended_bytes = ended_bytes - OLD.artifact_bytes WHERE name = OLD.client_name;
END;
DROP INDEX jobs_with_output;
CREATE INDEX jobs_with_output ON jobs (client_name, end_ns) WHERE output_bytes + artifact_bytes > 0;
""",
    # Mounts of the operator's that a job has, as a list in JSON; empty for none.
    """
ALTER TABLE jobs ADD COLUMN mounts TEXT NOT NULL DEFAULT '';
""",
    # The names on the network that a job may reach, with spaces between them, and the network that it shares.
    """
ALTER TABLE jobs ADD COLUMN allow TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN link TEXT NOT NULL DEFAULT '';
""",
    # Images. `image` is its client's name for it, `image_key` identifies it: a digest of the operator's, or
    # in `images` the key of one that a client has loaded. That lies where the client's workspaces do, and has
    # a row there by its key. Without a name it is on its way out, with the last job that has it.
    """
ALTER TABLE jobs ADD COLUMN image TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN image_key TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN read_only INTEGER NOT NULL DEFAULT 0;
CREATE TABLE images (
    client_name TEXT NOT NULL,
    key TEXT NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    config TEXT NOT NULL,
    made_ns INTEGER NOT NULL,
    used_ns INTEGER NOT NULL,
    PRIMARY KEY (client_name, key)
) WITHOUT ROWID;
CREATE UNIQUE INDEX images_of_name ON images (client_name, name) WHERE name <> '';
""",
    # The number of GPUs that a job has for itself; and their names, a list in JSON, from before its launch
    # on.
    """
ALTER TABLE jobs ADD COLUMN gpus INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN gpu_names TEXT NOT NULL DEFAULT '';
""",
    # A cluster. On a node `reported` says that the gateway has written the end of a job down; its jobs have
    # request ids of their own kind. On a gateway `node` is where a job is, and each job has a row of
    # `placements` (gateway/placement_states.py), until the node has forgotten it too. `nodes` are those seen.
    """
ALTER TABLE jobs ADD COLUMN node TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN reported INTEGER NOT NULL DEFAULT 0;
CREATE INDEX jobs_to_report ON jobs (id) WHERE state IS NOT NULL AND reported = 0
    AND request_id >= 'cluster:' AND request_id < 'cluster;';
CREATE INDEX jobs_of_cluster ON jobs (request_id)
    WHERE request_id >= 'cluster:' AND request_id < 'cluster;';
CREATE TABLE placements (
    job_id INTEGER PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    client_name TEXT NOT NULL,
    state TEXT NOT NULL,
    node TEXT NOT NULL DEFAULT '',
    session TEXT NOT NULL DEFAULT '',
    node_job_id INTEGER NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0,
    stop_signal INTEGER,
    stop_grace REAL,
    late_end TEXT NOT NULL DEFAULT '',
    removed INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX placements_alive ON placements (job_id) WHERE state IN ('queued', 'claimed', 'running');
CREATE INDEX placements_of_node ON placements (node, state);
CREATE INDEX placements_removed ON placements (node) WHERE removed;
CREATE TRIGGER placement_removed AFTER DELETE ON jobs BEGIN
    DELETE FROM placements WHERE job_id = OLD.id AND node = '';
    UPDATE placements SET removed = 1 WHERE job_id = OLD.id;
END;
CREATE TABLE nodes (
    name TEXT PRIMARY KEY,
    address TEXT NOT NULL,
    version TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    cpu_max_millicores INTEGER NOT NULL,
    memory_max_bytes INTEGER NOT NULL,
    uid_first INTEGER NOT NULL,
    uid_count INTEGER NOT NULL,
    drained INTEGER NOT NULL DEFAULT 0,
    is_lost INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
""",
    # The place that an engine gave to a job (pjw.gateway.slurm), empty where it gives none.
    "ALTER TABLE placements ADD COLUMN hold TEXT NOT NULL DEFAULT '';",
    # `chosen_node` is the only node of a cluster that may have a job. `archived` is 1 when the gateway's
    # archive has its output and 2 when that can never be.
    """
ALTER TABLE jobs ADD COLUMN chosen_node TEXT NOT NULL DEFAULT '';
ALTER TABLE placements ADD COLUMN archived INTEGER NOT NULL DEFAULT 0;
CREATE INDEX placements_to_archive ON placements (node, job_id)
    WHERE state = 'ended' AND archived = 0 AND removed = 0 AND node_job_id > 0;
""",
    # The name of this table: a machine that is set up anew numbers its jobs from 1 again. A gateway has that
    # of each node's table, too.
    """
CREATE TABLE identity AS SELECT lower(hex(randomblob(16))) AS id;
ALTER TABLE nodes ADD COLUMN table_id TEXT NOT NULL DEFAULT '';
""",
    # The partition of Slurm's where a job has its place, and the feature that it needs; empty: any.
    """
ALTER TABLE jobs ADD COLUMN slurm_partition TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN slurm_constraint TEXT NOT NULL DEFAULT '';
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
