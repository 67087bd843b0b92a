"""Reason codes: why a node was refused or loses its identity, and what each does unless told otherwise.

The words are stable: they are in logs, audit records, metrics, the CLI, and in `drift { }` of
policies and of the server's configuration.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from spire_hw.posture.verdict import Action

if TYPE_CHECKING:
    from collections.abc import Mapping

# What an authority said of a certificate after the node was let in with it.
EK_REVOKED: Final = "ek_revoked"
DEVID_REVOKED: Final = "devid_revoked"
REVOKED: Final = frozenset({EK_REVOKED, DEVID_REVOKED})
_REVOCATION: Final = dict.fromkeys(sorted(REVOKED), Action.QUARANTINE)

# What evidence shows; found by evaluating a policy.
_POLICY: Final = {
    "no_policy": Action.REFUSE,
    "activation_only": Action.REFUSE,
    "ek_root": Action.REFUSE,
    "ek_manufacturer": Action.REFUSE,
    "ek_model": Action.REFUSE,
    "key_not_in_tpm": Action.REFUSE,
    "counters_hidden": Action.REFUSE,
    "tpm_firmware": Action.QUARANTINE,
    "pcr_missing": Action.REFUSE,
    "pcr_mismatch": Action.QUARANTINE,
    "log_missing": Action.REFUSE,
    "log_bank": Action.REFUSE,
    "log_workaround": Action.REFUSE,
    "firmware_error": Action.QUARANTINE,
    "firmware_version": Action.QUARANTINE,
    "secureboot": Action.QUARANTINE,
    "debug_mode": Action.QUARANTINE,
    "dma_protection": Action.QUARANTINE,
    "secureboot_keys": Action.QUARANTINE,
    "secureboot_authority": Action.QUARANTINE,
    "dbx_old": Action.REFUSE,
    "boot_image": Action.QUARANTINE,
    "boot_image_revoked": Action.QUARANTINE,
    "boot_command": Action.QUARANTINE,
    "boot_file": Action.QUARANTINE,
    "uki": Action.QUARANTINE,
    "mok": Action.QUARANTINE,
    "ima_missing": Action.REFUSE,
    "ima_unknown_file": Action.QUARANTINE,
    "ima_violation": Action.REFUSE,
    "ima_padded_sha1": Action.REFUSE,
}

# How evidence differs from what the node showed before.
_DRIFT: Final = {
    "ak_changed": Action.REFUSE,
    "bank_unused": Action.QUARANTINE,
    "clock_rollback": Action.REFUSE,
    "cloned_tpm": Action.QUARANTINE,
    "counter_rollback": Action.REFUSE,
    "downgrade": Action.REFUSE,
    "duplicate_id": Action.REFUSE,
    "ima_rollback": Action.BAN,
    "pcr_changed_without_reset": Action.BAN,
    "pcr_lost": Action.QUARANTINE,
    "tpm_replaced": Action.BAN,
    "tpm_reset_without_reboot": Action.QUARANTINE,
}

DEFAULT_ACTIONS: Final[Mapping[str, Action]] = MappingProxyType(
    {**_POLICY, **_DRIFT, **_REVOCATION}
)

# What nothing can make up for: evidence is not there, was tampered with, or its
# authority took back what it had said.
NEVER_ACCEPTED: Final = frozenset(
    {
        "activation_only",
        "bank_unused",
        *REVOKED,
        "ima_missing",
        "ima_rollback",
        "log_missing",
        "no_policy",
        "pcr_missing",
    }
)


def action_of(code: str, overrides: Mapping[str, Action]) -> Action:
    """Return what a reason does; codes without a row refuse the exchange."""
    action = overrides.get(code) or DEFAULT_ACTIONS.get(code, Action.REFUSE)
    if action is Action.ACCEPT and code in NEVER_ACCEPTED:
        return Action.REFUSE
    return action
