"""What every record that is written to a file or to stdout has in common."""

import os
import shutil
from pathlib import Path
from uuid import uuid4

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen, with no other fields than its own, and with numbers that are numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Telling:
    """What tells in plain text what it holds. Printed, it tells that; its fields are thousands of numbers."""

    def describe(self) -> str:
        """A few lines of plain text."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.describe()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.describe().partition(chr(10))[0]}>"


class Described(Telling, Record):
    """A record that does."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, so that whoever looks finds all of it, or what was there before.

    Raises:
        OSError: as any write, a full disk for instance. Nothing is left of it then.
    """
    if path.exists() and not path.is_file():  # a pipe, a terminal, /dev/null: to be written to, not replaced
        path.write_bytes(content)
        return
    target = Path(os.path.realpath(path))  # a link goes on to point there
    aside = target.with_name(f".{uuid4().hex}.part")  # not the file's name, which may be as long as names can be
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
