"""What is fuzzed: every parser of bytes that an attesting node, or a signer's client, sends.

A target takes any bytes and returns, or raises one of our own errors. Where a digest or a length
would keep nearly all inputs out, a second target builds a frame that is right around the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError
from spire_hw.key import SoftwareSigner
from spire_hw.posture import document
from spire_hw.posture.appended import parse_appended
from spire_hw.posture.evidence import Counters, EkFacts, Evidence, ImaState, Occasion, Tier
from spire_hw.tpm import boot, der, ekcert, eventlog, ima, imalist, public, secureboot, verify, wire
from spire_hw.tpm.cabinet import read_cabinet
from spire_hw.tpm.certificate import parse_certificate, split_pem
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.crl import parse_crl, split_crls
from spire_hw.tpm.ekcert import EkRoots
from spire_hw.tpm.inflate import inflate
from spire_hw.tpm.wire import PcrSelection
from spire_hw.x509.csr import build_csr, parse_csr
from spire_hw_plugins.nodeattestor.tpm import dialects, rounds
from spire_hw_plugins.nodeattestor.tpm import wire as tpm_wire
from spire_hw_plugins.nodeattestor.tpm_devid import wire as devid_wire
from spire_hw_plugins.nodeattestor.x509pop import wire as x509pop_wire
from spire_hw_sim import firmware
from spire_hw_sim.cabinets import make_cabinet
from spire_hw_sim.ekca import CrlSpec
from spire_hw_sim.firmware import Boot, Firmware, Measurement
from spire_hw_sim.imawriter import ImaList, Inode, Item
from spire_hw_sim.softtpm import SoftTpm, make_ak, make_ek, make_svid_key
from spire_hw_sim.tpmnode import TpmNode, Vendor
from tests.fuzz import signing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BANK: Final = "sha256"
NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
_TPM = SoftTpm(ek=make_ek("L-2"))
_VENDOR = Vendor.make()
_CERTIFICATE = _VENDOR.certify(_TPM)
_ROOTS = EkRoots.of([parse_certificate(_VENDOR.root.certificate)])
_LEAF = parse_certificate(_CERTIFICATE)
_NODE = _VENDOR.equip(TpmNode(_TPM))
_PCRS = (PcrSelection(BANK, (0, 7)),)
_QUOTE = _TPM.quote(_PCRS, bytes(32))
_AK = public.parse_public(_TPM.ak.public)
# Small, so that many inputs are tried.
_SMALL = Firmware(commands=1, db=(bytes(20),), dbx=(bytes(32), b"\1" * 32), banks=("sha256",))
_BOOTS = [
    machine.boot()
    for machine in (
        _SMALL,
        replace(_SMALL, loader="uki", locality=3),
        replace(_SMALL, shim_adds_byte=True, banks=("sha384", "sha256")),
        replace(_SMALL, secure_boot=False, legacy=True),
    )
]
_VALUES = _BOOTS[0].values(BANK)
_KINDS = (1, 3, 4, 5, 6, 7, 8, 13, 18, *range(0x80000001, 0x80000009), 0x800000E0)
_DEVID = ("DevIDPub", "EKCert", "EKPub", "AKPub", "CertifiedDevID", "CertificationSignature")
_LOOSE = boot.BootRules(empty_secure_boot=True, early_authority=True)
_LIST = ImaList.start(_VALUES).measure(
    Item(b"/a", bytes(32)),
    Item(b"/b", bytes(32), "ima-sig", extra=b"\x03\x02"),
    Item(b"/c", bytes(20), "ima", "sha1"),
    Item(b"k", bytes(32), "ima-buf", extra=b"key"),
    Item(b"/v", bytes(32), violation=True),
    Item(b"/d", bytes(32), "ima-ngv2"),
    Item(b"/e", bytes(32), "ima-sigv2", "verity:sha256", extra=b"\x03\x02"),
    Item(b"/m", bytes(32), "ima-modsig", content=bytes(32), appended=b"0\x00"),
    Item(b"/f", bytes(32), "evm-sig", inode=Inode(b"\5\2", {"security.ima": b"x"}, 1, 2, 3)),
    Item(b"/g", bytes(32), "d-ng|n-ng|iuid|sig", inode=Inode(), extra=b"\x03\x02"),
)
_TEMPLATES = (
    *(b"ima-ng", b"ima-sig", b"ima-buf", b"ima"),
    *(b"ima-ngv2", b"ima-sigv2", b"ima-modsig"),
    *(b"evm-sig", b"d-ng|n-ng|iuid|sig"),
)
_EVIDENCE = Evidence(
    made_at=NOW,
    occasion=Occasion.ATTESTATION,
    tier=Tier.QUOTE,
    ek=EkFacts("0" * 64, ("ca",), "1" * 64, "id:4E544300", "NPCT75x", "id:00070002"),
    ak_public=_TPM.ak.public,
    counters=Counters(1, 2, 3, True, 4),
    pcrs={(BANK, 7): _VALUES[7]},
    boot=boot.facts(eventlog.parse(_BOOTS[1].log()), _BOOTS[1].pcrs(BANK), BANK),
    ima=ima.replay([_LIST.ascii()], None, _BOOTS[0].pcrs(BANK) | {(BANK, 10): _LIST.pcr()}, BANK),
)


# ContentInfo, SignedData of version 1, SHA-256, no content, no signers.
_SIGNED_DATA = (
    "3030 06092a864886f70d010702 a023 3021 020101 310d300b0609608648016503040201"
    " 300b06092a864886f70d010701 3100"
)
_BODIES, _REQUEST = signing.seeds()


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        run: takes any bytes; only a SpireHwError may come out.
        seeds: inputs that go deep.
        longest: bytes an input may have.
    """

    run: Callable[[bytes], object]
    seeds: Sequence[bytes]
    longest: int = 4096


