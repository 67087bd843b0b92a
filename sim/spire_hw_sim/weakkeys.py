"""RSA keys as faulty generators made them, for what has to refuse them."""

from __future__ import annotations

import functools
import math
import secrets
from typing import Final

from spire_hw.roca import primes

_GENERATOR: Final = 65537
# M of 2048-bit and larger keys is the product of the first 126 primes; smaller ones divide it.
_M: Final = math.prod(primes(702))
_ROUNDS: Final = 8


@functools.cache
def roca_modulus(bits: int = 2048) -> int:
    """Return a modulus of two primes `k * M + (65537 ** a mod M)` (CVE-2017-15361).

    Args:
        bits: its size; at least 2048.
    """
    while True:
        modulus = _prime(bits // 2) * _prime(bits // 2)
        if modulus.bit_length() == bits:
            return modulus


def _prime(bits: int) -> int:
    """Return a prime with the two highest bits set."""
    first, last = (3 << (bits - 2)) // _M + 1, (1 << bits) // _M - 1
    while True:
        multiple = first + secrets.randbelow(last - first)
        candidate = multiple * _M + pow(_GENERATOR, secrets.randbits(64), _M)
        if _is_prime(candidate):
            return candidate


def _is_prime(n: int) -> bool:
    """Tell by Miller and Rabin's test, after a single cheap round."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_is_witnessed(n, odd, twos, secrets.randbelow(n - 3) + 2) for _ in range(_ROUNDS))


def _is_witnessed(n: int, odd: int, twos: int, base: int) -> bool:
    x = pow(base, odd, n)
    if x in {1, n - 1}:
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False
