"""WorkloadAttestor `unix`: user, groups and, on request, path and digest of the calling program.

Everything is read through the caller's own /proc directory, opened when it connected, so that a
reused pid cannot be mistaken for it. Numbers are the kernel's; names are looked up and left out
when there is none.
"""

from __future__ import annotations

import asyncio
import grp
import hashlib
import os
import pwd
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import ConfigFault, ErrorKind, SpireHwError

if TYPE_CHECKING:
    from spire_hw.config.hcl import Body
    from spire_hw.plugin.info import HostInfo
    from spire_hw.transport.peer import CallerProcess

NAME = "unix"

_STATUS_LIMIT = 64 << 10
_CHUNK = 1 << 20
_HASHING_THREADS = 2
_EFFECTIVE = 1  # field of "Uid:"/"Gid:" lines: real, effective, saved, file system


class Config(Model):
    """Keys of plugin_data.

    Attributes:
        discover_workload_path: add `path` and `sha256` of the program.
        workload_size_limit: bytes; 0 no limit, above it the digest is left out, below 0 always.
    """

    discover_workload_path: bool = False
    workload_size_limit: int = 0


class UnixAttestor:
    """Reads the caller's /proc directory."""

    def __init__(self, host: HostInfo) -> None:
        self._log = host.log
        self._config = Config()
        # Of its own: huge programs of one user must not hold up what other workloads wait for.
        self._hashing = ThreadPoolExecutor(_HASHING_THREADS, thread_name_prefix="unix-sha256")

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration."""
        return faults(config, Config)

    async def configure(self, config: Body) -> None:
        """Take the configuration."""
        self._config = decode(config, Config)

    async def attest(self, process: CallerProcess) -> list[str]:
        """Return selector values; see `WorkloadAttestor.attest`."""
        try:
            # User databases may be a network away.
            values = await asyncio.to_thread(_owner, process)
            if self._config.discover_workload_path:
                values += await self._program(process)
        except (OSError, ValueError, IndexError) as e:
            raise SpireHwError(
                f"process {process.pid} cannot be read: {e}", kind=ErrorKind.INTERNAL
            ) from e
        return values

    async def _program(self, process: CallerProcess) -> list[str]:
        path = process.read_link("exe")
        values = [f"path:{path}"]
        limit = self._config.workload_size_limit
        if limit < 0:
            return values
        fd = process.open_file("exe")
        size = os.fstat(fd).st_size
        if limit and size > limit:
            os.close(fd)
            self._log.warning(
                "Workload is larger than workload_size_limit, its digest is left out",
                path=path,
                size=size,
                workload_size_limit=limit,
            )
            return values
        stop = threading.Event()
        hashing = self._hashing.submit(_sha256, fd, stop)
        try:
            digest = await asyncio.wrap_future(hashing)
        finally:
            stop.set()  # whoever gave up waiting leaves no thread reading on
            if hashing.cancelled():  # before it began, so nobody else closes it
                os.close(fd)
        return [*values, f"sha256:{digest}"]

    async def close(self) -> None:
        """End the threads."""
        self._hashing.shutdown(wait=False, cancel_futures=True)


def _owner(process: CallerProcess) -> list[str]:
    status = _status(process.read_file("status", _STATUS_LIMIT))
    uid = int(status["Uid"].split()[_EFFECTIVE])
    gid = int(status["Gid"].split()[_EFFECTIVE])
    if (uid, gid) != (process.uid, process.gid):
        # It connected as somebody else: a program that runs as another user took its place, while
        # whoever holds the other end of the connection reads the answers.
        raise SpireHwError(
            f"process {process.pid} has changed its user or group since it connected",
            kind=ErrorKind.UNAUTHENTICATED,
        )
    values = [f"uid:{uid}", *_named("user", _user(uid))]
    values += [f"gid:{gid}", *_named("group", _group(gid))]
    for extra in status.get("Groups", "").split():
        values.append(f"supplementary_gid:{int(extra)}")
        values += _named("supplementary_group", _group(int(extra)))
    return values


def _status(text: bytes) -> dict[str, str]:
    # Nothing but a newline ends a line here: a process chooses its own name.
    lines = text.decode("utf-8", "replace").split("\n")
    pairs = (line.partition(":") for line in lines)
    found = {name: value.strip() for name, _, value in pairs}
    if "Uid" not in found or "Gid" not in found:
        raise ValueError("its status lacks Uid or Gid")
    return found


def _named(kind: str, name: str | None) -> list[str]:
    return [] if name is None else [f"{kind}:{name}"]


def _user(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _group(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None


def _sha256(fd: int, stop: threading.Event) -> str:
    """Return the digest of a file and close it."""
    digest = hashlib.sha256()
    with os.fdopen(fd, "rb", buffering=0) as file:
        while (chunk := file.read(_CHUNK)) and not stop.is_set():
            digest.update(chunk)
    return digest.hexdigest()


def build(host: HostInfo) -> UnixAttestor:
    """Make the plugin."""
    return UnixAttestor(host)
