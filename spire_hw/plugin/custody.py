"""In whose custody a private key is, and what the device itself says about that.

Named for what stands behind it. A device's signed statement is passed on as it is:
who wants to believe it checks it (`spire_hw.evidence`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable


class Custody(Enum):
    """Who says that a key is where it should be; the words are in the CLI, metrics and documents."""

    HSM_ATTESTED = "hsm attested"  # the HSM, in a statement signed by its maker's key
    HSM_REPORTED = "hsm reported"  # the HSM, in attributes that this process read back
    TPM_CERTIFIED = "tpm certified"  # the TPM, in a statement its attestation key signs when asked
    SOFTWARE = "software"  # nobody: the key is in the memory of a process
    SIGNER_STATED = "signer stated"  # a signer on another host, of what its device reports
    UNKNOWN = "unknown"  # the KeyManager does not say


@dataclass(frozen=True, slots=True)
class DeviceStatement:
    """What a device signed about a key.

    Attributes:
        kind: how it is to be read, such as `tpm2-certify-creation`.
        parts: its structures by name, as the device gave them.
    """

    kind: str
    parts: dict[str, bytes]


@runtime_checkable
class KeyStatementSource(Protocol):
    """Optional: a KeyManager whose device signs statements about its keys."""

    async def key_statement(self, key_id: str, challenge: bytes) -> DeviceStatement:
        """Have the device vouch for a key.

        Args:
            key_id: which key.
            challenge: 32 bytes that the statement has to hold.

        Raises:
            NotFoundError: no such key.
            DeviceError: the device refused.
        """
        ...


@runtime_checkable
class KeyAttestor(Protocol):
    """Optional: a KeyManager that has evidence made on the host where its keys are."""

    async def attest_key(self, key_id: str, nonce: bytes) -> str:
        """Return evidence about a key (`spire_hw.evidence.document`), signed there.

        Args:
            key_id: which key.
            nonce: the requester's, 8 to 64 bytes.

        Raises:
            NotFoundError: no such key.
            SpireHwError: INTERNAL when what was returned is not about this key and nonce.
        """
        ...
