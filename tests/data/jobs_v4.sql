-- A job table as pjw wrote it with schema version 4.
BEGIN TRANSACTION;
CREATE TABLE clients (
    name TEXT PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE
, ended_jobs INTEGER NOT NULL DEFAULT 0, ended_bytes INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
INSERT INTO "clients" VALUES('alice',0,1,12);
INSERT INTO "clients" VALUES('bob',1,1,0);
CREATE TABLE host (boot_id TEXT NOT NULL);
INSERT INTO "host" VALUES('0b6d9e5e-2f1c-4c5e-9a43-6f0c1d1e2a3b');
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
, output_bytes INTEGER, name TEXT NOT NULL DEFAULT '', labels TEXT NOT NULL DEFAULT '{}', split_stderr INTEGER NOT NULL DEFAULT 0, input INTEGER NOT NULL DEFAULT 0, request_id TEXT, workdir TEXT NOT NULL DEFAULT '');
INSERT INTO "jobs" VALUES(1,'alice','echo ü ''x''','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 512, "io_rbps_max": 0, "io_wbps_max": 268435456, "io_riops_max": 0, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795971490656803000,'exited',1795953601000000000,0,NULL,'completed','{"cpu_usage_usec": 1, "memory_peak_bytes": 2, "io_read_bytes": 3, "io_write_bytes": 4, "oom_kills": 0}',12,'web','{"team": "blue"}',1,0,'r-1','/run/job');
INSERT INTO "jobs" VALUES(2,'bob','sleep 1000','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 512, "io_rbps_max": 0, "io_wbps_max": 268435456, "io_riops_max": 0, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795971490657616000,'exited',1795953601000000000,NULL,9,'oom_killed',NULL,0,'','{}',0,1,NULL,'');
INSERT INTO "jobs" VALUES(3,'alice','true','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 512, "io_rbps_max": 0, "io_wbps_max": 268435456, "io_riops_max": 0, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795971490659453000,NULL,NULL,NULL,NULL,NULL,NULL,NULL,'web2','{}',0,0,NULL,'/usr');
CREATE TABLE removals (id INTEGER PRIMARY KEY);
INSERT INTO "removals" VALUES(4);
CREATE INDEX jobs_of_client ON jobs (client_name, id);
CREATE INDEX jobs_alive ON jobs (id) WHERE state IS NULL;
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
CREATE UNIQUE INDEX jobs_alive_of_name ON jobs (client_name, name) WHERE state IS NULL AND name <> '';
CREATE INDEX jobs_of_name ON jobs (client_name, name, id) WHERE name <> '';
CREATE UNIQUE INDEX jobs_of_request ON jobs (client_name, request_id) WHERE request_id IS NOT NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',4);
COMMIT;
PRAGMA user_version = 4;
