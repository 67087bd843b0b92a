"""A TPM and its one thread: jobs run one after the other, whoever asks.

A job is a plain function of a `Connection`; it runs alone in the device's thread, so nothing can
come between its commands. What to do with keys is in `keys` and `attest`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.aio.worker import Worker
from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError, UnavailableError
from spire_hw.files import read_bounded
from spire_hw.log import get_logger
from spire_hw.tpm.connection import Connection, Passwords

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.tpm.connection import Hierarchy

T = TypeVar("T")

_DEFAULT_DEVICE: Final = Path("/dev/tpmrm0")
_DEFAULT_TIMEOUT_S: Final = 30.0
# People should hear what is waited for long before a command is given up, but not without end.
_PATIENCE_S: Final = 2.0
_BETWEEN_NOTICES_S: Final = 30.0
_CLOSE_TIMEOUT_S: Final = 5.0
_MAX_PASSWORD_BYTES: Final = 1024


def resolve_tcti(text: str) -> str:
    """Return the TCTI string for what a configuration says.

    Args:
        text: a TCTI such as `swtpm:host=localhost,port=2321`, a device path, or empty for the
            kernel's resource manager.

    Raises:
        NotReadyError: empty, and there is no TPM or more than one.
        InvalidInputError: neither a path nor a TCTI.
    """
    if not text:
        found = sorted(_DEFAULT_DEVICE.parent.glob("tpmrm*"))
        if not found:
            raise NotReadyError(
                f"there is no TPM: {_DEFAULT_DEVICE} does not exist; switch the TPM on in the "
                "firmware setup, or set tpm_device_path"
            )
        if len(found) > 1:
            names = ", ".join(str(p) for p in found)
            raise NotReadyError(f"there are several TPMs ({names}): set tpm_device_path")
        text = str(found[0])
    if text.startswith("/"):
        return f"device:{text}"
    name = text.partition(":")[0]
    if not name.replace("-", "").isalnum():
        raise InvalidInputError(f"{text!r} is neither a device path nor a TCTI")
    return text


class TpmDevice:
    """One TPM and its thread.

    Attributes:
        tcti: the resolved TCTI string.
    """

    def __init__(self, tcti: str) -> None:
        """Prepare; the TPM is opened by the first job.

        Args:
            tcti: as `resolve_tcti` takes it.
        """
        self.tcti = resolve_tcti(tcti)
        self._worker = Worker(f"TPM {self.tcti}")
        self._connection: Connection | None = None
        self._passwords = Passwords()
        self._password_changed = False
        self._names: set[bytes] = set()
        self._users = 1
        self._log = get_logger("tpm")
        self._next_notice_at = 0.0

    async def run(
        self,
        operation: str,
        job: Callable[[Connection], T],
        *,
        timeout_s: float = _DEFAULT_TIMEOUT_S,
    ) -> T:
        """Run a job in the device's thread.

        A job may run twice when the connection turns out to be dead, so it must not depend on
        what an earlier command of its own left in the TPM.

        Args:
            operation: what it is for, in an operator's words.
            job: gives commands to the connection and returns plain values.
            timeout_s: for the job, including its wait in the queue.

        Raises:
            TpmError: the TPM refused a command.
            UnavailableError: the TPM is gone, or the job took too long.
            SpireHwError: DEADLINE_EXCEEDED, a command hangs; later jobs wait for it, each until
                its own deadline.
        """
        deadline = time.monotonic() + timeout_s
        notice = asyncio.get_running_loop().call_later(
            _PATIENCE_S, self._tell_waiting, operation, timeout_s
        )
        try:
            # The job looks at its deadline between commands; the worker's is for one that hangs.
            return await self._worker.run(
                lambda: self._execute(operation, job, deadline), timeout_s=timeout_s + 1.0
            )
        finally:
            notice.cancel()

    def _tell_waiting(self, operation: str, timeout_s: float) -> None:
        now = time.monotonic()
        if now < self._next_notice_at:
            return
        self._next_notice_at = now + _BETWEEN_NOTICES_S
        self._log.warning(
            "Still waiting for the TPM",
            operation=operation,
            tcti=self.tcti,
            given_up_after_s=timeout_s,
        )

    def set_password(self, hierarchy: Hierarchy, password: bytes) -> None:
        """Use a hierarchy password from the next connection on."""
        if self._passwords.put(hierarchy, password):
            self._password_changed = True

    async def close(self) -> None:
        """Give the device back; the last user closes it."""
        with _registry_lock:
            self._users -= 1
            if self._users > 0:
                return
            if _registry.get(self.tcti) is self:
                del _registry[self.tcti]
        wait_s = _CLOSE_TIMEOUT_S
        try:
            await self._worker.run(self._disconnect, timeout_s=wait_s)
        except SpireHwError as e:  # it hangs, or is gone: nobody can tidy up in it
            self._log.warning("TPM left as it is", tcti=self.tcti, error=e.message)
            wait_s = 0.0
        await self._worker.close(wait_s)

    def _execute(self, operation: str, job: Callable[[Connection], T], deadline: float) -> T:
        was_open = self._connection is not None
        try:
            return self._attempt(operation, job, deadline)
        except UnavailableError:
            if not was_open or self._connection is not None or time.monotonic() > deadline:
                raise
        return self._attempt(operation, job, deadline)

    def _attempt(self, operation: str, job: Callable[[Connection], T], deadline: float) -> T:
        if self._password_changed:
            self._disconnect()
        if self._connection is None:
            self._connection = Connection(self.tcti, self._passwords, self._names)
            self._password_changed = False
        connection = self._connection
        connection.begin(operation, deadline)
        try:
            return job(connection)
        finally:
            if connection.is_lost:
                self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _share(self) -> TpmDevice:
        self._users += 1
        return self


_registry: dict[str, TpmDevice] = {}
_registry_lock = threading.Lock()


def shared(tcti: str) -> TpmDevice:
    """Return the process's one device for a TCTI; give it back with `close`.

    Raises:
        NotReadyError: no TCTI given and there is no TPM, or more than one.
    """
    resolved = resolve_tcti(tcti)
    with _registry_lock:
        found = _registry.get(resolved)
        if found is not None:
            return found._share()  # noqa: SLF001 - same module
        device = _registry[resolved] = TpmDevice(resolved)
        return device


def load_password(path: str, *, pipes: bool = False) -> bytes:
    """Return the password a file holds, without its final newline; empty for no path.

    Args:
        path: the file.
        pipes: as in `read_bounded`.

    Raises:
        NotReadyError: the file cannot be read or is too long for a password.
    """
    if not path:
        return b""
    try:
        content = read_bounded(Path(path), _MAX_PASSWORD_BYTES, "password file", pipes=pipes)
    except InvalidInputError as e:
        raise NotReadyError(f"{e.message}: too long for a password") from e
    return content.removesuffix(b"\n").removesuffix(b"\r")
