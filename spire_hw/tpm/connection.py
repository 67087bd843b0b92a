"""An open TPM as a job sees it: commands repeated while it is busy, everything unloaded again.

Nothing here knows threads: a `Connection` is only ever touched by the one thread of its device.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import SpireHwError, UnavailableError
from spire_hw.tpm.errors import (
    FULL,
    STALE,
    TRANSIENT,
    WRONG_PASSWORD,
    Rc,
    TpmError,
    is_transport_failure,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The library prints its own error lines to stderr; ours say more.
os.environ.setdefault("TSS2_LOG", "all+NONE")

try:
    from tpm2_pytss import ESAPI, TSS2_Exception
    from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_CAP, TPM2_HR, TPM2_SE
    from tpm2_pytss.types import TPMT_SYM_DEF
except (ImportError, OSError) as e:
    raise UnavailableError(
        f"the TPM software stack is missing ({e}): install libtss2 and tpm2-pytss"
    ) from e

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.02, 1.0
# How long others may hold all slots of a TPM without resource manager before a job is given up,
# and how long an object of ours has to be seen unchanged to be one that a dead process left.
_FULL_PATIENCE_S: Final = 3.0
_LEFTOVER_S: Final = 1.0
_FLUSH_S: Final = 2.0
_CAPABILITY_PAGE: Final = 64
_MAX_CONTEXTS: Final = 32
_NO_OBJECT_SLOT: Final = frozenset({Rc.OBJECT_MEMORY, Rc.OBJECT_HANDLES})

TRANSIENT_HANDLES: Final = int(TPM2_HR.TRANSIENT)
PERSISTENT_HANDLES: Final = int(TPM2_HR.PERSISTENT)
NV_HANDLES: Final = int(TPM2_HR.NV_INDEX)
SESSION_HANDLES: Final = int(TPM2_HR.HMAC_SESSION)


class Hierarchy(Enum):
    """Hierarchies whose password an operator may have set."""

    OWNER = int(ESYS_TR.OWNER)
    ENDORSEMENT = int(ESYS_TR.ENDORSEMENT)


class Capability(Enum):
    """Lists a TPM gives about itself: TPM2_CAP number and layout of one item."""

    ALGORITHMS = (int(TPM2_CAP.ALGS), ">HI")
    HANDLES = (int(TPM2_CAP.HANDLES), ">I")
    PROPERTIES = (int(TPM2_CAP.TPM_PROPERTIES), ">II")
    CURVES = (int(TPM2_CAP.ECC_CURVES), ">H")


HASH_NAMES: Final = {
    0x0004: "sha1",
    0x000B: "sha256",
    0x000C: "sha384",
    0x000D: "sha512",
    0x0012: "sm3_256",
    0x0027: "sha3_256",
    0x0028: "sha3_384",
    0x0029: "sha3_512",
}


@dataclass(slots=True)
class Passwords:
    """Passwords of hierarchies, and which of them the TPM refused.

    A refused one is not sent again before it is another one: it may be counted.
    """

    known: dict[Hierarchy, bytes] = field(default_factory=dict)
    refused: set[Hierarchy] = field(default_factory=set)

    def put(self, hierarchy: Hierarchy, password: bytes) -> bool:
        """Take a password; tell whether it is another one than before."""
        if self.known.get(hierarchy) == password:
            return False
        self.known[hierarchy] = password
        self.refused.discard(hierarchy)
        return True


@dataclass(frozen=True, slots=True)
class _Context:
    """A saved object; useless after a reset of the TPM."""

    saved: Any


@dataclass(slots=True)
class _Shortage:
    """What is known about a TPM without a free slot, while one command waits for it.

    Attributes:
        deadline: of the job, monotonic seconds.
        began_at: when it was met first, None before that.
        seen: handle and Name of leftovers of ours at that time.
    """

    deadline: float
    began_at: float | None = None
    seen: dict[int, bytes] = field(default_factory=dict)

    @property
    def give_up_at(self) -> float:
        """Return when waiting ends."""
        began = time.monotonic() if self.began_at is None else self.began_at
        return min(self.deadline, began + _FULL_PATIENCE_S)


class Connection:
    """An open TPM as a job sees it; only ever touched by the device's thread.

    Attributes:
        esys: the library's context, for `call`.
        is_lost: the TPM does not answer; the device will open a new connection.
    """

    def __init__(self, tcti: str, passwords: Passwords, names: set[bytes]) -> None:
        """Open the TPM.

        Args:
            tcti: TCTI string.
            passwords: shared hierarchy passwords.
            names: shared set of object Names we made, see `remember`.

        Raises:
            UnavailableError: it cannot be reached.
        """
        self.tcti = tcti
        self.is_lost = False
        self._loaded: list[Any] = []
        self._names = names
        self._passwords = passwords
        self._contexts: OrderedDict[bytes, _Context] = OrderedDict()
        self._operation, self._deadline = "open", 0.0
        try:
            self.esys = ESAPI(tcti)
        except TSS2_Exception as e:
            raise UnavailableError(
                f"no TPM answers at {tcti}: check that the device exists and that this process "
                "may open it (group tss)"
            ) from e
        for hierarchy, password in passwords.known.items():
            self.esys.tr_set_auth(ESYS_TR(hierarchy.value), password)

    def begin(self, operation: str, deadline: float) -> None:
        """Name what comes next, for messages, and when it must be over (monotonic seconds)."""
        self._operation = operation
        self._deadline = deadline

    def call(self, command: Callable[..., Any], /, *args: object, **kwargs: object) -> Any:
        """Give one command; repeat it while the TPM says that it is busy.

        Args:
            command: a method of `esys`.
            args: its arguments.
            kwargs: its keyword arguments.

        Raises:
            TpmError: the TPM refused.
            UnavailableError: the TPM is gone or did not answer in time.
        """
        wait_s, shortage = _FIRST_WAIT_S, _Shortage(self._deadline)
        while True:
            self._check_alive()
            try:
                return command(*args, **kwargs)
            except TSS2_Exception as e:
                error = self._translate(int(e.rc), e)
                if error.is_any(FULL):
                    self._make_room(error, shortage)
                elif not error.is_any(TRANSIENT):
                    raise error from e
                limit = shortage.give_up_at if error.is_any(FULL) else self._deadline
                if time.monotonic() + wait_s > limit:
                    raise error from e
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    @contextlib.contextmanager
    def loaded(self, handle: Any) -> Iterator[Any]:
        """Unload a transient object or session at the end of the block, however it ends."""
        self._loaded.append(handle)
        try:
            yield handle
        finally:
            self._loaded.remove(handle)
            self._flush(handle)

    @contextlib.contextmanager
    def cached(self, label: bytes, load: Callable[[], Any]) -> Iterator[Any]:
        """Load an object by its saved context, or by `load` when there is none that works.

        Args:
            label: what object; callers use its Name or a word.
            load: loads or makes it and returns its handle.
        """
        handle = self._restore(label)
        if handle is None:
            handle = load()
            with self._flushed_on_error(handle):
                self._contexts[label] = _Context(self.call(self.esys.context_save, handle))
            if len(self._contexts) > _MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        with self.loaded(handle):
            yield handle

    @contextlib.contextmanager
    def authorised(self, hierarchy: Hierarchy) -> Iterator[tuple[Any, Any]]:
        """Give the handle of a hierarchy and the session that authorises its use.

        Where a password is set it is proved by HMAC, so that it does not cross the bus.

        Raises:
            UnavailableError: see `proving`.
        """
        if not self._passwords.known.get(hierarchy):
            yield ESYS_TR(hierarchy.value), ESYS_TR.PASSWORD
            return
        none = ESYS_TR.NONE
        cipher = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
        with self.proving(hierarchy):
            session = self.call(
                self.esys.start_auth_session, none, none, TPM2_SE.HMAC, cipher, TPM2_ALG.SHA256
            )
            with self.loaded(session):
                yield ESYS_TR(hierarchy.value), session

    @contextlib.contextmanager
    def proving(self, hierarchy: Hierarchy) -> Iterator[None]:
        """Use a hierarchy's password in the block, unless the TPM refused it before.

        Raises:
            UnavailableError: it did.
        """
        if hierarchy in self._passwords.refused:
            raise UnavailableError(
                f"{self._operation}: the TPM refused the password of the "
                f"{hierarchy.name.lower()} hierarchy, it is not sent again: correct its file and "
                "restart"
            )
        try:
            yield
        except TpmError as e:
            if e.is_any(WRONG_PASSWORD) and self._passwords.known.get(hierarchy):
                self._passwords.refused.add(hierarchy)
            raise

    def forget(self, label: bytes) -> None:
        """Drop a saved context."""
        self._contexts.pop(label, None)

    def forget_all(self) -> None:
        """Drop all saved contexts, as after a reset of the TPM."""
        self._contexts.clear()

    def remember(self, name: bytes) -> None:
        """Note the Name of an object that only we make: leftovers may be flushed to gain a slot.

        Not for standard keys (storage root, endorsement), which others load as well.
        """
        self._names.add(name)

    def capability(self, kind: Capability, first: int = 0) -> list[tuple[int, ...]]:
        """Return all values of a capability, from property `first` on, as tuples of integers."""
        number, layout = kind.value
        found: list[tuple[int, ...]] = []
        more = True
        while more:
            raw, more = self._capability_page(number, first)
            items = list(struct.iter_unpack(layout, raw))
            found += items
            if not items:
                break
            first = items[-1][0] + 1
        return found

    def pcr_banks(self) -> dict[str, tuple[int, ...]]:
        """Return the PCRs of every bank, by hash name; a bank that is off has none."""
        raw, _ = self._capability_page(int(TPM2_CAP.PCRS), 0)
        banks: dict[str, tuple[int, ...]] = {}
        while raw:
            number, size = struct.unpack_from(">HB", raw)
            bitmap = int.from_bytes(raw[3 : 3 + size], "little")
            name = HASH_NAMES.get(number, f"0x{number:04x}")
            banks[name] = tuple(n for n in range(8 * size) if bitmap >> n & 1)
            raw = raw[3 + size :]
        return banks

    def _capability_page(self, kind: int, first: int) -> tuple[bytes, bool]:
        more, data = self.call(self.esys.get_capability, kind, first, _CAPABILITY_PAGE)
        # TPMS_CAPABILITY_DATA: kind, count, items.
        return bytes(data.marshal())[8:], bool(more)

    def handles(self, first: int) -> list[int]:
        """Return the handles that exist in one range, such as `TRANSIENT_HANDLES`."""
        last = first | int(TPM2_HR.HANDLE_MASK)
        found = self.capability(Capability.HANDLES, first)
        return [h for (h,) in found if first <= h <= last]

    def close(self) -> None:
        """Unload what is left and close."""
        for handle in reversed(self._loaded):
            self._flush(handle)
        self._loaded.clear()
        self.esys.close()

    def _restore(self, label: bytes) -> Any:
        context = self._contexts.get(label)
        if context is None:
            return None
        try:
            handle = self.call(self.esys.context_load, context.saved)
        except TpmError as e:
            if not e.is_any(STALE) and e.decoded.layer == "TPM":
                raise
            self.forget_all()  # a reset took them all
            return None
        self._contexts.move_to_end(label)
        return handle

    @contextlib.contextmanager
    def _flushed_on_error(self, handle: Any) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._flush(handle)
            raise

    def _flush(self, handle: Any) -> None:
        if self.is_lost:
            return  # it went with the connection
        # A job that is out of time still tidies up: without a resource manager nobody else does.
        before, self._deadline = self._deadline, max(self._deadline, time.monotonic() + _FLUSH_S)
        try:
            self.call(self.esys.flush_context, handle)
        except SpireHwError:
            # Whatever was wrong, this connection cannot be trusted to be clean any more.
            self.is_lost = True
        finally:
            self._deadline = before

    def _make_room(self, error: TpmError, shortage: _Shortage) -> None:
        """Flush objects of ours that a dead process left behind; never those of others.

        What another process of ours has loaded just now looks the same, but not for long.
        """
        now = time.monotonic()
        if shortage.began_at is None:
            shortage.began_at = now
            shortage.seen = self._leftovers() if error.is_any(_NO_OBJECT_SLOT) else {}
        elif shortage.seen and now - shortage.began_at >= _LEFTOVER_S:
            present = self._leftovers()
            for handle, name in shortage.seen.items():
                if present.get(handle) == name:
                    with contextlib.suppress(TpmError):  # gone in the meantime
                        object_ = self.call(self.esys.tr_from_tpmpublic, handle)
                        self.call(self.esys.flush_context, object_)
            shortage.seen = {}

    def _leftovers(self) -> dict[int, bytes]:
        """Return handle and Name of objects that only we make and this process did not load."""
        mine = {int(self.esys.tr_get_tpm_handle(h)) for h in self._loaded}
        found = {}
        for handle in self.handles(TRANSIENT_HANDLES):
            if handle in mine:
                continue
            with contextlib.suppress(TpmError):
                object_ = self.call(self.esys.tr_from_tpmpublic, handle)
                name = bytes(self.esys.tr_get_name(object_))
                self.esys.tr_close(object_)
                if name in self._names:
                    found[handle] = name
        return found

    def _check_alive(self) -> None:
        if self.is_lost:
            raise UnavailableError(f"{self._operation}: the TPM at {self.tcti} is gone")
        if time.monotonic() > self._deadline:
            raise UnavailableError(f"{self._operation}: the TPM at {self.tcti} took too long")

    def _translate(self, code: int, cause: BaseException) -> TpmError:
        if is_transport_failure(code):
            self.is_lost = True
            raise UnavailableError(
                f"{self._operation}: the TPM at {self.tcti} cannot be reached; was it unplugged, "
                "or its driver unloaded?"
            ) from cause
        error = TpmError(code, device=self.tcti, operation=self._operation)
        if error.decoded.layer != "TPM":
            self.is_lost = True  # the software stack is confused: start over with a new context
        return error
