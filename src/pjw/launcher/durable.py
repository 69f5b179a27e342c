"""Small files of the launcher that are whole even after a power cut."""

import os


def replace_file(path: str, data: bytes) -> None:
    """Write a file that only root can read; a reader sees the old data or the new. Raises OSError.

    It syncs file and directory: after it returns, a power cut does not bring the old data back.
    """
    new = f"{path}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with open(os.open(new, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(new, path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
