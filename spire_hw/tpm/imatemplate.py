"""What the kernel writes about a file, by template: from the columns of a line, or from its bytes.

The template data is what the kernel hashes, so both ways come to the same bytes.

Spec: Linux kernel, security/integrity/ima/ima_template.c and ima_template_lib.c.
"""

from __future__ import annotations

import struct
from binascii import hexlify, unhexlify
from typing import TYPE_CHECKING, Final, NamedTuple

from spire_hw.posture.evidence import VERITY, AppendedSignature, ImaEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHA1_BYTES: Final = 20
_OLD_NAME_BYTES: Final = 256
_U32: Final = struct.Struct("<I")
_MARK: Final = b":\x00"
_SIZES: Final = {
    "md5": 16,
    "sha1": 20,
    "rmd160": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "wp256": 32,
    "wp384": 48,
    "wp512": 64,
    "sm3": 32,
    "sm3-256": 32,
    "streebog256": 32,
    "streebog512": 64,
    "sha3-256": 32,
    "sha3-384": 48,
    "sha3-512": 64,
}


class _Algorithm(NamedTuple):
    """A kind of digest.

    Attributes:
        name: as entries have it.
        size: bytes of a digest.
        head: what a template puts before a digest: the length of both, and the kernel's name.
    """

    name: str
    size: int
    head: bytes


class Template(NamedTuple):
    """How entries of one template are made up.

    Attributes:
        name: of the template.
        columns: how many a line has after the name.
        algorithms: kinds of digests, by the kernel's name.
        has_signature: the third field is the file's signature.
    """

    name: str
    columns: int
    algorithms: Mapping[bytes, _Algorithm]
    has_signature: bool = False


def _algorithm(prefix: str, name: str, size: int) -> tuple[bytes, _Algorithm]:
    written = (prefix + name).encode()
    shown = name if prefix != VERITY else prefix + name
    head = _U32.pack(len(written) + len(_MARK) + size) + written + _MARK
    return written, _Algorithm(shown, size, head)


_PLAIN: Final = dict(_algorithm("", name, size) for name, size in _SIZES.items())
_TYPED: Final = dict(
    _algorithm(prefix, name, size) for prefix in ("ima:", VERITY) for name, size in _SIZES.items()
)
_NAME_AND_DIGEST: Final = 2
_WITH_APPENDED: Final = 5
TEMPLATES: Final = {
    template.name.encode(): template
    for template in (
        Template("ima-ng", _NAME_AND_DIGEST, _PLAIN),
        Template("ima-sig", 3, _PLAIN, has_signature=True),
        Template("ima-ngv2", _NAME_AND_DIGEST, _TYPED),
        Template("ima-sigv2", 3, _TYPED, has_signature=True),
        Template("ima-modsig", _WITH_APPENDED, _PLAIN, has_signature=True),
        Template("ima-buf", 3, _PLAIN),
        Template("ima", _NAME_AND_DIGEST, {}),
    )
}
# The first one, whose fields have no lengths.
OLD: Final = TEMPLATES[b"ima"]
# The second takes half the time of ImaEntry().
_join, _make, _unpack = b"".join, tuple.__new__, _U32.unpack_from


def read_columns(template: Template, columns: Sequence[bytes]) -> tuple[ImaEntry, bytes]:
    """Return what a line of the text form says, and the template data.

    Args:
        template: of the line.
        columns: after its name.

    Raises:
        ValueError: malformed; a LookupError says the same.
    """
    name, count, algorithms, _ = template
    if len(columns) != count:
        raise ValueError("wrong number of columns")
    named, path = columns[:_NAME_AND_DIGEST]
    if not path:
        raise ValueError("no name")
    if template is OLD:
        return old_entry(from_hex(named), path)
    kind, _, text = named.rpartition(b":")
    algorithm, size, head = algorithms[kind]
    digest = unhexlify(text)
    if len(digest) != size or hexlify(digest) != text:  # the latter: upper case
        raise ValueError("wrong digest")
    body = _join((head, digest, (len(path) + 1).to_bytes(4, "little"), path, b"\x00"))
    if count == _NAME_AND_DIGEST:
        return _make(ImaEntry, (path, algorithm, digest, name, b"", None)), body
    further = [from_hex(columns[_NAME_AND_DIGEST])]
    if count == _WITH_APPENDED:
        further += [_digest_field(columns[3]), from_hex(columns[4])]
    body += _join([_U32.pack(len(field)) + field for field in further])
    return _entry(template, path, algorithm, digest, further), body


def read_data(template: Template, body: bytes) -> ImaEntry:
    """Return what template data says; it is hashed as it stands.

    Args:
        template: not the first one.
        body: all of the data.

    Raises:
        ValueError: malformed; a struct.error or LookupError says the same.
    """
    kind, count, algorithms, _ = template
    (size,) = _unpack(body)
    at = 4 + size
    name, mark, digest = body[4:at].partition(_MARK)
    algorithm = algorithms[name]
    (size,) = _unpack(body, at)
    at += 4 + size
    path = body[at - size : at]
    # One zero byte, at its end.
    if not mark or len(digest) != algorithm.size or size < 2 or path.find(b"\x00") != size - 1:  # noqa: PLR2004
        raise ValueError("wrong digest or name")
    further = []
    for _ in range(count - _NAME_AND_DIGEST):
        (size,) = _unpack(body, at)
        at += 4 + size
        further.append(body[at - size : at])
    if at != len(body):
        raise ValueError("bytes are left or missing")
    if not further:
        return _make(ImaEntry, (path[:-1], algorithm.name, digest, kind, b"", None))
    return _entry(template, path[:-1], algorithm.name, digest, further)


def old_entry(digest: bytes, path: bytes) -> tuple[ImaEntry, bytes]:
    """Return an entry of the first template, and its template data.

    Raises:
        ValueError: malformed.
    """
    if len(digest) != SHA1_BYTES or not 0 < len(path) < _OLD_NAME_BYTES or b"\x00" in path:
        raise ValueError("not an entry of the old template")
    return ImaEntry(path, "sha1", digest, "ima"), digest + path.ljust(_OLD_NAME_BYTES, b"\x00")


def from_hex(text: bytes) -> bytes:
    """Return bytes of lower-case hex.

    Raises:
        ValueError: something else.
    """
    data = unhexlify(text)
    if hexlify(data) != text:
        raise ValueError("not lower-case hex")
    return data


def _entry(
    template: Template, path: bytes, algorithm: str, digest: bytes, further: Sequence[bytes]
) -> ImaEntry:
    """Return an entry of a template with more than a digest and a name."""
    signature = further[0] if template.has_signature else b""
    appended = _appended(*further[1:]) if len(further) > 1 else None
    return _make(ImaEntry, (path, algorithm, digest, template.name, signature, appended))


def _digest_field(column: bytes) -> bytes:
    """Return the field that a column with a digest, or with nothing, was printed from."""
    if not column:
        return b""
    name, _, text = column.rpartition(b":")
    return _PLAIN[name].head[_U32.size :] + from_hex(text)


def _appended(field: bytes, signature: bytes) -> AppendedSignature | None:
    """Return the appended signature with the digest of the content in front of it."""
    if not field and not signature:
        return None
    name, mark, digest = field.partition(_MARK)
    algorithm = _PLAIN[name]
    if not mark or len(digest) != algorithm.size or not signature:
        raise ValueError("half an appended signature")
    return AppendedSignature(algorithm.name, digest, signature)
