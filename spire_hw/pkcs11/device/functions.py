"""Functions of a PKCS#11 module called without python-pkcs11: those it lacks or is slow at.

Runs in the worker only, on a module that python-pkcs11 has loaded and initialised. A call holds the
interpreter's lock: a worker has one thread.

Spec: PKCS #11 v2.40, sections 3.2 (CK_TOKEN_INFO), 5.4 (CK_FUNCTION_LIST) and 5.13 (signing).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

from spire_hw.pkcs11.memory import Memory
from spire_hw.pkcs11.wire import MAX_BATCH

if TYPE_CHECKING:
    from collections.abc import Sequence

# Places in CK_FUNCTION_LIST.
_GET_TOKEN_INFO: Final = 6
_GET_SESSION_INFO: Final = 15
_SIGN_INIT: Final = 42
_SIGN: Final = 43
_NOT_SUPPORTED: Final = 0x54  # CKR_FUNCTION_NOT_SUPPORTED
_MAX_SIGNATURE: Final = 1024  # bytes; RSA-4096 makes 512
_ROOM: Final[list[ctypes.c_ulong | int]] = [_MAX_SIGNATURE] * MAX_BATCH


class CkrError(Exception):
    """A function answered with something else than CKR_OK.

    Attributes:
        code: the CKR number.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"0x{code:x}")
        self.code = code


class _SessionInfo(ctypes.Structure):
    _fields_ = (
        ("slot_id", ctypes.c_ulong),
        ("state", ctypes.c_ulong),
        ("flags", ctypes.c_ulong),
        ("device_error", ctypes.c_ulong),
    )


class _TokenInfo(ctypes.Structure):
    _fields_ = (
        ("label", ctypes.c_ubyte * 32),
        ("manufacturer_id", ctypes.c_ubyte * 32),
        ("model", ctypes.c_ubyte * 16),
        ("serial_number", ctypes.c_ubyte * 16),
        ("flags", ctypes.c_ulong),
        ("max_session_count", ctypes.c_ulong),
        ("session_count", ctypes.c_ulong),
        ("max_rw_session_count", ctypes.c_ulong),
        ("rw_session_count", ctypes.c_ulong),
        ("max_pin_length", ctypes.c_ulong),
        ("min_pin_length", ctypes.c_ulong),
        ("total_public_memory", ctypes.c_ulong),
        ("free_public_memory", ctypes.c_ulong),
        ("total_private_memory", ctypes.c_ulong),
        ("free_private_memory", ctypes.c_ulong),
        ("hardware_version", ctypes.c_ubyte * 2),
        ("firmware_version", ctypes.c_ubyte * 2),
        ("utc_time", ctypes.c_ubyte * 16),
    )


class _PssParameters(ctypes.Structure):
    _fields_ = (
        ("hash_mechanism", ctypes.c_ulong),
        ("mgf", ctypes.c_ulong),
        ("salt_length", ctypes.c_ulong),
    )


class _Mechanism(ctypes.Structure):
    _fields_ = (
        ("mechanism", ctypes.c_ulong),
        ("parameter", ctypes.c_void_p),
        ("parameter_length", ctypes.c_ulong),
    )


class Mechanism:
    """A CK_MECHANISM that stays where it is.

    Attributes:
        reference: what ctypes passes as a pointer to it.
    """

    def __init__(self, number: int, pss: tuple[int, int, int] | None) -> None:
        self._parameters = None if pss is None else _PssParameters(*pss)
        place = None if self._parameters is None else ctypes.addressof(self._parameters)
        length = 0 if self._parameters is None else ctypes.sizeof(self._parameters)
        self._mechanism = _Mechanism(number, place, length)
        self.reference = ctypes.byref(self._mechanism)


class Functions:
    """The functions of one module."""

    def __init__(self, module: str) -> None:
        table = ctypes.POINTER(ctypes.c_void_p)()
        code = ctypes.CDLL(module).C_GetFunctionList(ctypes.byref(table))
        if code != 0:
            raise CkrError(code)
        self._token_info = _function(table, _GET_TOKEN_INFO)
        self._session_info = _function(table, _GET_SESSION_INFO)
        self._sign_init = _function(table, _SIGN_INIT)
        self._sign = _function(table, _SIGN)
        # Made once: where the outputs of a batch and their lengths go, and pointers to each.
        outputs = (ctypes.c_ubyte * (_MAX_SIGNATURE * MAX_BATCH))()
        self._outputs = memoryview(outputs).cast("B")
        self._lengths = (ctypes.c_ulong * MAX_BATCH)()
        item = ctypes.sizeof(ctypes.c_ulong)
        self._places = [
            (ctypes.byref(outputs, n * _MAX_SIGNATURE), ctypes.byref(self._lengths, n * item))
            for n in range(MAX_BATCH)
        ]

    def memory(self, slot: int) -> Memory:
        """Return how much room the token of a slot says that it has.

        Raises:
            CkrError: it cannot be asked.
        """
        info = _TokenInfo()
        code = self._token_info(ctypes.c_ulong(slot), ctypes.byref(info))
        if code != 0:
            raise CkrError(code)
        return Memory.of(
            public=(int(info.total_public_memory), int(info.free_public_memory)),
            private=(int(info.total_private_memory), int(info.free_private_memory)),
        )

    def session_state(self, session: int) -> int:
        """Return the CKS state of a session.

        Raises:
            CkrError: the token does not know it.
        """
        info = _SessionInfo()
        code = self._session_info(ctypes.c_ulong(session), ctypes.byref(info))
        if code != 0:
            raise CkrError(code)
        return int(info.state)

    def sign(
        self,
        session: int,
        mechanism: Mechanism,
        key: int,
        wanted: Sequence[bytes],
        made: list[bytes],
    ) -> None:
        """Have a key sign, one after the other.

        Args:
            session: session handle.
            mechanism: how to sign.
            key: object handle.
            wanted: what to sign, all of one length; of more than
                `spire_hw.pkcs11.wire.MAX_BATCH` only so many are signed.
            made: gets the outputs.

        Raises:
            ValueError: there is nothing to sign, or it differs in length.
            CkrError: the token refused one, those after it were not tried; an operation may have
                been left active in the session.
        """
        (size,) = {len(data) for data in wanted}
        sign_init, sign, how = self._sign_init, self._sign, mechanism.reference
        # What stays the same is made once, and outputs are collected afterwards: little else runs
        # between two calls, which leave little of it in the caches.
        in_session, with_key = ctypes.c_ulong(session), ctypes.c_ulong(key)
        data_length = ctypes.c_ulong(size)
        self._lengths[:] = _ROOM
        done, code = 0, 0
        for data, (output, length) in zip(wanted, self._places, strict=False):
            code = sign_init(in_session, how, with_key) or sign(
                in_session, data, data_length, output, length
            )
            if code != 0:
                break
            done += 1
        outputs, begins = self._outputs, range(0, len(self._outputs), _MAX_SIGNATURE)
        made += [
            outputs[begin : begin + min(length, _MAX_SIGNATURE)].tobytes()
            for begin, length in zip(begins, self._lengths[:done], strict=False)
        ]
        if code != 0:
            raise CkrError(code)


def _function(table: Any, index: int) -> Any:
    # CK_VERSION is two bytes, padded to the size of a pointer, in front of the function pointers.
    address = table[1 + index]
    if address is None:
        raise CkrError(_NOT_SUPPORTED)
    # Arguments come as ctypes values and bytes: converting numbers takes longer than the call.
    return ctypes.PYFUNCTYPE(ctypes.c_ulong)(address)
