"""Where a sweep's study is kept: a journal in its folder, or a database."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from sparse_pretrain.errors import UserError
from sparse_pretrain.sweeping.locks import JournalLock

JOURNAL_FILE = "journal.log"
DATABASES = "null for a file in the sweep's folder, or sqlite:///FILE, postgresql://…, mysql://…"
SQLITE_SECONDS = 60  # that a process waits for another one's write

optuna.logging.set_verbosity(optuna.logging.WARNING)


def absolute_url(url: str) -> str:
    """A database's URL that means the same from every folder.

    Raises:
        UserError: it is no such URL.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise UserError("storage", url, DATABASES) from error
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        if parsed.get_backend_name() == "sqlite":
            raise UserError("storage", f"{url}, which ends with this process", DATABASES)
        return url
    path = Path(str(parsed.database)).expanduser().absolute()
    return parsed.set(database=str(path)).render_as_string(hide_password=False)


def without_password(url: str) -> str:
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """The storage at `url`, or the journal in `folder`, which must be there.

    Raises:
        UserError: it cannot be opened.
    """
    if url is None:
        path = folder / JOURNAL_FILE
        try:
            return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalLock(path)))  # type: ignore[arg-type]
        except (ValueError, KeyError, AssertionError) as error:
            raise UserError(
                "out", f"{path}, which is damaged", "a whole journal", "With another out= the sweep starts anew"
            ) from error
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    shown = without_password(url)
    engine: dict[str, Any] = {"connect_args": {"timeout": SQLITE_SECONDS}} if url.startswith("sqlite") else {}
    try:
        return RDBStorage(url, engine_kwargs=engine)
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise UserError("storage", f"{shown}, whose driver is not installed ({reason})", DATABASES) from error
    except (ArgumentError, SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        cause = getattr(error.__cause__ or error, "orig", None) or error.__cause__ or error
        reason = str(cause).splitlines()[0].rstrip(".")
        raise UserError("storage", f"{shown}, which cannot be opened ({reason})", DATABASES) from error


@contextmanager
def storing(folder: Path) -> Iterator[None]:
    """Turn a full disk, or a database that is gone, into one sentence; what is stored so far is whole.

    Raises:
        UserError: in place of the storage's errors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    except StorageInternalError as error:
        raise UserError("storage", "a database that does not answer", "one that can be reached and written") from error
    except OSError as error:
        raise UserError("out", f"{folder}, which cannot be written ({error.strerror})", "a writable folder") from error
