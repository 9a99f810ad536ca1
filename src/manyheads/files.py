# SPDX-License-Identifier: Apache-2.0
"""Writing files so that a reader, or a crash, never meets half of one."""

import os
import tempfile
from pathlib import Path

from .errors import UserError

__all__ = ["check_writable", "write_asked", "write_atomically"]


def check_writable(place: Path, option: str = "--out", file: bool = False) -> None:
    """Refuse a folder, or a file, that cannot be written to or made, before anything is.

    Args:
        place: of the folder or file.
        option: of the command line that names another.
        file: whether it is a file.

    Raises:
        UserError: so it is.
    """
    whole = place.absolute()
    near = next(p for p in (*([] if file else [whole]), *whole.parents) if p.exists())
    if (file and whole.is_dir()) or not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        what = "file" if file else "folder"
        raise UserError(f"cannot write {'' if file else 'to '}{place}; give another {what} with {option}")


def write_asked(path: Path, content: str | bytes, option: str = "--out") -> Path:
    """Write a file that the user named by ``option``, and make its folder; see :func:`write_atomically`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}); give another place with {option}") from error
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content` (text as UTF-8): afterwards it holds all of the old or all of the new.

    Raises:
        OSError: the folder does not exist or cannot be written to; the old file is untouched.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(path.stat().st_mode if path.exists() else 0o644)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
