r"""Evidence as a JSON document: what the datastore keeps and `policy test -evidence` reads.

Bytes are lower-case hexadecimal; paths of the IMA list are text in which a backslash and every
byte that is not UTF-8 is `\xNN`. Writing is canonical (members sorted, no blanks), so that equal
evidence has one digest. Reading is strict: unknown, missing or repeated members, other types and
other spellings of a value are refused.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, ErrorKind, Finding
from spire_hw.posture.evidence import (
    VERITY,
    AppendedSignature,
    BootFacts,
    BootImage,
    Counters,
    EkFacts,
    Evidence,
    ImaEntry,
    ImaFacts,
    ImaState,
    Occasion,
    PcrValues,
    Scramble,
    Tier,
)
from spire_hw.posture.jsonreader import WHAT, Members, load, refuse
from spire_hw.posture.policy import BANK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

FORMAT: Final = "spire-hw evidence"
VERSION: Final = 1
MAX_BYTES: Final = 32 * 1024 * 1024

_MAX_U32: Final = 2**32 - 1
_MAX_U64: Final = 2**64 - 1
_MAX_PCR: Final = 23
_NOT_PLAIN: Final = re.compile("[\\\\\udc80-\udcff]")
_ESCAPED: Final = re.compile(rb"\\(?:x([0-9a-f]{2}))?")
# Names of hash algorithms, templates and reasons.
_WORD: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}", re.ASCII)


def encode_evidence(evidence: Evidence) -> bytes:
    """Return the document, ASCII.

    Raises:
        EncodingError: a text of it is not Unicode.
    """
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "made_at": evidence.made_at.astimezone(UTC).isoformat(timespec="microseconds"),
            "occasion": evidence.occasion.value,
            "tier": evidence.tier.value,
            "ek": _ek_out(evidence.ek),
            "ak": {
                "public": evidence.ak_public.hex(),
                "hierarchy": evidence.ak_hierarchy,
                "qualified_name": evidence.ak_qualified_name.hex(),
                **_scramble_out(evidence.ak_scramble),
            },
            "key_in_tpm": evidence.key_in_tpm,
            "counters": None if evidence.counters is None else _counters_out(evidence.counters),
            "pcrs": _pcrs_out(evidence.pcrs),
            "boot": None if evidence.boot is None else _boot_out(evidence.boot),
            "ima": None if evidence.ima is None else _ima_out(evidence.ima),
            "boot_id": evidence.boot_id,
            "findings": [
                {"code": f.code, "message": f.message, "kind": f.kind.name}
                for f in evidence.findings
            ],
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode("ascii")


def decode_evidence(data: bytes) -> Evidence:
    """Return the evidence of a document.

    Raises:
        EncodingError: it is no such document; the message names the member.
    """
    if len(data) > MAX_BYTES:
        raise EncodingError(WHAT, f"larger than {MAX_BYTES} bytes")
    top = Members(load(data), "")
    if top.text("format") != FORMAT:
        refuse("format", f'expected "{FORMAT}"')
    if (version := top.whole("version")) != VERSION:
        refuse("version", f"{version} is not known, this release reads {VERSION}")
    ak = top.members("ak")
    evidence = Evidence(
        made_at=_time_in(top.text("made_at")),
        occasion=Occasion(top.choice("occasion", [o.value for o in Occasion])),
        tier=Tier(top.choice("tier", [t.value for t in Tier])),
        ek=_ek_in(top.members("ek")),
        ak_public=ak.octets("public"),
        ak_hierarchy=ak.choice("hierarchy", ("endorsement", "owner")),
        ak_qualified_name=ak.octets("qualified_name"),
        ak_scramble=_scramble_in(ak.members("scramble")) if "scramble" in ak.names() else None,
        key_in_tpm=top.boolean("key_in_tpm"),
        counters=None if top.is_null("counters") else _counters_in(top.members("counters")),
        pcrs=_pcrs_in(top.members("pcrs")),
        boot=None if top.is_null("boot") else _boot_in(top.members("boot")),
        ima=None if top.is_null("ima") else _ima_in(top.members("ima")),
        boot_id=top.optional_text("boot_id"),
        findings=tuple(_finding_in(f) for f in top.each_members("findings")),
    )
    ak.end()
    top.end()
    return evidence


def _time_in(text: str) -> datetime:
    try:
        made_at = datetime.fromisoformat(text)
    except ValueError:
        made_at = datetime.min  # noqa: DTZ901 - has no zone, so it is refused below
    if made_at.tzinfo is None or made_at.isoformat(timespec="microseconds") != text:
        refuse("made_at", "expected a time such as 2026-11-22T12:00:00.000000+00:00")
    return made_at.astimezone(UTC)


def _ek_out(ek: EkFacts) -> dict[str, Any]:
    return {
        "hash": ek.hash,
        "methods": list(ek.methods),
        "root": ek.root,
        "manufacturer": ek.manufacturer,
        "model": ek.model,
        "version": ek.version,
    }


def _ek_in(members: Members) -> EkFacts:
    ek = EkFacts(
        hash=members.octets("hash").hex(),
        methods=tuple(members.texts("methods")),
        root=None if members.is_null("root") else members.octets("root").hex(),
        manufacturer=members.optional_text("manufacturer"),
        model=members.optional_text("model"),
        version=members.optional_text("version"),
    )
    members.end()
    return ek


def _counters_out(counters: Counters) -> dict[str, Any]:
    return {
        "clock_ms": counters.clock_ms,
        "reset_count": counters.reset_count,
        "restart_count": counters.restart_count,
        "safe": counters.safe,
        "firmware_version": counters.firmware_version,
    }


def _counters_in(members: Members) -> Counters:
    counters = Counters(
        clock_ms=members.whole("clock_ms", _MAX_U64),
        reset_count=members.whole("reset_count", _MAX_U32),
        restart_count=members.whole("restart_count", _MAX_U32),
        safe=members.boolean("safe"),
        firmware_version=members.whole("firmware_version", _MAX_U64),
    )
    members.end()
    return counters


def _scramble_out(scramble: Scramble | None) -> dict[str, Any]:
    if scramble is None:
        return {}
    return {
        "scramble": {
            "reset_count": scramble.reset_count,
            "restart_count": scramble.restart_count,
            "firmware_version": scramble.firmware_version,
        }
    }


def _scramble_in(members: Members) -> Scramble:
    scramble = Scramble(
        reset_count=members.whole("reset_count", _MAX_U32),
        restart_count=members.whole("restart_count", _MAX_U32),
        firmware_version=members.whole("firmware_version", _MAX_U64),
    )
    members.end()
    return scramble


def _pcrs_out(pcrs: PcrValues) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for (bank, number), value in pcrs.items():
        found.setdefault(bank, {})[str(number)] = value.hex()
    return found


def _pcrs_in(members: Members) -> dict[tuple[str, int], bytes]:
    found = {}
    for bank in members.names():
        size = BANK_BYTES.get(bank)
        if size is None:
            refuse(f"pcrs.{bank}", f"expected one of {', '.join(BANK_BYTES)}")
        values = members.members(bank)
        if not values.names():
            refuse(f"pcrs.{bank}", "names no PCR")
        for name in values.names():
            if not name.isdecimal() or not name.isascii() or str(int(name[:3])) != name:
                refuse(f"pcrs.{bank}", "expected numbers of PCRs")
            if int(name) > _MAX_PCR:
                refuse(f"pcrs.{bank}", f"there is no PCR {name}")
            found[bank, int(name)] = value = values.octets(name)
            if len(value) != size:
                refuse(f"pcrs.{bank}.{name}", f"expected {size} bytes")
    return found


def _boot_out(boot: BootFacts) -> dict[str, Any]:
    return {
        "log_sha256": boot.log_sha256,
        "bank": boot.bank,
        "explained": list(boot.explained),
        "secure_boot": boot.secure_boot,
        "debug_mode": boot.debug_mode,
        "dma_protection": boot.dma_protection,
        "firmware_error": boot.firmware_error,
        "variables": dict(boot.variables),
        "db": list(boot.db),
        "dbx": sorted(boot.dbx),
        "sbat": boot.sbat,
        "authorities": list(boot.authorities),
        "images": [{"pcr": image.pcr, "digest": image.digest.hex()} for image in boot.images],
        "commands": list(boot.commands),
        "files": [digest.hex() for digest in boot.files],
        "uki": boot.uki,
        "mok": boot.mok,
        "mok_digests": [digest.hex() for digest in boot.mok_digests],
        "crtm_version": boot.crtm_version,
        "workarounds": list(boot.workarounds),
    }


def _boot_in(members: Members) -> BootFacts:
    uki = None if members.is_null("uki") else members.octets("uki").hex()
    variables = members.members("variables")
    boot = BootFacts(
        log_sha256=members.octets("log_sha256").hex(),
        bank=members.choice("bank", BANK_BYTES),
        explained=tuple(members.wholes("explained", _MAX_PCR)),
        secure_boot=members.optional_boolean("secure_boot"),
        debug_mode=members.boolean("debug_mode"),
        dma_protection=members.boolean("dma_protection"),
        firmware_error=members.boolean("firmware_error"),
        variables={name: variables.octets(name).hex() for name in variables.names()},
        db=tuple(entry.hex() for entry in members.each_octets("db")),
        dbx=frozenset(entry.hex() for entry in _ascending(members.each_octets("dbx"))),
        sbat=members.text("sbat"),
        authorities=tuple(one.hex() for one in members.each_octets("authorities")),
        images=tuple(_image_in(image) for image in members.each_members("images")),
        commands=tuple(members.texts("commands")),
        files=tuple(members.each_octets("files")),
        uki=uki,
        mok=members.optional_boolean("mok"),
        mok_digests=tuple(members.each_octets("mok_digests")),
        crtm_version=members.text("crtm_version"),
        workarounds=tuple(members.texts("workarounds")),
    )
    members.end()
    return boot


def _ascending(entries: list[bytes]) -> list[bytes]:
    if any(one.hex() >= other.hex() for one, other in pairwise(entries)):
        refuse("boot.dbx", "expected ascending values, each once")
    return entries


def _image_in(members: Members) -> BootImage:
    image = BootImage(members.whole("pcr", _MAX_PCR), members.octets("digest"))
    members.end()
    return image


def _finding_in(members: Members) -> Finding:
    kind = ErrorKind[members.choice("kind", [kind.name for kind in ErrorKind])]
    finding = Finding(members.text("code"), members.text("message"), kind)
    if _WORD.fullmatch(finding.code) is None or not finding.message.isprintable():
        refuse("findings", "expected a reason code and a printable message")
    members.end()
    return finding


def _ima_out(ima: ImaFacts) -> dict[str, Any]:
    return {
        "start": ima.start,
        "state": {
            "count": ima.state.count,
            "pcr": ima.state.pcr.hex(),
            "sha256": ima.state.sha256.hex(),
        },
        "entries": encode_entries(ima.entries),
        "violations": ima.violations,
        "padded_sha1": ima.padded_sha1,
    }


def _ima_in(members: Members) -> ImaFacts:
    state = members.members("state")
    ima = ImaFacts(
        start=members.whole("start", _MAX_U32),
        state=ImaState(state.whole("count", _MAX_U32), state.octets("pcr"), state.octets("sha256")),
        entries=decode_entries(members.plain_list("entries")),
        violations=members.whole("violations", _MAX_U32),
        padded_sha1=members.boolean("padded_sha1"),
    )
    state.end()
    members.end()
    return ima


def encode_entries(entries: Iterable[ImaEntry]) -> list[list[str]]:
    """Return entries as lists of path, algorithm, digest, template, signature.

    Where a signature is appended to the file, its algorithm, digest and message follow.
    """
    return [
        [
            _path_out(path),
            algorithm,
            digest.hex(),
            template,
            signature.hex(),
            *(() if appended is None else _appended_out(appended)),
        ]
        for path, algorithm, digest, template, signature, appended in entries
    ]


def _appended_out(appended: AppendedSignature) -> tuple[str, str, str]:
    return appended.algorithm, appended.digest.hex(), appended.signature.hex()


def decode_entries(entries: list[Any]) -> tuple[ImaEntry, ...]:
    """Return what `encode_entries` was given.

    Raises:
        EncodingError: an entry is something else.
    """
    words: set[str] = set()
    found = []
    for number, entry in enumerate(entries):
        try:
            found.append(_entry_in(entry, words))
        except (TypeError, ValueError, AttributeError):
            refuse(f"ima.entries.{number}", "expected path, algorithm, digest, template, signature")
    return tuple(found)


def _entry_in(entry: Any, words: set[str]) -> ImaEntry:
    """Return one entry; words that were checked before need not be again."""
    path, algorithm, digest, template, signature, *more = entry
    for word in (algorithm.removeprefix(VERITY), template):
        if word not in words:
            if _WORD.fullmatch(word) is None:
                raise ValueError("not a name")
            words.add(word)
    appended = None
    if more:
        name, of_content, message = more
        if _WORD.fullmatch(name) is None:
            raise ValueError("not a name")
        appended = AppendedSignature(name, _octets(of_content), _octets(message))
    return ImaEntry(
        _path_in(path), algorithm, _octets(digest), template, _octets(signature), appended
    )


def _octets(text: str) -> bytes:
    raw = bytes.fromhex(text)
    if raw.hex() != text:
        raise ValueError("not lower-case hexadecimal")
    return raw


def _path_out(path: bytes) -> str:
    if path.isascii() and b"\\" not in path:
        return path.decode("ascii")
    text = path.decode("utf-8", "surrogateescape")
    return _NOT_PLAIN.sub(
        lambda found: f"\\x{found[0].encode('utf-8', 'surrogateescape').hex()}", text
    )


def _path_in(text: str) -> bytes:
    raw = text.encode()
    if b"\\" not in raw:
        return raw
    if any(not found for found in _ESCAPED.findall(raw)):
        raise ValueError("escape is malformed")
    path = _ESCAPED.sub(lambda found: bytes([int(found[1], 16)]), raw)
    if _path_out(path) != text:
        raise ValueError("spelled differently")
    return path
