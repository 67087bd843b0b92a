from __future__ import annotations

import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.x509.oid import NameOID

from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.signature import load_keys
from spire_hw.posture.verdict import Action
from tests.unit.spire_hw.posture.listings import KEYS, LIST, Key, failed, listing, pem
from tests.unit.spire_hw.posture.samples import FILES, IMA, digest, good, measured, policy

if TYPE_CHECKING:
    from spire_hw.posture.evidence import ImaEntry


def test_listed_files_hold_whatever_their_names() -> None:
    assert failed(listing()) == []
    verdict = evaluate(listing(), good())
    assert verdict.checks[-1].message == "4 files listed, 0 signed, 0 excluded"


@pytest.mark.parametrize(
    ("entry", "about"),
    [
        (measured(b"/usr/bin/evil"), r'"/usr/bin/evil", sha256:'),
        (measured(b"/usr/bin/ls", "other"), "(its content is another one)"),
        (measured(FILES[0].path, repr(FILES[1].path)), "(its content is another one)"),
        (measured(b'/a\x1b[2Jb\n\xff"\\'), r'"/a\x1b[2Jb\x0a\xff\x22\x5c"'),
        (measured(b"/" + b"x" * 5000), '"...'),
        (FILES[0]._replace(algorithm="sha1"), "(a digest of this kind does not count)"),
        (FILES[0]._replace(algorithm="sm3-256"), "sm3-256:"),
        (measured(b"/var/../usr/bin/x"), "/var/../usr/bin/x"),
        (measured(b"/var/.."), "/var/.."),
    ],
)
def test_any_other_file_is_named_escaped(entry: ImaEntry, about: str) -> None:
    ((code, message),) = failed(listing('exclude = ["/var/"]'), entry)
    assert code == "ima_unknown_file"
    assert message.startswith('ima: a file is not in policy web@1: "')
    assert about in message
    assert message.isprintable()
    assert message.isascii()
    assert len(message) < 450


def test_excluded_paths_and_digests_at_any_path() -> None:
    made = listing('exclude = ["/var/", "*.log"]')
    assert failed(made, measured(b"/var/a"), measured(b"/var/x.log")) == []
    entry = measured(b"/a")
    text = f'ima {{ allow = ["{entry.digest.hex()}  /b"] any_path = %s }}'
    made = policy(text % "true")
    assert failed(made, entry)[0][1].count("/usr/bin/ls") == 1
    only = replace(IMA, entries=(entry,))
    assert evaluate(made, good(ima=only)).holds
    assert not evaluate(policy(text % "false"), good(ima=only)).holds


def test_many_unknown_files_are_bounded() -> None:
    more = [measured(b"/evil/%d" % n) for n in range(5000)]
    found = failed(listing(), *more)
    assert len(found) == 21
    assert found[-1][1] == "ima: more than 20 files are not in policy web@1"
    again = [measured(b"/evil")] * 5000
    assert len(failed(listing(), *again)) == 1


def test_violations_and_old_kernels() -> None:
    assert failed(listing("violations = 7"), violations=7) == []
    assert failed(listing(), violations=7) == [("ima_violation", "ima: 7 violations, 0 allowed")]
    message = "ima: kernel extends SHA-1 into the SHA-256 bank"
    assert failed(listing(), padded_sha1=True) == [("ima_padded_sha1", message)]
    assert failed(listing("allow_padded_sha1 = true"), padded_sha1=True) == []
    assert listing("allow_padded_sha1 = true").request().tolerate == {"padded_sha1"}


def signed(key: Key, entry: ImaEntry, key_id: bytes | None = None) -> ImaEntry:
    """Return the entry as a kernel lists a file that evmctl signed."""
    algorithm = utils.Prehashed(hashes.SHA256())
    if isinstance(key, rsa.RSAPrivateKey):
        raw = key.sign(entry.digest, padding.PKCS1v15(), algorithm)
    else:
        raw = key.sign(entry.digest, ec.ECDSA(algorithm))
    named = key_id if key_id is not None else load_keys(pem(key))[0].key_id
    head = struct.pack(">BBB4sH", 3, 2, 4, named, len(raw))
    return entry._replace(template="ima-sig", signature=head + raw)


NEW = measured(b"/opt/new")


@pytest.mark.parametrize("kind", ["rsa", "ec"])
def test_files_signed_by_a_key_of_the_policy_hold(kind: str) -> None:
    key = KEYS[kind]
    made = listing('keyring = ["@k"]', {"k": pem(key)})
    assert failed(made, signed(key, NEW)) == []
    moved = replace(IMA, entries=(signed(key, NEW), signed(key, NEW._replace(path=b"/moved"))))
    assert evaluate(made, good(ima=moved)).checks[-1].message.startswith("0 files listed, 2 signed")


def test_key_id_of_a_certificate_is_in_it() -> None:
    key = KEYS["ec"]
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ima")])
    now = datetime(2026, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectKeyIdentifier(b"\x01\x02\x03\x04\x05"), critical=False)
        .sign(key, hashes.SHA256())
    )
    made = listing('keyring = ["@k"]', {"k": certificate.public_bytes(serialization.Encoding.PEM)})
    assert failed(made, signed(key, NEW, b"\x02\x03\x04\x05")) == []
    assert failed(made, signed(key, NEW)) != []


def test_no_other_signature_counts() -> None:
    key, other = KEYS["rsa"], KEYS["ec"]
    made = listing('keyring = ["@k"]', {"k": pem(key)})
    right = signed(key, NEW)
    raw = right.signature
    bad = [
        signed(other, NEW),
        signed(other, NEW, raw[3:7]),
        right._replace(digest=digest("other")),
        right._replace(algorithm="sha512"),
        right._replace(signature=raw[:-1]),
        right._replace(signature=raw + b"\0"),
        right._replace(signature=raw[:-1] + bytes([raw[-1] ^ 1])),
        right._replace(signature=b"\x02" + raw[1:]),
        right._replace(signature=raw[:1] + b"\x03" + raw[2:]),
        right._replace(signature=raw[:2] + b"\x02" + raw[3:]),
        *(right._replace(signature=bytes([3, 2, 4]) + bytes(n)) for n in (0, 1, 6, 253, 4997)),
        right._replace(signature=b""),
        right._replace(signature=b"\x03\x02\x04"),
    ]
    for entry in bad:
        ((code, _),) = failed(made, entry)
        assert code == "ima_unknown_file"
    assert failed(listing(), right) != []
    verdict = evaluate(made, good(ima=replace(IMA, entries=(bad[0],))))
    assert verdict.action is Action.QUARANTINE
    assert "signature is not by a key of the policy" in verdict.checks[-1].message


def test_buffers_are_files_by_their_name() -> None:
    entry = measured(b".ima", "certificate", template="ima-buf")
    assert failed(listing(), entry) != []
    made = policy(
        f'ima {{ allow = ["@list", "{entry.digest.hex()}  .ima"] }}', files={"list": LIST}
    )
    assert failed(made, entry) == []
