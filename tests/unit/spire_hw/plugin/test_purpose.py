"""A key manager that judges what it signs gets the whole; every other the digest alone."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from spire_hw.errors import DeniedError, ErrorKind, PluginError
from spire_hw.jose import jws
from spire_hw.key import KeyType, SignOptions
from spire_hw.plugin.keymanager import Keys, KeySignature
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.csr import build_csr, parse_csr
from spire_hw.x509.issue import issue_ca_certificate
from spire_hw_plugins.keymanager.software import SoftwareKeys

DOMAIN = TrustDomain.parse("example.org")
START = datetime(2026, 1, 1, tzinfo=UTC)


class Judge(SoftwareKeys):
    """Keeps what it was shown; denies requests when told to."""

    def __init__(self) -> None:
        super().__init__(lambda _keys: None)
        self.load({})
        self.shown: list[tuple[str, bytes]] = []
        self.denies = False

    async def sign_x509(
        self, key_id: str, to_be_signed: bytes, options: SignOptions
    ) -> KeySignature:
        return await self._judged("x509", key_id, to_be_signed, options)

    async def sign_csr(
        self, key_id: str, to_be_signed: bytes, options: SignOptions
    ) -> KeySignature:
        return await self._judged("csr", key_id, to_be_signed, options)

    async def sign_jwt(
        self, key_id: str, signing_input: bytes, options: SignOptions
    ) -> KeySignature:
        return await self._judged("jwt", key_id, signing_input, options)

    async def _judged(
        self, purpose: str, key_id: str, content: bytes, options: SignOptions
    ) -> KeySignature:
        self.shown.append((purpose, content))
        if self.denies:
            raise DeniedError("not that [tbs_policy]")
        return await self.sign_data(key_id, options.hash.digest(content), options)


@pytest.mark.asyncio
async def test_a_judge_sees_certificates_requests_and_tokens_whole() -> None:
    judge = Judge()
    signer = await Keys(judge, "judge").generate("id", KeyType.EC_P256)
    end = START + timedelta(hours=1)
    made = await issue_ca_certificate(
        None, trust_domain=DOMAIN, not_before=START, not_after=end, signer=signer
    )
    request = await build_csr(signer)
    token = await jws.sign_compact(b"{}", signer, "kid")
    certificate = x509.load_der_x509_certificate(made)
    certificate.verify_directly_issued_by(certificate)
    parse_csr(request)
    parsed = jws.parse_compact(token)
    jws.verify(parsed, signer.public_key)
    body = x509.load_der_x509_csr(request).tbs_certrequest_bytes
    assert judge.shown == [
        ("x509", certificate.tbs_certificate_bytes),
        ("csr", body),
        ("jwt", parsed.signing_input),
    ]


@pytest.mark.asyncio
async def test_what_a_judge_denies_is_told_with_its_name() -> None:
    judge = Judge()
    signer = await Keys(judge, "judge").generate("id", KeyType.EC_P256)
    judge.denies = True
    with pytest.raises(PluginError) as caught:
        await build_csr(signer)
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED
    assert caught.value.message == "keymanager(judge): not that [tbs_policy]"


@pytest.mark.asyncio
async def test_every_other_key_manager_gets_the_digest() -> None:
    class Plain(SoftwareKeys):
        digests: list[bytes] = []  # noqa: RUF012 - of one test

        async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
            self.digests.append(digest)
            return await super().sign_data(key_id, digest, options)

    plain = Plain(lambda _keys: None)
    plain.load({})
    signer = await Keys(plain, "plain").generate("id", KeyType.EC_P256)
    token = await jws.sign_compact(b"{}", signer, "kid")
    assert plain.digests == [hashlib.sha256(jws.parse_compact(token).signing_input).digest()]
