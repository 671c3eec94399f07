"""Where Optuna keeps a study: in memory, in a journal on a shared file system, in a database, behind a gRPC proxy."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from memplan.errors import UsageError

_LOCKED_S: Final = 60.0  # for which a database may be locked by others
_ANSWERS_S: Final = 30.0  # within which a proxy has to
_TRIES: Final = 5

_ENTRY: Final = b'{"op_code":'  # as each line of a journal begins
_BLOCK: Final = 2**16

_log = logging.getLogger("memplan")


def storage_of(given: str | Path | BaseStorage | None) -> BaseStorage:
    """Optuna's storage: in memory for None, a journal for a file, a database or a gRPC proxy for a URL.

    Raises:
        UsageError: no such kind, or it cannot be written to or reached.
    """
    if isinstance(given, BaseStorage):
        return given
    if given is None:
        return InMemoryStorage()
    text, file = str(given), Path(given)
    with reached(text):
        if text.startswith("grpc://"):
            return _proxy(text)
        if "://" in text:
            return _database(text)
        if file.suffix in (".log", ".journal"):
            try:
                return JournalStorage(_Journal(text))
            except (LookupError, TypeError) as error:
                raise UsageError(f"{text} is no journal of a study ({error}): name another file") from error
    raise UsageError(
        f"a study cannot be kept in {text!r}: give a file that ends in .log or .journal, a database's URL such as "
        "'sqlite:///tune.db', 'grpc://host:port', one of Optuna's storages, or None for memory"
    )


class _Journal(JournalFileBackend):
    """Optuna's file, in which a write that was cut short costs what it was to say and no more.

    Optuna appends behind a half-written last line, which makes one line of two that nobody can read.
    """

    def __init__(self, path: str) -> None:
        self._path, self._turn = path, JournalFileSymlinkLock(path)
        super().__init__(path, self._turn)
        with FileIO(path) as file:
            self._check_entry(file.read(len(_ENTRY)))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._turn.acquire()
        try:
            with FileIO(self._path, "a+") as file:  # without a buffer, which would be written after all when it closes
                self._append(file, lines)
        finally:
            self._turn.release()

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        sound = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                yield log
                sound += 1
        except ValueError as error:
            raise UsageError(
                f"line {sound + 1} of {self._path} is no entry of a study's journal ({error}). The {sound} lines "
                "before it are sound: start again with those alone, or name another file"
            ) from error

    def _append(self, file: FileIO, lines: bytes) -> None:
        end = self._cut(file)
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # then it is cut before the next write
                file.truncate(end)
            raise

    def _cut(self, file: FileIO) -> int:
        """The file without a half-written last line, and its size."""
        size, end = file.seek(0, os.SEEK_END), _end_of_lines(file)
        if end < size:
            file.seek(end)
            self._check_entry(file.read(len(_ENTRY)))
            file.truncate(end)
            _log.warning(
                "the last line of %s was cut short, by a full disk or the end of a process, and is removed", self._path
            )
        return end

    def _check_entry(self, begin: bytes) -> None:
        """That nobody else's file is cut or written to. What a disk has lost reads as zeros."""
        if not _ENTRY.startswith(begin.rstrip(b"\0")):
            raise UsageError(
                f"{self._path} is no journal of a study (it has {begin.decode(errors='replace')!r} where an entry "
                "should begin): name another file"
            )


def _end_of_lines(file: FileIO) -> int:
    """Where the last whole line of a file ends."""
    start = file.seek(0, os.SEEK_END)
    while start:
        end, start = start, max(0, start - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
    return 0


def _proxy(url: str) -> GrpcStorageProxy:
    address = urlsplit(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        proxy = GrpcStorageProxy(host=address.hostname or "localhost", port=address.port or 13000)
        proxy.wait_server_ready(timeout=_ANSWERS_S)
    return proxy


def _database(url: str) -> RDBStorage:
    """SQLite locks no rows, so that two workers could claim one trial: there a transaction locks as it begins."""
    sqlite = url.startswith("sqlite")
    arguments = {"connect_args": {"timeout": _LOCKED_S}} if sqlite else None
    for left in reversed(range(_TRIES)):
        try:
            storage = RDBStorage(url, engine_kwargs=arguments)
            break
        except DBAPIError:  # of workers that make the tables at the same moment one succeeds
            if not left:
                raise
            time.sleep(0.2)
        except RuntimeError as error:
            raise UsageError(
                f"the database's tables are of another version of Optuna ({error}): do that, or name another database"
            ) from error
    if sqlite:
        event.listen(storage.engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()  # connections that were opened before
    return storage


@contextmanager
def reached(what: str) -> Iterator[None]:
    """Errors of a disk, a database or a network are the caller's to mend."""
    try:
        yield
    except _mendable() as error:
        raise UsageError(
            f"{what} cannot be read or written ({type(error).__name__}: {error}). What was measured before is kept; "
            "mend that, or name another place"
        ) from error
    except ImportError as error:  # a database's driver, grpcio
        raise UsageError(f"{what} needs a package that is not here ({error}): install it, or use a file") from error


def _mendable() -> tuple[type[Exception], ...]:
    grpc = sys.modules.get("grpc")  # imported only where a study is behind a proxy
    known = (OSError, json.JSONDecodeError, SQLAlchemyError, StorageInternalError)
    return known if grpc is None else (*known, grpc.RpcError)