def _boot_log(raw: bytes) -> None:
    _understand(eventlog.parse(raw, allow_legacy=True))


def _understand(log: eventlog.Log) -> None:
    """Read a log as if its own values had been quoted, so that nothing stops at the replay."""
    for bank in log.banks:
        values = eventlog.replay(log, bank)
        pcrs = {(bank, n): value for n, value in values.items()}
        with contextlib.suppress(SpireHwError):
            boot.facts(log, pcrs, bank, _LOOSE)


def _boot_events(raw: bytes) -> None:
    """Measure on top of a sound boot: PCR, type, length, data, again and again."""
    parts, at = [*_BOOTS[0].measurements], 0
    while at + 4 <= len(raw):
        pcr, kind, size, place = raw[at : at + 4]
        data = raw[at + 4 : at + 4 + size]
        measured = Measurement(pcr % 24, _KINDS[kind % len(_KINDS)], data)
        parts.insert(place % (len(parts) + 1), measured)
        at += 4 + size
    _understand(eventlog.parse(Boot(tuple(parts), (BANK,)).log()))


def _variable(raw: bytes) -> None:
    digest = hashlib.sha256(raw).digest()
    separator = (2, secureboot.EV_SEPARATOR, b"", b"")
    for kind in (secureboot.EV_EFI_VARIABLE_DRIVER_CONFIG, secureboot.EV_EFI_VARIABLE_AUTHORITY):
        with contextlib.suppress(SpireHwError):
            secureboot.read([(1, kind, digest, raw), separator], BANK, early_authority=True)


def _replay(raw: bytes) -> None:
    for start in (None, ImaState(3, bytes(32), bytes(32))):
        with contextlib.suppress(SpireHwError):
            ima.replay([raw], start, {(BANK, 10): b"\1" * 32}, BANK)
    list(imalist.read(raw, 0, BANK))


