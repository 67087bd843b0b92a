"""Signatures that name the kind of digest, and signatures appended to files, against a keyring."""

from __future__ import annotations

import hashlib
import struct
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from spire_hw.errors import EncodingError
from spire_hw.posture.appended import MAX_SIGNERS, parse_appended
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.evidence import AppendedSignature, ImaEntry
from spire_hw.posture.signature import load_keys
from tests.unit.spire_hw.posture.listings import KEYS, LIST, failed, listing, pem
from tests.unit.spire_hw.posture.samples import IMA, good, measured

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.posture.policy import Policy

VERITY_FILE = measured(b"/opt/verity")._replace(algorithm="verity:sha256", template="ima-sigv2")
PLAIN_FILE = measured(b"/opt/plain")._replace(template="ima-sigv2")
ALL = 'algorithms = ["sha256", "verity:sha256"]'
CONTENT = b"a module" * 1000


def trusting(key: str, more: str = ALL) -> Policy:
    return listing(f'keyring = ["@k"] {more}', {"k": pem(KEYS[key])})


def signed(key: str, entry: ImaEntry, kind: int, version: int, over: int | None = None) -> ImaEntry:
    """Return an entry signed as evmctl does, in any combination of header and signed data."""
    digest = entry.digest
    if over is not None:  # struct ima_file_id
        digest = hashlib.sha256(bytes((over, 4)) + digest).digest()
    algorithm = utils.Prehashed(hashes.SHA256())
    private = KEYS[key]
    if isinstance(private, rsa.RSAPrivateKey):
        raw = private.sign(digest, padding.PKCS1v15(), algorithm)
    else:
        raw = private.sign(digest, ec.ECDSA(algorithm))
    key_id = load_keys(pem(private))[0].key_id
    head = struct.pack(">BBB4sH", kind, version, 4, key_id, len(raw))
    return entry._replace(signature=head + raw)


@pytest.mark.parametrize("key", ["rsa", "ec"])
def test_signatures_of_each_kind_of_digest(key: str) -> None:
    made = trusting(key)
    good_ones = (
        signed(key, PLAIN_FILE, 3, 2),
        signed(key, PLAIN_FILE, 3, 3, over=3),
        signed(key, VERITY_FILE, 6, 3, over=6),
    )
    for entry in good_ones:
        assert failed(made, entry) == []


@pytest.mark.parametrize(
    "entry",
    [
        # One kind of digest is never taken for the other.
        signed("ec", VERITY_FILE, 3, 2),
        signed("ec", VERITY_FILE, 6, 2),
        signed("ec", VERITY_FILE, 3, 3, over=3),
        signed("ec", VERITY_FILE, 6, 3, over=3),
        signed("ec", VERITY_FILE, 6, 3),
        signed("ec", PLAIN_FILE, 6, 3, over=6),
        signed("ec", PLAIN_FILE, 3, 3, over=6),
        signed("ec", PLAIN_FILE, 3, 3),
        signed("ec", PLAIN_FILE, 3, 2, over=3),
        signed("ec", PLAIN_FILE, 5, 3, over=5),
        signed("ec", VERITY_FILE, 6, 4, over=6),
        signed("rsa", VERITY_FILE, 6, 3, over=6),
        signed("ec", VERITY_FILE, 6, 3, over=6)._replace(digest=bytes(32)),
        signed("ec", VERITY_FILE, 6, 3, over=6)._replace(algorithm="verity:sha512"),
    ],
)
def test_signature_of_another_kind(entry: ImaEntry) -> None:
    ((code, message),) = failed(trusting("ec"), entry)
    assert code == "ima_unknown_file"
    assert "signature is not by a key" in message or "of this kind does not count" in message


def test_digests_of_fsverity_count_where_the_policy_names_them() -> None:
    entry = signed("ec", VERITY_FILE, 6, 3, over=6)
    ((_, message),) = failed(trusting("ec", ""), entry)
    assert "verity:sha256:" in message
    assert "a digest of this kind does not count" in message
    line = VERITY_FILE.digest.hex().encode() + b"  /opt/verity\n"
    assert failed(listing(ALL, {"list": LIST + line}), VERITY_FILE) == []
    assert failed(listing("", {"list": LIST + line}), VERITY_FILE) != []


# --- appended signatures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """PKCS#7 messages over CONTENT by openssl, as the kernel's sign-file makes them and otherwise."""
    folder = tmp_path_factory.mktemp("cms")
    (folder / "content").write_bytes(CONTENT)
    plain = ["-binary", "-noattr", "-nocerts", "-md", "sha256"]
    made = {}
    for name in ("rsa", "ec"):
        _write_signer(folder, name)
        made[name] = _cms(folder, [name], plain)
        made[f"{name} by key id"] = _cms(folder, [name], [*plain, "-keyid"])
        made[f"{name} with certificate"] = _cms(folder, [name], [*plain[:2], *plain[3:]])
    made["both"] = _cms(folder, ["rsa", "ec"], plain)
    made["sha512"] = _cms(folder, ["ec"], [*plain[:-1], "sha512"])
    made["sha1"] = _cms(folder, ["ec"], [*plain[:-1], "sha1"])
    made["attributes"] = _cms(folder, ["ec"], [plain[0], *plain[2:]])
    made["content inside"] = _cms(folder, ["ec"], [*plain, "-nodetach"])
    made["too many"] = _cms(folder, ["ec"] * (MAX_SIGNERS + 1), plain)
    return made


