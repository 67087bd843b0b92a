"""A CA whose key lies in a SoftHSM token, made there with OpenSC's tool as an operator would.

Certificates and their chain are written to PEM files beside the token.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from spire_hw.clock import SystemClock
from spire_hw.key import spki_der
from spire_hw.log import get_logger
from spire_hw.pkcs11.existing import ExistingKey, open_existing
from spire_hw.pkcs11.pool.place import Pins, place_of_uri
from spire_hw.x509.authority import ParentCa
from spire_hw.x509.certificate import encode_pem
from spire_hw.x509.issue import issue_ca_certificate
from spire_hw.x509.name import Subject
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from pathlib import Path

PIN: Final = "root-9876"
_KINDS: Final = {"ec-p256": "EC:prime256v1", "ec-p384": "EC:secp384r1", "rsa-2048": "rsa:2048"}


class HsmCa:
    """One token with one CA key on it.

    Attributes:
        hsm: the store.
        label: of token and key.
        pin_file: holds the PIN.
        certificate: DER, once `self_sign` or `sign_under` was called.
    """

    def __init__(self, folder: Path, label: str = "root", key: str = "ec-p384") -> None:
        self.folder = folder
        self.label = label
        folder.mkdir(exist_ok=True)
        self.hsm = SoftHsm(folder / "hsm")
        self.hsm.init_token(label, pin=PIN)
        self.pin_file = folder / "pin"
        self.pin_file.touch(mode=0o600)
        self.pin_file.write_text(PIN + "\n")
        self.certificate = b""
        self._tool("--keypairgen", "--key-type", _KINDS[key], "--label", label, "--id", "01")

    @property
    def uri(self) -> str:
        """Return an RFC 7512 URI of the key; SOFTHSM2_CONF has to be in the environment."""
        query = f"module-path={self.hsm.module}&pin-source=file:{self.pin_file}"
        return f"pkcs11:token={self.label};object={self.label}?{query}"

    @property
    def cert_file(self) -> Path:
        """Return where the certificate is, with the intermediates above it."""
        return self.folder / "cert.pem"

    @property
    def bundle_file(self) -> Path:
        """Return where the root is."""
        return self.folder / "root.pem"

    async def self_sign(self, life: timedelta = timedelta(days=365)) -> None:
        """Make the key a root."""
        key = await self.open()
        try:
            now = SystemClock().now()
            self.certificate = await issue_ca_certificate(
                None,
                trust_domain=None,
                not_before=now - timedelta(hours=1),
                not_after=now + life,
                signer=key,
                subject_der=Subject(organization=("Sim",), common_name=self.label).encode(),
            )
        finally:
            await key.close()
        self.cert_file.write_bytes(encode_pem([self.certificate]))
        self.bundle_file.write_bytes(encode_pem([self.certificate]))

    async def sign_under(self, parent: HsmCa, path_length: int | None = None) -> None:
        """Make the key an intermediate below another CA."""
        own = await self.open()
        await own.close()
        key = await parent.open()
        try:
            now = SystemClock().now()
            self.certificate = await issue_ca_certificate(
                ParentCa(parent.certificate, key),
                trust_domain=None,
                not_before=now - timedelta(hours=1),
                not_after=now + timedelta(days=90),
                spki=spki_der(own.public_key),
                subject_der=Subject(organization=("Sim",), common_name=self.label).encode(),
                path_length=path_length,
            )
        finally:
            await key.close()
        self.cert_file.write_bytes(encode_pem([self.certificate]))
        self.bundle_file.write_bytes(parent.bundle_file.read_bytes())

    async def open(self) -> ExistingKey:
        """Open the token; the caller closes it."""
        there = replace(place_of_uri(self.uri), environment=self.hsm.environment)
        return await open_existing(there, Pins().guard(there), get_logger("sim"))

    def plugin(self, **changes: str) -> str:
        """Return the block of an UpstreamAuthority over this CA; "" takes a setting out."""
        values = {
            "module_path": self.hsm.module,
            "token_label": self.label,
            "pin_file": str(self.pin_file),
            "key_label": self.label,
            "cert_file_path": str(self.cert_file),
            "bundle_file_path": str(self.bundle_file),
            "start_timeout": "2s",
            **changes,
        }
        lines = "\n".join(f'{name} = "{value}"' for name, value in values.items() if value)
        conf = self.hsm.environment["SOFTHSM2_CONF"]
        environment = f'environment {{ SOFTHSM2_CONF = "{conf}" }}'
        return f'UpstreamAuthority "pkcs11" {{ plugin_data {{\n{lines}\n{environment}\n}} }}\n'

    def _tool(self, *arguments: str) -> None:
        command = ["pkcs11-tool", "--module", self.hsm.module, "--token-label", self.label]
        subprocess.run(
            [*command, "--login", "--pin", PIN, *arguments],
            env={**os.environ, **self.hsm.environment},
            check=True,
            capture_output=True,
        )
