"""Images that clients have loaded, in the table of jobs.

Each function is a part of a transaction, and is called in the table's thread. The directory of an image is
among the workspaces of its client, by the image's key.
"""

import json
import sqlite3
from dataclasses import asdict
from typing import Final

from pjw.errors import ImageNotFoundError, LimitReachedError
from pjw.model import Image, ImageConfig
from pjw.worker.job_rows import from_ns
from pjw.worker.settings import Quotas

_IMAGES: Final = (
    "SELECT images.name, digest, images.made_ns, images.used_ns, bytes, inodes, images.client_name, config,"
    " key FROM images JOIN workspaces"
    " ON workspaces.client_name = images.client_name AND workspaces.name = key"
)


def config_text(config: ImageConfig) -> str:
    """Format an image's config as a row has it."""
    return json.dumps(asdict(config), ensure_ascii=False)


def config_of(text: str) -> ImageConfig:
    """Parse an image's config from its row. Raises InvalidJobError."""
    members = json.loads(text)
    return ImageConfig(
        members["env"], members["workdir"], tuple(members["entrypoint"]), tuple(members["command"])
    )


def require_room(db: sqlite3.Connection, client_name: str, name: str, quotas: Quotas) -> None:
    """Check that a client has room for another image. Raises LimitReachedError."""
    query = "SELECT count(*) FROM images WHERE client_name = ? AND name NOT IN ('', ?)"
    (count,) = db.execute(query, (client_name, name)).fetchone()
    if quotas.images_max and count >= quotas.images_max:
        raise LimitReachedError(
            f"cannot load the image {name}: {client_name} has {count} images, and at most"
            f" {quotas.images_max} may be",
            hint="remove one: pjw image rm NAME; the operator sets clients.images_max",
            limit="images_max",
            most=quotas.images_max,
        )


def keep(db: sqlite3.Connection, client_name: str, key: str, image: Image, now_ns: int) -> str | None:
    """Give an image that was unpacked its name; the key of the one that had it before, if there was one."""
    before = _take_name(db, client_name, image.name)
    db.execute(
        "INSERT INTO images (client_name, key, name, digest, config, made_ns, used_ns)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (client_name, key, image.name, image.digest, config_text(image.config), now_ns, now_ns),
    )
    return before


def take_name(db: sqlite3.Connection, client_name: str, name: str) -> str:
    """Take its name from an image; its key. Raises ImageNotFoundError."""
    key = _take_name(db, client_name, name)
    if key is None:
        raise ImageNotFoundError(name)
    return key


def _take_name(db: sqlite3.Connection, client_name: str, name: str) -> str | None:
    row = db.execute(
        "UPDATE images SET name = '' WHERE client_name = ? AND name = ? RETURNING key", (client_name, name)
    ).fetchone()
    return row[0] if row else None


def lose(db: sqlite3.Connection, client_name: str, key: str) -> None:
    """Take the name from an image whose directory is missing, as after the restore of a backup."""
    db.execute("UPDATE images SET name = '' WHERE client_name = ? AND key = ?", (client_name, key))


def gone(db: sqlite3.Connection, client_name: str, key: str) -> None:
    """Delete the row of an image that was removed."""
    db.execute("DELETE FROM images WHERE client_name = ? AND key = ?", (client_name, key))


def find(db: sqlite3.Connection, client_name: str, name: str, now_ns: int) -> tuple[str, ImageConfig] | None:
    """Return the key and config of an image that a job is about to have; None where there is none."""
    row = db.execute(
        "UPDATE images SET used_ns = max(used_ns, ?) WHERE client_name = ? AND name = ?"
        " RETURNING key, config",
        (now_ns, client_name, name),
    ).fetchone()
    return (row[0], config_of(row[1])) if row else None


def config(db: sqlite3.Connection, client_name: str, key: str) -> ImageConfig | None:
    """Return the config of an image by its key, whether it has a name or not."""
    query = "SELECT config FROM images WHERE client_name = ? AND key = ?"
    row = db.execute(query, (client_name, key)).fetchone()
    return config_of(row[0]) if row else None


def listed(db: sqlite3.Connection, owner: str | None) -> list[tuple[Image, str]]:
    """Return the images of one client, or with None of all, with their keys, by clients and names."""
    whose, values = ("", ()) if owner is None else (" AND images.client_name = ?", (owner,))
    rows = db.execute(
        f"{_IMAGES} WHERE images.name <> ''{whose} ORDER BY images.client_name, images.name", values
    )
    return [
        (
            Image(name, digest, from_ns(made), from_ns(used), size, inodes, 0, client_name, config_of(text)),
            key,
        )
        for name, digest, made, used, size, inodes, client_name, text, key in rows
    ]


def running(db: sqlite3.Connection) -> list[tuple[int, str, str]]:
    """Return the jobs that have an image and have not ended: ids, clients and keys."""
    return db.execute(
        "SELECT id, client_name, image_key FROM jobs INDEXED BY jobs_alive"
        " WHERE state IS NULL AND start_ns > 0 AND image_key <> ''"
    ).fetchall()


def nameless(db: sqlite3.Connection) -> list[tuple[str, str, int | None]]:
    """Return directories of images without a name: clients, keys, and the job that unpacks one, if any.

    Rows that are left of images without a directory are deleted.
    """
    db.execute(
        "DELETE FROM images WHERE name = '' AND NOT EXISTS (SELECT 1 FROM workspaces"
        " WHERE workspaces.client_name = images.client_name AND workspaces.name = key)"
    )
    return db.execute(
        "SELECT client_name, name, (SELECT id FROM jobs INDEXED BY jobs_alive_of_workspace"
        " WHERE state IS NULL AND workspace <> '' AND client_name = workspaces.client_name"
        " AND workspace = workspaces.name)"
        " FROM workspaces WHERE name < 'A' AND NOT EXISTS (SELECT 1 FROM images"
        " WHERE images.client_name = workspaces.client_name AND key = workspaces.name AND images.name <> '')"
    ).fetchall()


def unused(db: sqlite3.Connection, before_ns: int) -> list[tuple[str, str, str]]:
    """Return images with a name that no job was started with since then: clients, names and keys."""
    query = "SELECT client_name, name, key FROM images WHERE name <> '' AND used_ns < ?"
    return db.execute(query, (before_ns,)).fetchall()


def first_unused_ns(db: sqlite3.Connection) -> int | None:
    """Return the last use of the image that was used longest ago; None without any."""
    row = db.execute("SELECT min(used_ns) FROM images WHERE name <> ''").fetchone()
    return row[0] if row else None
