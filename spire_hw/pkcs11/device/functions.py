"""Functions of a PKCS#11 module called without python-pkcs11: those it lacks or is slow at.

Runs in the worker only, on a module that python-pkcs11 has loaded and initialised. A call holds the
interpreter's lock: a worker has one thread.

Spec: PKCS #11 v2.40, sections 5.4 (CK_FUNCTION_LIST) and 5.13 (signing).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

# Places in CK_FUNCTION_LIST.
_GET_SESSION_INFO: Final = 15
_SIGN_INIT: Final = 42
_SIGN: Final = 43
_NOT_SUPPORTED: Final = 0x54  # CKR_FUNCTION_NOT_SUPPORTED
_MAX_DATA: Final = 512
_MAX_SIGNATURE: Final = 1024  # bytes; RSA-4096 makes 512


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
        address: where.
    """

    def __init__(self, number: int, pss: tuple[int, int, int] | None) -> None:
        self._parameters = None if pss is None else _PssParameters(*pss)
        place = None if self._parameters is None else ctypes.addressof(self._parameters)
        length = 0 if self._parameters is None else ctypes.sizeof(self._parameters)
        self._mechanism = _Mechanism(number, place, length)
        self.address = ctypes.addressof(self._mechanism)


class Functions:
    """The functions of one module."""

    def __init__(self, module: str) -> None:
        table = ctypes.POINTER(ctypes.c_void_p)()
        code = ctypes.CDLL(module).C_GetFunctionList(ctypes.byref(table))
        if code != 0:
            raise CkrError(code)
        self._session_info = _function(table, _GET_SESSION_INFO, 2)
        self._sign_init = _function(table, _SIGN_INIT, 3)
        self._sign = _function(table, _SIGN, 5)
        # Made once: what a token signs and what it makes of that lies here, one after the other.
        data, output = (ctypes.c_ubyte * _MAX_DATA)(), (ctypes.c_ubyte * _MAX_SIGNATURE)()
        self._length = ctypes.c_ulong()
        self._data, self._output = memoryview(data).cast("B"), memoryview(output).cast("B")
        places = (ctypes.addressof(one) for one in (data, output, self._length))
        self._data_at, self._output_at, self._length_at = places

    def session_state(self, session: int) -> int:
        """Return the CKS state of a session.

        Raises:
            CkrError: the token does not know it.
        """
        info = _SessionInfo()
        code = self._session_info(session, ctypes.addressof(info))
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
            wanted: what to sign, at most 512 bytes each.
            made: gets the outputs.

        Raises:
            CkrError: the token refused one, those after it were not tried; an operation may have
                been left active in the session.
        """
        sign_init, sign, length = self._sign_init, self._sign, self._length
        data_at, output_at, length_at = self._data_at, self._output_at, self._length_at
        place, output, address = self._data, self._output, mechanism.address
        for data in wanted:
            size = len(data)
            place[:size] = data
            code = sign_init(session, address, key)
            if code == 0:
                length.value = _MAX_SIGNATURE
                code = sign(session, data_at, size, output_at, length_at)
            if code != 0:
                raise CkrError(code)
            made.append(output[: length.value].tobytes())


def _function(table: Any, index: int, arguments: int) -> Any:
    # CK_VERSION is two bytes, padded to the size of a pointer, in front of the function pointers.
    address = table[1 + index]
    if address is None:
        raise CkrError(_NOT_SUPPORTED)
    return ctypes.PYFUNCTYPE(ctypes.c_ulong, *([ctypes.c_size_t] * arguments))(address)
