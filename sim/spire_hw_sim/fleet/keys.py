"""A fleet's keys: all of them derived from one stored seed, so the same directory is the same fleet."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.tpm import wire
from spire_hw_sim.ekca import CrlSpec, EkCa, ek_spec
from spire_hw_sim.softtpm import (
    AK_ATTRIBUTES,
    OWNER,
    SVID_KEY_ATTRIBUTES,
    SoftKey,
    SoftTpm,
    default_scheme,
    encode_public,
    template,
)
from spire_hw_sim.tpmnode import TpmNode

if TYPE_CHECKING:
    from pathlib import Path

ROOTS: Final = "tpm-makers.der"
_SEED: Final = "fleet.seed"
_SEED_BYTES: Final = 32
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_EK_TEMPLATE: Final = "L-2"


class FleetKeys:
    """The vendor and the machines of one fleet.

    Args:
        directory: holds the seed, and the vendor's root certificate for the server's
            `endorsement_ca_path`; both are made when they are missing.

    Attributes:
        roots: path of the root certificate, DER.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        seed = directory / _SEED
        if not seed.exists():
            fd = os.open(seed, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as stream:
                stream.write(secrets.token_bytes(_SEED_BYTES))
        self._seed = seed.read_bytes()
        root = EkCa.root("Fleet TPM Vendor Root", self._key("root"))
        self._vendor = root.child("Fleet TPM Vendor EK CA", self._key("vendor"))
        self.roots = directory / ROOTS
        if not self.roots.exists():
            self.roots.write_bytes(root.certificate)
        # Machines of one make that booted the same.
        self.pcrs = SoftTpm().pcrs

    def _key(self, label: str) -> ec.EllipticCurvePrivateKey:
        digest = hmac.digest(self._seed, label.encode(), hashlib.sha512)
        number = int.from_bytes(digest, "big") % (_P256_ORDER - 1) + 1
        return ec.derive_private_key(number, ec.SECP256R1())

    def revocations(self, *serials: int) -> bytes:
        """Return the vendor's list of revoked endorsement certificates, DER."""
        return self._vendor.issue_crl(CrlSpec(list(serials)))

    def node(self, number: int) -> TpmNode:
        """Return a machine: endorsement key with certificate, attestation key, key for its SVID."""
        t = template(_EK_TEMPLATE)
        ek = self._key(f"ek {number}")
        ek_public = encode_public(
            ek, t.attributes, name_alg=t.name_alg, policy=t.auth_policy, aes_bits=t.aes_bits
        )
        ak = self._key(f"ak {number}")
        ak_public = encode_public(ak, AK_ATTRIBUTES, scheme=default_scheme(ak, wire.ALG_SHA256))
        key = self._key(f"svid {number}")
        tpm = SoftTpm(SoftKey(ek, ek_public), SoftKey(ak, ak_public), self.pcrs)
        return TpmNode(
            tpm,
            SoftKey(key, encode_public(key, SVID_KEY_ATTRIBUTES), OWNER),
            self._vendor.issue(ek_spec(ek.public_key())),
            (self._vendor.certificate,),
        )
