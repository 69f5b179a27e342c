"""What a gateway and its nodes have written down, read behind their backs."""

import sqlite3
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster


def rows_of(state: Path, query: str) -> list[tuple[Any, ...]]:
    """The answer of a table; of a copy, since its pjwd has it locked."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("jobs.sqlite", "jobs.sqlite-wal"):
            if (state / name).exists():
                (Path(directory) / name).write_bytes((state / name).read_bytes())
        with closing(sqlite3.connect(f"{directory}/jobs.sqlite")) as db:
            return db.execute(query).fetchall()


def assert_none_ran_twice(cluster: Cluster) -> None:
    """No two nodes have the same job: a node writes a job's row before it starts the job's process."""
    seen = Counter(
        uuid
        for node in cluster.nodes.values()
        for (uuid,) in rows_of(node.state, "SELECT request_id FROM jobs")
    )
    assert [uuid for uuid, times in seen.items() if times > 1] == []