def _write_signer(folder: Path, name: str) -> None:
    form = serialization.PrivateFormat.PKCS8
    secret = KEYS[name].private_bytes(
        serialization.Encoding.PEM, form, serialization.NoEncryption()
    )
    (folder / f"{name}.key").write_bytes(secret)
    request = ["openssl", "req", "-x509", "-new", "-key", f"{name}.key", "-subj", "/CN=modules"]
    command = [*request, "-out", f"{name}.crt"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603


def _cms(folder: Path, signers: list[str], options: list[str]) -> bytes:
    command = ["openssl", "cms", "-sign", "-in", "content", "-outform", "DER", *options]
    for name in signers:
        command += ["-signer", f"{name}.crt", "-inkey", f"{name}.key"]
        command += ["-keyid"] if "-keyid" in options else []
    made = subprocess.run(command, cwd=folder, check=True, capture_output=True)  # noqa: S603
    return made.stdout


def module(message: bytes, content: bytes = CONTENT, algorithm: str = "sha256") -> ImaEntry:
    """Return the entry of a file with this signature at its end."""
    digest = hashlib.new(algorithm, content).digest()
    appended = AppendedSignature(algorithm, digest, message)
    entry = measured(b"/lib/modules/a.ko")
    return entry._replace(template="ima-modsig", appended=appended)


GOOD = ["rsa", "ec", "rsa by key id", "ec by key id", "rsa with certificate", "ec with certificate"]


@pytest.mark.parametrize("name", GOOD)
def test_modules_signed_by_a_key_of_the_policy_hold(messages: dict[str, bytes], name: str) -> None:
    key, other = ("rsa", "ec") if name.startswith("rsa") else ("ec", "rsa")
    entry = module(messages[name])
    assert failed(trusting(key, ""), entry) == []
    # By key ids and certificates in the message nothing is decided.
    ((code, message),) = failed(trusting(other, ""), entry)
    assert code == "ima_unknown_file"
    assert "signature is not by a key of the policy" in message
    assert failed(listing(), entry) != []


def test_either_signature_of_a_module_will_do(messages: dict[str, bytes]) -> None:
    both = module(messages["both"])
    for key in ("rsa", "ec"):
        assert failed(trusting(key, ""), both) == []
    bad = module(messages["ec"], b"other content")
    assert failed(trusting("ec", ""), bad) != []
    assert failed(trusting("ec", ""), signed("ec", bad, 3, 2)) == []
    verdict = evaluate(trusting("ec", ""), good(ima=replace(IMA, entries=(both,))))
    assert verdict.checks[-1].message.startswith("0 files listed, 1 signed")


def test_a_digest_of_the_content_has_to_count(messages: dict[str, bytes]) -> None:
    entry = module(messages["sha512"], algorithm="sha512")
    assert failed(trusting("ec", ""), entry) == []
    only = 'algorithms = ["sha256"]'
    assert failed(trusting("ec", only), entry) != []
    # What counts is the digest that was signed, not the one of the whole file.
    odd = module(messages["ec"])._replace(algorithm="sha1", digest=bytes(20))
    assert failed(trusting("ec", ""), odd) == []


def test_no_other_appended_signature_counts(messages: dict[str, bytes]) -> None:
    right = messages["ec"]
    bad = [
        module(messages[name]) for name in ("sha1", "sha512", "attributes", "content inside", "rsa")
    ]
    bad += [module(messages["sha1"], algorithm="sha1"), module(messages["too many"])]
    bad += [module(right, CONTENT + b"x"), module(right, algorithm="sha512")]
    bad += [module(b""), module(right + b"\0"), module(b"\x30\x80" + right[4:])]
    bad += [module(right[:-1] + bytes([right[-1] ^ 1]))]
    made = trusting("ec", "")
    for entry in bad:
        ((code, _),) = failed(made, entry)
        assert code == "ima_unknown_file"


def test_every_cut_and_every_bent_byte_is_told(messages: dict[str, bytes]) -> None:
    right = messages["ec"]
    (expected,) = parse_appended(right)
    for size in range(len(right)):
        with pytest.raises(EncodingError):
            parse_appended(right[:size])
    for at in range(len(right)):
        bent = right[:at] + bytes([right[at] ^ 0x80]) + right[at + 1 :]
        try:
            found = parse_appended(bent)
        except EncodingError:
            continue
        assert len(found) == 1
        assert found[0].algorithm == expected.algorithm


def test_looking_at_unknown_files_is_bounded(messages: dict[str, bytes]) -> None:
    """The same file again and again, each time with another signature, is one fault."""
    right = bytearray(messages["ec"])
    entries = []
    for number in range(3000):
        right[-2:] = struct.pack(">H", number)
        entries.append(module(bytes(right))._replace(digest=bytes(32)))
    made = trusting("ec", "")
    assert len(failed(made, *entries)) == 1
