"""Files that a reader finds whole, or as they were before."""

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes a file that is found either whole or as it was before, even after power loss.

    Args:
      path: of the file, in a folder that exists.
      content: of the file; text is written as UTF-8.

    Raises:
      OSError: it cannot be written; what was there is left as it was, and nothing beside it.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
