"""Signatures of one P-256 key, verified three times as fast as OpenSSL does in its ordinary way.

A verification multiplies two points, and OpenSSL has a table of multiples for one of them, the
curve's own generator. It makes such a table for any generator, so the key's point is made the
generator of a second group. That costs as much as some five hundred verifications: it is for keys
that sign much. It takes a Python whose `ssl` uses a shared OpenSSL 3 (Debian's and Ubuntu's do).

Nothing secret is handled here, so nothing has to take the same time whatever the values are.

Source: FIPS 186-5 section 6.4.2; OpenSSL 3.0 EC_GROUP_new(3), EC_POINT_add(3).
"""

from __future__ import annotations

import ctypes as c
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.errors import NotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cryptography.hazmat.primitives.asymmetric import ec

_NID: Final = 415  # NID_X9_62_prime256v1
_PRIME: Final = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_BYTES: Final = 32
_P = c.c_void_p
# These work long enough to let the other threads of the interpreter run.
_LONG: Final[dict[str, tuple[Any, ...]]] = {
    "EC_GROUP_precompute_mult": (c.c_int, _P, _P),
    "EC_POINT_mul": (c.c_int, _P, _P, _P, _P, _P, _P),
}
_SHORT: Final[dict[str, tuple[Any, ...]]] = {
    "BN_CTX_new": (_P,),
    "BN_CTX_free": (None, _P),
    "BN_new": (_P,),
    "BN_free": (None, _P),
    "BN_bin2bn": (_P, c.c_char_p, c.c_int, _P),
    "BN_bn2binpad": (c.c_int, _P, _P, c.c_int),
    "EC_GROUP_new_by_curve_name": (_P, c.c_int),
    "EC_GROUP_free": (None, _P),
    "EC_GROUP_get0_order": (_P, _P),
    "EC_GROUP_get0_cofactor": (_P, _P),
    "EC_GROUP_set_generator": (c.c_int, _P, _P, _P, _P),
    "EC_GROUP_have_precompute_mult": (c.c_int, _P),
    "EC_POINT_new": (_P, _P),
    "EC_POINT_free": (None, _P),
    "EC_POINT_oct2point": (c.c_int, _P, _P, c.c_char_p, c.c_size_t, _P),
    "EC_POINT_add": (c.c_int, _P, _P, _P, _P, _P),
    "EC_POINT_get_Jprojective_coordinates_GFp": (c.c_int, _P, _P, _P, _P, _P, _P),
    "ERR_clear_error": (None,),
}


class _OpenSsl:
    """The functions of the OpenSSL that Python's `ssl` itself uses."""

    def __init__(self) -> None:
        try:
            import _ssl  # noqa: PLC0415 - only to learn where it was loaded from

            for open_library, prototypes in ((c.CDLL, _LONG), (c.PyDLL, _SHORT)):
                library = open_library(_ssl.__file__)
                for name, (result, *arguments) in prototypes.items():
                    function = getattr(library, name)
                    function.restype, function.argtypes = result, arguments
                    setattr(self, name, function)
        except (ImportError, OSError, AttributeError) as e:
            raise NotReadyError("Python's ssl module uses no shared OpenSSL with tables") from e

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


@lru_cache(maxsize=1)
def _openssl() -> _OpenSsl:
    return _OpenSsl()


