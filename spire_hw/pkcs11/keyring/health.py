"""How well the keys of one token can be used; nothing is asked of the token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.pkcs11.errors import TokenError
    from spire_hw.pkcs11.keyring.claim import Claim
    from spire_hw.pkcs11.pool.pool import Pool


def health_of(pool: Pool, claim: Claim, keys: int, unusable: Sequence[TokenError]) -> DeviceHealth:
    """Judge a token by what was seen of it last.

    Args:
        pool: its workers.
        claim: knows whether it takes writing, and whether another instance uses the keys.
        keys: how many keys are in use.
        unusable: what is wrong with those of them that do not sign.

    Returns:
        DOWN only when nothing can be signed.
    """
    if pool.broken is not None:
        return _health(KeyHealth.DOWN, pool.broken)
    if unusable:
        health = KeyHealth.DEGRADED if len(unusable) < keys else KeyHealth.DOWN
        return _health(health, unusable[0])
    for trouble in (claim.conflict, claim.refusal, pool.admin_problem):
        if trouble is not None:
            return _health(KeyHealth.DEGRADED, trouble)
    return DeviceHealth(KeyHealth.GOOD)


def _health(health: KeyHealth, error: TokenError) -> DeviceHealth:
    return DeviceHealth(health, error.reason, error.message)
