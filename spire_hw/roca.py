"""Does an RSA modulus bear the mark of the faulty key generator of CVE-2017-15361 (ROCA)?

Its primes have the form `k * M + (65537 ** a mod M)` with M the product of the first primes, so a
modulus lies in the subgroup that 65537 generates modulo every one of them. A sound modulus does so
by chance in about one of 2 ** 28 cases; that many are refused without need.

Source: Nemec et al., "The Return of Coppersmith's Attack", section 2.
"""

from __future__ import annotations

import math
from typing import Final

_GENERATOR: Final = 65537
_PRIME_LIMIT: Final = 168  # the first 39 primes, which divide M of every key size


def is_marked(modulus: int) -> bool:
    """Tell whether a modulus is likely from the faulty generator; about 1 µs for a sound one."""
    return all(modulus % prime in residues for prime, residues in _MARKS)


def primes(limit: int) -> list[int]:
    """Return the primes below a limit."""
    sieve = [True] * limit
    for n in range(2, math.isqrt(limit) + 1):
        if sieve[n]:
            sieve[n * n :: n] = [False] * len(sieve[n * n :: n])
    return [n for n in range(2, limit) if sieve[n]]


def _subgroup(prime: int) -> frozenset[int]:
    found, power = set(), 1
    while power not in found:
        found.add(power)
        power = power * _GENERATOR % prime
    return frozenset(found)


# Primes whose subgroup is the whole group tell nothing; the smallest subgroups tell most and come
# first.
_MARKS: Final = sorted(
    ((p, _subgroup(p)) for p in primes(_PRIME_LIMIT) if p > 2 and len(_subgroup(p)) < p - 1),  # noqa: PLR2004
    key=lambda entry: len(entry[1]) / entry[0],
)
