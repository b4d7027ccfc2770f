"""Files of a run: each appears whole or not at all, and what goes wrong is said in a sentence."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.core.types import Json


class RunError(RuntimeError):
    """A run had to stop; the message says why, what is kept and what to do."""


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Inside, a failing disk becomes a ``RunError`` that names ``folder``."""
    reasons = {
        errno.ENOSPC: "the disk is full; make room",
        errno.EDQUOT: "the quota of the disk is used up; make room",
        errno.EROFS: "the file system is read-only; give another folder",
        errno.EACCES: "the folder must not be written by this user; give another folder",
        errno.EPERM: "the folder must not be written by this user; give another folder",
    }
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno or 0, str(error))
        raise RunError(
            f"{folder}: {reason}. What is finished is kept; the same command goes on from there."
        ) from error


def write(path: Path, data: bytes | str) -> None:
    """Write a file by renaming a finished one; remains of interrupted writes are removed.

    Several processes may write the same content at once. Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    for attempt in range(3):
        clear_parts(path.parent, path.name)
        try:
            part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            part.replace(path)
            return
        except FileNotFoundError:  # another process took it for a remain
            if attempt == 2:
                raise
        finally:
            part.unlink(missing_ok=True)


def clear_parts(folder: Path, name: str = "") -> None:
    """Remove what interrupted writes of ``name``, or of any file, left in ``folder``."""
    for part in folder.glob(f".{glob_safe(name)}*.part"):
        part.unlink(missing_ok=True)


def glob_safe(name: str) -> str:
    """``name`` so that a pattern finds only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def write_json(path: Path, value: object) -> None:
    """Write strict JSON with sorted keys: equal values are equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write(path, text + "\n")


def read_json(path: Path) -> Json | None:
    """The object in a file; None where there is no file, or none that is whole."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def digest(data: object) -> str:
    """SHA-256 of bytes, or of a value as sorted JSON, in hex."""
    if not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True, ensure_ascii=False).encode("utf-8")
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str | None:
    """SHA-256 of a file in hex, None where there is none."""
    try:
        return digest(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
