"""A small plugin of every kind: `kinds.py KIND DIRECTORY`; what it is told goes into DIRECTORY.

Run by the tests as an external plugin of the real server and agent.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw.bundle.bundle import X509Root
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.goplugin.guest import serve
from spire_hw.plugin.credentialcomposer import CredentialComposer
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.nodeattestor import AttestedIdentity
from spire_hw.plugin.upstreamauthority import UpstreamX509Ca
from spire_hw.spiffeid import agent_id
from spire_hw.x509.extension import Extension

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.plugin.info import HostInfo

KIND = PluginKind(sys.argv[1])
DIRECTORY = Path(sys.argv[2])


def tell(**event: Any) -> None:
    with (DIRECTORY / f"{KIND.value}.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


class Base:
    def __init__(self, host: HostInfo) -> None:
        self.host = host
        self.config: Body | None = None

    def validate(self, config: Body) -> list[ConfigFault]:
        return []

    async def configure(self, config: Body) -> None:
        if config.get("bad"):
            raise InvalidInputError("bad is set")
        self.config = config
        tell(event="configure", config=config.to_hcl())

    async def close(self) -> None:
        tell(event="close")

    def refuse_when_asked(self) -> None:
        if (DIRECTORY / "refuse").exists():
            raise UnavailableError("refused as asked")


class Hello(Base):
    async def aid_attestation(self, exchange: Any, svid_key: Any) -> None:
        await exchange.send(b"node-1")
        await exchange.send(b"answer to " + await exchange.receive())

    async def attest(self, request: Any) -> AttestedIdentity:
        assert await request.challenge(b"who?") == b"answer to who?"
        name = request.payload.decode()
        identity = agent_id(self.host.trust_domain, "hello", name)
        tell(event="attest", agent=str(identity))
        return AttestedIdentity(identity, [f"name:{name}"], True)


class Workloads(Base):
    async def attest(self, process: Any) -> list[str]:
        return [f"uid:{process.uid}"]


class Upstream(Base):
    """Signs with `root.pem`; a change of the file `next` makes a new root."""

    def root(self, name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key_file, file = DIRECTORY / f"{name}.key", DIRECTORY / f"{name}.pem"
        if not file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name.from_rfc4514_string(f"CN={name},O=upstream")
            now = datetime.now(UTC)  # noqa: TID251 - a program of its own
            usage = x509.KeyUsage(*(False,) * 5, True, True, False, False)
            made = (
                x509.CertificateBuilder()
                .subject_name(subject)
                .issuer_name(subject)
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - timedelta(hours=1))
                .not_valid_after(now + timedelta(days=3650))
                .add_extension(x509.BasicConstraints(True, None), True)
                .add_extension(usage, True)
                .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
                .sign(key, hashes.SHA256())
            )
            key_file.write_bytes(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
            file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        return x509.load_pem_x509_certificate(file.read_bytes()), key

    async def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        self.refuse_when_asked()
        using = "second" if (DIRECTORY / "second").exists() else "first"
        root, key = self.root(using)
        request = x509.load_der_x509_csr(csr)
        assert request.is_signature_valid
        now = datetime.now(UTC)  # noqa: TID251
        usage = x509.KeyUsage(*(False,) * 5, True, True, False, False)
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        subject_key = x509.SubjectKeyIdentifier.from_public_key(request.public_key())
        if (DIRECTORY / "wrong_key").exists():
            public_key = ec.generate_private_key(ec.SECP256R1()).public_key()
        else:
            public_key = request.public_key()
        made = (
            x509.CertificateBuilder()
            .subject_name(request.subject)
            .issuer_name(root.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + (preferred_ttl or timedelta(hours=1)))
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(usage, True)
            .add_extension(names.value, False)
            .add_extension(subject_key, False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False
            )
            .sign(key, hashes.SHA256())
        )
        tell(event="mint", root=using)
        der = serialization.Encoding.DER
        roots = [X509Root(root.public_bytes(der))]
        yield UpstreamX509Ca((made.public_bytes(der),), tuple(roots))
        while not (DIRECTORY / "second").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        second, _ = self.root("second")
        tainted = X509Root(roots[0].der, tainted=using == "first")
        yield UpstreamX509Ca((), (tainted, X509Root(second.public_bytes(der))))
        await asyncio.Event().wait()


class Told(Base):
    async def notify_bundle_updated(self, bundle: Any) -> None:
        tell(event="updated", roots=[r.authority_id for r in bundle.x509_authorities])
        self.refuse_when_asked()

    async def notify_and_advise_bundle_loaded(self, bundle: Any) -> None:
        tell(event="loaded", roots=[r.authority_id for r in bundle.x509_authorities])
        self.refuse_when_asked()

    async def publish_bundle(self, bundle: Any) -> None:
        tell(event="published", roots=[r.authority_id for r in bundle.x509_authorities])
        self.refuse_when_asked()


class Composer(Base, CredentialComposer):
    async def compose_server_x509_ca(self, attributes: Any) -> Any:
        subject = replace(attributes.subject, organizational_unit=("composed CA",))
        return replace(attributes, subject=subject)

    async def compose_agent_x509_svid(
        self, spiffe_id: Any, public_key: Any, attributes: Any
    ) -> Any:
        tell(event="agent", id=str(spiffe_id))
        return replace(
            attributes, subject=replace(attributes.subject, organizational_unit=("composed",))
        )

    async def compose_workload_x509_svid(
        self, spiffe_id: Any, public_key: Any, attributes: Any
    ) -> Any:
        if (DIRECTORY / "takes_over").exists():
            extension = Extension("2.5.29.17", b"\x30\x00", False)
            return replace(attributes, extra_extensions=(extension,))
        extension = Extension("1.3.6.1.4.1.99999.1", b"\x05\x00", False)
        return replace(
            attributes,
            subject=replace(attributes.subject, common_name="composed", serial_number="7"),
            dns_names=("composed.example",),
            extra_extensions=(extension,),
        )

    async def compose_workload_jwt_svid(self, spiffe_id: Any, attributes: Any) -> Any:
        claims = {**attributes.claims, "colour": "blue", "level": 3}
        if (DIRECTORY / "takes_over").exists():
            claims["sub"] = "spiffe://sim.example/somebody/else"
        return replace(attributes, claims=claims)


class Store(Base):
    async def put_x509_svid(self, svid: Any, metadata: Any) -> None:
        tell(event="put", id=str(svid.spiffe_id), metadata=list(metadata), chain=len(svid.chain))
        self.refuse_when_asked()

    async def delete_x509_svid(self, metadata: Any) -> None:
        tell(event="delete", metadata=list(metadata))
        self.refuse_when_asked()


CLASSES: dict[PluginKind, Any] = {
    PluginKind.NODE_ATTESTOR: Hello,
    PluginKind.WORKLOAD_ATTESTOR: Workloads,
    PluginKind.UPSTREAM_AUTHORITY: Upstream,
    PluginKind.NOTIFIER: Told,
    PluginKind.BUNDLE_PUBLISHER: Told,
    PluginKind.CREDENTIAL_COMPOSER: Composer,
    PluginKind.SVID_STORE: Store,
}

if __name__ == "__main__":
    sys.exit(serve(KIND, CLASSES[KIND], data_dir=DIRECTORY))
