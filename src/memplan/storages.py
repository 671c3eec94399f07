"""Where Optuna keeps a study: in memory, in a journal on a shared file system, in a database, behind a gRPC proxy."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from memplan.errors import UsageError

_LOCKED_S: Final = 60.0  # for which a database may be locked by others
_ANSWERS_S: Final = 30.0  # within which a proxy has to
_TRIES: Final = 5


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
                return JournalStorage(JournalFileBackend(text))
            except (ValueError, LookupError, TypeError) as error:
                raise UsageError(f"{text} is no journal of a study ({error}): name another file") from error
    raise UsageError(
        f"a study cannot be kept in {text!r}: give a file that ends in .log or .journal, a database's URL such as "
        "'sqlite:///tune.db', 'grpc://host:port', one of Optuna's storages, or None for memory"
    )


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
    except (OSError, SQLAlchemyError, StorageInternalError) as error:
        raise UsageError(
            f"{what} cannot be read or written ({type(error).__name__}: {error}). What was measured before is kept; "
            "mend that, or name another place"
        ) from error
    except ImportError as error:  # a database's driver, grpcio
        raise UsageError(f"{what} needs a package that is not here ({error}): install it, or use a file") from error
