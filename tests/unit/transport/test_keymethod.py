from __future__ import annotations

import gc
import ssl

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.errors import InvalidInputError
from spire_hw.key import spki_der
from spire_hw.transport import keymethod
from spire_hw.transport.tls import TlsIdentity, build_context
from spire_hw.x509.certificate import encode_pem
from spire_hw_sim.pki import Authority


def test_this_machine_can_do_it() -> None:
    keymethod.self_test()


def test_attachments_go_with_their_context() -> None:
    gc.collect()
    before = len(keymethod._load().attachments)
    authority = Authority("example.org")
    key = ec.generate_private_key(ec.SECP384R1())
    leaf = authority.leaf(key.public_key(), "spiffe://example.org/a")
    contexts = [ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) for _ in range(10)]
    for context in contexts:
        keymethod.attach(
            context, encode_pem([leaf]), spki_der(key.public_key()), lambda digest: digest
        )
    assert len(keymethod._load().attachments) == before + 10
    del context, contexts
    gc.collect()
    assert len(keymethod._load().attachments) == before


def test_rsa_keys_in_devices_are_refused_plainly() -> None:
    authority = Authority("example.org")
    key = rsa.generate_private_key(65537, 2048).public_key()
    leaf = authority.leaf(key, "spiffe://example.org/a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(InvalidInputError, match="needs an EC key"):
        keymethod.attach(context, encode_pem([leaf]), spki_der(key), lambda digest: digest)


def test_certificate_and_key_must_match() -> None:
    authority = Authority("example.org")
    key, other = (ec.generate_private_key(ec.SECP256R1()).public_key() for _ in range(2))
    leaf = authority.leaf(key, "spiffe://example.org/a")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.raises(InvalidInputError, match="do not match"):
        keymethod.attach(context, encode_pem([leaf]), spki_der(other), lambda digest: digest)
    with pytest.raises(InvalidInputError, match="does not parse"):
        keymethod.attach(
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), b"no", spki_der(key), lambda digest: digest
        )


def test_an_identity_has_one_key_and_a_certificate() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(InvalidInputError):
        TlsIdentity((b"x",))
    with pytest.raises(InvalidInputError):
        TlsIdentity((), key)


def test_contexts_do_not_resume_and_do_not_go_below_1_2() -> None:
    context = build_context(
        server_side=True, verify=ssl.CERT_OPTIONAL, roots=[Authority("a.org").der], identity=None
    ).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.num_tickets == 0
    assert context.options & ssl.OP_NO_TICKET
    assert context.options & ssl.OP_NO_RENEGOTIATION