class P256Verifier:
    """One public key with its table (150 KiB); one thread at a time may use it."""

    def __init__(self, public_key: ec.EllipticCurvePublicKey) -> None:
        """Make the table; takes some 40 ms of CPU time.

        Raises:
            NotReadyError: the OpenSSL at hand cannot.
        """
        self._ssl = ssl = _openssl()
        self._context = self._own(ssl.BN_CTX_new(), ssl.BN_CTX_free)
        self._group = self._own(ssl.EC_GROUP_new_by_curve_name(_NID), ssl.EC_GROUP_free)
        self._key_group = self._own(ssl.EC_GROUP_new_by_curve_name(_NID), ssl.EC_GROUP_free)
        self._scalar = self._own(ssl.BN_new(), ssl.BN_free)
        self._x = self._own(ssl.BN_new(), ssl.BN_free)
        self._z = self._own(ssl.BN_new(), ssl.BN_free)
        self._sum = self._own(ssl.EC_POINT_new(self._group), ssl.EC_POINT_free)
        self._term = self._own(ssl.EC_POINT_new(self._group), ssl.EC_POINT_free)
        self._out = c.create_string_buffer(_BYTES)
        point = public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        order, cofactor = (
            of(self._group) for of in (ssl.EC_GROUP_get0_order, ssl.EC_GROUP_get0_cofactor)
        )
        done = (
            ssl.EC_POINT_oct2point(self._group, self._term, point, len(point), self._context) == 1
            and ssl.EC_GROUP_set_generator(self._key_group, self._term, order, cofactor) == 1
            and ssl.EC_GROUP_precompute_mult(self._key_group, self._context) == 1
            and ssl.EC_GROUP_have_precompute_mult(self._key_group) == 1
        )
        if not done:
            ssl.ERR_clear_error()
            raise NotReadyError("OpenSSL makes no table for this key")

    def _own(self, address: int | None, free: Callable[[int], None]) -> int:
        if not address:
            raise NotReadyError("OpenSSL has no memory")
        weakref.finalize(self, free, address)
        return address

    def holds(self, digests: Sequence[bytes], raws: Sequence[bytes]) -> list[bool]:
        """Tell which signatures hold.

        Args:
            digests: at least 32 bytes each, of which the leftmost 32 count.
            raws: the signature over the digest of the same place: r and s, 32 bytes each,
                big-endian; anything else does not hold.
        """
        pairs = [_pair(raw) for raw in raws]
        inverses = _inverses([s for _, s in pairs])
        return [
            r != 0 and self._holds(int.from_bytes(digest[:_BYTES]), r, inverse)
            for digest, (r, _), inverse in zip(digests, pairs, inverses, strict=True)
        ]

    def _holds(self, e: int, r: int, inverse: int) -> bool:
        ssl, context, total = self._ssl, self._context, self._sum
        done = (
            self._multiply(total, self._group, e * inverse % _ORDER)
            and self._multiply(self._term, self._key_group, r * inverse % _ORDER)
            and ssl.EC_POINT_add(self._group, total, total, self._term, context)
            and ssl.EC_POINT_get_Jprojective_coordinates_GFp(
                self._group, total, self._x, None, self._z, context
            )
        )
        if not done:
            ssl.ERR_clear_error()
            return False
        # The point's first coordinate is x / z^2; r is its remainder by the order, which is the
        # smaller number. At the point at infinity z is 0.
        x, z = self._value(self._x), self._value(self._z)
        square = z * z % _PRIME
        return z != 0 and (
            r * square % _PRIME == x
            or (r < _PRIME - _ORDER and (r + _ORDER) * square % _PRIME == x)
        )

    def _multiply(self, result: int, group: int, scalar: int) -> int:
        ssl = self._ssl
        number = ssl.BN_bin2bn(scalar.to_bytes(_BYTES), _BYTES, self._scalar)
        done: int = ssl.EC_POINT_mul(group, result, number, None, None, self._context)
        return done

    def _value(self, number: int) -> int:
        self._ssl.BN_bn2binpad(number, self._out, _BYTES)
        return int.from_bytes(self._out.raw)


def _pair(raw: bytes) -> tuple[int, int]:
    """Return r and s, or 0 and 1 when they are out of range."""
    if len(raw) == 2 * _BYTES:
        r, s = int.from_bytes(raw[:_BYTES]), int.from_bytes(raw[_BYTES:])
        if 0 < r < _ORDER and 0 < s < _ORDER:
            return r, s
    return 0, 1


def _inverses(numbers: Sequence[int]) -> list[int]:
    """Return the inverses modulo the order, with a single inversion for all.

    Source: Montgomery's trick, e.g. Cohen, A Course in Computational Algebraic Number Theory,
    algorithm 10.3.4.
    """
    products = [1]
    for number in numbers:
        products.append(products[-1] * number % _ORDER)
    inverse = pow(products[-1], -1, _ORDER)
    inverses = []
    for number, product in zip(reversed(numbers), reversed(products[:-1]), strict=True):
        inverses.append(inverse * product % _ORDER)
        inverse = inverse * number % _ORDER
    inverses.reverse()
    return inverses
