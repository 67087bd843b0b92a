"""What peers say that know credential activation alone: the Go plugins, old (A) and current (B).

Their first message is ours without the object `spire_hw`. A challenge holds the credential, the
answer the secret; nothing in them speaks of PCRs, logs or the SVID's key.
"""

from __future__ import annotations

from spire_hw.errors import InvalidInputError
from spire_hw_plugins.nodeattestor import strictjson
from spire_hw_plugins.nodeattestor.tpm.wire import (
    MAX_CHALLENGE_BYTES,
    MAX_PAYLOAD_BYTES,
    read_credential,
)


def encode_challenge(credential: bytes, secret: bytes) -> bytes:
    """Return a challenge; both arguments with their size prefix."""
    ec = {"Credential": credential, "Secret": secret}
    return strictjson.dump({"EC": ec})


def decode_challenge(data: bytes) -> tuple[bytes, bytes] | None:
    """Return credential and secret of such a challenge, None when it is one of dialect 2.

    Raises:
        LimitError: larger than 64 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    outer = strictjson.load(data, MAX_CHALLENGE_BYTES)
    if "spire_hw" in outer:
        return None
    if "EC" not in outer:
        raise InvalidInputError("challenge: credential is missing")
    return read_credential(outer)


def encode_response(secret: bytes) -> bytes:
    """Return the answer."""
    return strictjson.dump({"Secret": secret})


def decode_response(data: bytes) -> bytes:
    """Return the secret of an answer.

    Raises:
        LimitError: larger than 64 KiB.
        InvalidInputError: anything else that is wrong with it.
    """
    if not data:
        raise InvalidInputError("envelope: expected a challenge response")
    outer = strictjson.load(data, MAX_PAYLOAD_BYTES)
    if "Secret" not in outer:
        raise InvalidInputError("envelope: expected a challenge response")
    if "spire_hw" in outer:
        raise InvalidInputError("envelope: evidence that was not asked for")
    return outer.blob("Secret", empty=True)
