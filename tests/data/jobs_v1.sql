-- A job table as pjw wrote it with schema version 1; times as they were.
BEGIN TRANSACTION;
CREATE TABLE clients (
    name TEXT PRIMARY KEY,
    number INTEGER NOT NULL UNIQUE
) WITHOUT ROWID;
INSERT INTO "clients" VALUES('alice',0);
INSERT INTO "clients" VALUES('bob',1);
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
INSERT INTO "jobs" VALUES(1,'alice','echo ü ''x''','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 7, "io_rbps_max": 268435456, "io_wbps_max": 268435456, "io_riops_max": 10000, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795492163562394000,'exited',1779019200123456000,3,NULL,'completed','{"cpu_usage_usec": 1, "memory_peak_bytes": 2, "io_read_bytes": 3, "io_write_bytes": 4, "oom_kills": 5}');
INSERT INTO "jobs" VALUES(2,'bob','sleep 1','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 512, "io_rbps_max": 268435456, "io_wbps_max": 268435456, "io_riops_max": 10000, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795492163562972000,'exited',1779019201000000000,NULL,9,'stopped',NULL);
INSERT INTO "jobs" VALUES(3,'alice','x','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 512, "io_rbps_max": 268435456, "io_wbps_max": 268435456, "io_riops_max": 10000, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795492163563371000,'lost',1779019202000000000,NULL,NULL,'lost',NULL);
INSERT INTO "jobs" VALUES(4,'alice','sleep 100','{"cpu_max_millicores": 1000, "memory_max_bytes": 536870912, "pids_max": 512, "io_rbps_max": 268435456, "io_wbps_max": 268435456, "io_riops_max": 10000, "io_wiops_max": 10000, "output_max_bytes": 10737418240, "time_max_seconds": 0}',1795492163563801000,NULL,NULL,NULL,NULL,NULL,NULL);
CREATE INDEX jobs_of_client ON jobs (client_name, id);
CREATE INDEX jobs_alive ON jobs (id) WHERE state IS NULL;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',5);
COMMIT;
PRAGMA user_version = 1;
