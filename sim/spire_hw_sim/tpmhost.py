"""The server around an attestor, without its sockets: admission, a store on disk, the audit log."""

from __future__ import annotations

import atexit
import shutil
import sqlite3
from contextlib import asynccontextmanager, closing
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, Final, cast

import structlog

from spire_hw.errors import PluginError, SpireHwError
from spire_hw.log import Logger, get_logger
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.admission import Admissions
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping

    from spire_hw.plugin.nodeattestor import ServerNodeAttestor
    from spire_hw_server.datastore.interface import Datastore

_SOURCE: Final = "192.0.2.77"
_SAMPLED: Final = 100  # records of one source that are written one by one


class Host:
    """A server that lets nodes in by one attestor.

    Attributes:
        records: audit records that were written.
        last: the last of them.
    """

    def __init__(self, name: str, attestor: ServerNodeAttestor, database: Path) -> None:
        """Describe it; `open_host` makes one.

        Args:
            name: of the attestor.
            attestor: configured.
            database: a new store.
        """
        self.records = 0
        self.last: dict[str, Any] = {}
        self._name = name
        self._attestor = attestor
        self._database = database
        self._empty: list[str] = []
        self._acts = 0
        self._store: Datastore | None = None
        self._admissions: Admissions | None = None

    def _take(self, _logger: object, _level: str, line: MutableMapping[str, Any]) -> str:
        if line.get("type") == "audit":
            self.records += 1
            self.last = dict(line)
        return ""

    async def open(self) -> None:
        """Open the store."""
        clock = SimClock()
        self._store = await open_datastore(
            DatastoreConfig("sqlite3", str(self._database)), clock=clock, log=get_logger("host")
        )
        log = structlog.wrap_logger(structlog.ReturnLogger(), processors=[self._take])
        self._admissions = Admissions(
            self._store,
            trust_domain=TrustDomain("example.org"),
            attestors={self._name: self._attestor},
            clock=clock,
            log=cast("Logger", log),
        )
        self._empty = self._rows()

    async def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            await self._store.close()

    def _rows(self) -> list[str]:
        with closing(sqlite3.connect(self._database)) as database:
            return list(database.iterdump())

    async def attest(
        self,
        payload: bytes,
        csr_spki: bytes,
        challenge: Callable[[bytes], Awaitable[bytes]],
        source: str = "",
    ) -> object:
        """Let a node attest, as far as its SVID.

        Raises:
            SpireHwError: it is refused; that of the attestor without the attestor's name.
            AssertionError: the attestor's name is not there once.
        """
        if self._admissions is None:
            raise AssertionError("the host is not open")
        self._acts += 1
        try:
            return await self._admissions.admit(
                self._name, payload, csr_spki, challenge, caller=_SOURCE, source=source
            )
        except PluginError as e:
            cause = e.__cause__
            if not isinstance(cause, SpireHwError):
                raise
            if e.message != f"nodeattestor({self._name}): {cause.message}":
                raise AssertionError(f"said twice who refuses: {e.message}") from e
            raise cause from cause.__cause__

    def check_after(self, error: SpireHwError) -> None:
        """Make sure that an audit record is all that refusals left.

        Raises:
            AssertionError: something was stored, or no record says what `error` does.
        """
        if self._rows() != self._empty:
            raise AssertionError(f"something was stored: {self._rows()}")
        if self.records != min(self._acts, _SAMPLED):
            raise AssertionError(f"{self.records} audit records of {self._acts} refusals")
        said = self.last["status_message"].removeprefix(f"nodeattestor({self._name}): ")
        if (said, self.last["status_code"]) != (error.message, error.kind.name):
            raise AssertionError(f"the audit record says something else: {self.last}")


@asynccontextmanager
async def open_host(name: str, attestor: ServerNodeAttestor) -> AsyncIterator[Host]:
    """Run a server around an attestor, with a store of its own that is empty."""
    with TemporaryDirectory(prefix="host") as folder:
        database = Path(folder) / "db"
        shutil.copyfile(await _template(), database)
        host = Host(name, attestor, database)
        await host.open()
        try:
            yield host
        finally:
            await host.close()


@cache
def _place() -> Path:
    folder = mkdtemp(prefix="host")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "empty"


async def _template() -> Path:
    """Return an empty store with its tables; they are made once in a process."""
    path = _place()
    if not path.exists():
        store = await open_datastore(
            DatastoreConfig("sqlite3", str(path)), clock=SimClock(), log=get_logger("host")
        )
        await store.close()
    return path
