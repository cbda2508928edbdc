"""Writing files so that no reader ever meets half of one."""

import os
import pathlib


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file in one step: a reader sees the old one or the new one, whole.

    Raises: OSError if the disk is full or the folder is not writable; the old file is then intact.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = f"{error.strerror} (what was there before is intact; see to the disk and go on)"
        raise OSError(error.errno, reason, str(path)) from error