def _ima_fields(raw: bytes) -> None:
    """Put a right template hash around any fields, in both forms."""
    column = hashlib.sha1(raw).digest()  # noqa: S324
    for name in _TEMPLATES:
        head = struct.pack("<I20sI", 10, column, len(name)) + name
        with contextlib.suppress(SpireHwError):
            list(imalist.read(head + struct.pack("<I", len(raw)) + raw, 0, BANK))
        with contextlib.suppress(SpireHwError):
            list(imalist.read(head + raw, 0, BANK))
        line = b"10 " + column.hex().encode() + b" " + name + b" " + raw + b"\n"
        with contextlib.suppress(SpireHwError):
            list(imalist.read(line, 0, BANK))


def _inflate(raw: bytes) -> None:
    if len(inflate(raw, 100_000, "log")) > 100_000:
        raise AssertionError("more than was asked for")


def _each(*parsers: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """Return a target that gives the same bytes to several parsers."""

    def run(raw: bytes) -> None:
        for parser in parsers:
            with contextlib.suppress(SpireHwError):
                parser(raw)

    return run


def _statement(raw: bytes) -> None:
    for statement in (verify.Statement(raw, _QUOTE[1]), verify.Statement(_QUOTE[0], raw)):
        with contextlib.suppress(SpireHwError):
            verify.verify_quote(
                _AK,
                _TPM.ak.qualified_name,
                expected=bytes(32),
                selections=_PCRS,
                statement=statement,
                values=_TPM.pcr_values(_PCRS[0]),
            )
        with contextlib.suppress(SpireHwError):
            verify.verify_certify(
                _AK, _TPM.ak.qualified_name, key=_AK, expected=bytes(32), statement=statement
            )


def _public(raw: bytes) -> None:
    area = public.parse_public(raw)
    for check in (public.check_ak, public.check_ek, public.check_svid_key):
        with contextlib.suppress(SpireHwError):
            check(area)
    make_credential(area, area.name, bytes(32))


def _der(raw: bytes) -> None:
    readers = (der.integer, der.any_integer, der.boolean, der.bit_string, der.named_bits)
    value = der.read(raw, "input")
    for reader in (*readers, der.oid, der.time):
        with contextlib.suppress(SpireHwError):
            reader(value)


def _certificate(raw: bytes) -> None:
    with contextlib.suppress(SpireHwError):
        ekcert.verify_ek_certificate(_LEAF, (raw,), _ROOTS, NOW)
    leaf = parse_certificate(raw)
    with contextlib.suppress(SpireHwError):
        ekcert.read_model(leaf)
    ekcert.verify_ek_certificate(leaf, (_VENDOR.intermediate.certificate,), _ROOTS, NOW)


def _crl(raw: bytes) -> None:
    for one in split_crls(raw):
        parse_crl(one)


_EVENTS = b"".join(
    bytes((m.pcr, _KINDS.index(m.type), min(255, len(m.data)), 7)) + m.data[:255]
    for m in _BOOTS[0].measurements
    if m.pcr in {4, 7, 8} and m.type in _KINDS
)
_VARIABLES = [m.data for m in _BOOTS[0].measurements if m.pcr == 7 and len(m.data) > 32]

TARGETS: Final[dict[str, Target]] = {
    "boot_log": Target(_boot_log, [b.log() for b in _BOOTS], 20_000),
    "boot_events": Target(_boot_events, [_EVENTS, _EVENTS[:400]], 8192),
    "boot_variable": Target(_variable, _VARIABLES),
    "signature_list": Target(
        lambda raw: list(secureboot.signature_list(raw)),
        [firmware.signature_list(secureboot.CERT_SHA256, [bytes(32), bytes(32)])],
    ),
    "ima_part": Target(
        lambda raw: ima.replay([raw], None, {(BANK, 10): b"\1" * 32}, BANK),
        [_LIST.ascii(), _LIST.binary()],
        8192,
    ),
    "ima_list": Target(_replay, [_LIST.ascii(), _LIST.binary(), _LIST.ascii(bank=BANK)], 8192),
    "ima_fields": Target(
        _ima_fields,
        [i.body() for i in _LIST.items] + [i.line().split(b" ", 3)[3] for i in _LIST.items],
    ),
    "inflate": Target(_inflate, [zlib.compress(b"abc" * 99), zlib.compress(bytes(99_999))]),
    "tpm_structures": Target(
        _each(
            wire.parse_attest,
            wire.parse_quote_body,
            lambda raw: wire.parse_name_pair(raw, "input"),
            wire.parse_signature,
            wire.parse_creation_data,
        ),
        [_QUOTE[0], _QUOTE[1], wire.parse_attest(_QUOTE[0]).body, _TPM.creation_data()],
    ),
    "tpm_statement": Target(_statement, list(_QUOTE)),
    "tpm_public": Target(
        _public,
        [
            _TPM.ak.public,
            _TPM.ek.public,
            make_ek("L-1").public,
            make_ak("rsa2048").public,
            make_svid_key().public,
        ],
    ),
    "der": Target(_der, [_CERTIFICATE, b"\x06\x03\x55\x04\x03", b"\x17\x0d260101000000Z"]),
    "ek_certificate": Target(
        _certificate, [_CERTIFICATE, _VENDOR.intermediate.certificate, _VENDOR.root.certificate]
    ),
    "pem": Target(split_pem, [b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"]),
    "crl": Target(_crl, [_VENDOR.intermediate.issue_crl(CrlSpec([1, -7, 2**70]))]),
    "cabinet": Target(read_cabinet, [make_cabinet({"a/b.cer": _CERTIFICATE, "c": b"text"})]),
    "tpm_messages": Target(
        _each(
            tpm_wire.decode_attestation_data,
            tpm_wire.decode_challenge,
            tpm_wire.decode_response,
            dialects.decode_challenge,
            dialects.decode_response,
            rounds.decode_part,
            rounds.decode_part_request,
        ),
        [
            _NODE.payload(),
            rounds.encode_part(rounds.ImaPart(b"x", 3, 4)),
            dialects.encode_response(bytes(32)),
            b'{"EC":{"Credential":"AAAA","Secret":"AAAA"},"spire_hw":{"v":2,"nonce":"AA=="}}',
            b'{"Secret":"AAAA","spire_hw":{"quotes":[{"pcrs":{"sha256":{"0":"00"}}}]}}',
        ],
        8192,
    ),
    "tpm_answer": Target(tpm_wire.decode_response, [b'{"Secret":"AAAA","spire_hw":{}}']),
    "devid_messages": Target(
        _each(
            devid_wire.decode_attestation_data,
            devid_wire.decode_challenge,
            devid_wire.decode_response,
        ),
        [
            json.dumps({"DevIDCert": ["AAAA"], **dict.fromkeys(_DEVID, "AAAA")}).encode(),
            b'{"DevID":"AAAA","CredActivation":{"Credential":"AAAA","Secret":"AAAA"}}',
            b'{"DevID":"AAAA","CredActivation":"AAAA"}',
        ],
    ),
    "x509pop_messages": Target(
        _each(
            lambda raw: x509pop_wire.decode_payload(raw, max_certificates=4),
            x509pop_wire.decode_challenge,
            x509pop_wire.decode_response,
        ),
        [b'{"certificates":["AAAA"]}', b'{"rsa_signature":{"nonce":"AAAA"}}'],
    ),
    "csr": Target(parse_csr, [asyncio.run(build_csr(SoftwareSigner(make_svid_key().private)))]),
    "appended": Target(parse_appended, [bytes.fromhex(_SIGNED_DATA)]),
    "evidence": Target(document.decode_evidence, [document.encode_evidence(_EVIDENCE)], 8192),
    "signer_certificate": Target(signing.certificate, _BODIES),
    "signer_request": Target(signing.request, [_REQUEST]),
    "signer_token": Target(signing.token, signing.TOKENS),
    "signer_policy": Target(signing.policy, [signing.POLICY]),
}


def run(name: str, raw: bytes) -> None:
    """Give one input to one target; our own errors are its right to raise."""
    with contextlib.suppress(SpireHwError):
        TARGETS[name].run(raw)
