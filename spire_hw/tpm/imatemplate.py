"""What the kernel writes about a file, by template: from the columns of a line, or from its bytes.

The template data is what the kernel hashes, so both ways come to the same bytes. It says nothing
of the template's name: what a field is called is a claim, and none is believed for its name alone.

Spec: Linux kernel, security/integrity/ima/ima_template.c and ima_template_lib.c; the list of fields
is in Documentation/security/IMA-templates.rst.
"""

from __future__ import annotations

import functools
import struct
from binascii import hexlify, unhexlify
from typing import TYPE_CHECKING, Final, NamedTuple

from spire_hw.posture.evidence import VERITY, AppendedSignature, ImaEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SHA1_BYTES: Final = 20
_OLD_NAME_BYTES: Final = 256
_U32: Final = struct.Struct("<I")
_EMPTY: Final = bytes(4)
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


class _Field(NamedTuple):
    """A kind of field; any may be empty, as those about files are for buffers.

    Attributes:
        from_column: makes the field of a column of the text form that is not empty.
        check: raises ValueError for a field that is not empty and that no kernel writes; None where
            any may be.
    """

    from_column: Callable[[bytes], bytes]
    check: Callable[[bytes], None] | None = None


class Template(NamedTuple):
    """How entries of one template are made up.

    Attributes:
        name: of the template.
        columns: how many a line has after the name.
        algorithms: kinds of digests, by the kernel's name.
        further: kinds of the fields after digest and name.
        places: of the file's signature among these, of the digest of its content without an
            appended signature, and of that signature; -1 for none.
    """

    name: str
    columns: int
    algorithms: Mapping[bytes, _Algorithm]
    further: tuple[_Field, ...] = ()
    places: tuple[int, int, int] = (-1, -1, -1)


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
# What a format of one's own (`ima_template_fmt`) is called in entries.
CUSTOM: Final = "custom"
_MAX_FORMAT_BYTES: Final = 255
_MAX_FIELDS: Final = 15  # IMA_TEMPLATE_NUM_FIELDS_MAX
# The first one, whose fields have no lengths.
OLD: Final = Template("ima", _NAME_AND_DIGEST, {})
# The second takes half the time of ImaEntry().
_join, _make, _unpack = b"".join, tuple.__new__, _U32.unpack_from


def from_hex(text: bytes) -> bytes:
    """Return bytes of lower-case hex.

    Raises:
        ValueError: something else.
    """
    data = unhexlify(text)
    if hexlify(data) != text:
        raise ValueError("not lower-case hex")
    return data


def _digest_field(column: bytes) -> bytes:
    """Return the field that a column with a digest was printed from."""
    name, _, text = column.rpartition(b":")
    return _PLAIN[name].head[_U32.size :] + from_hex(text)


def _text_field(column: bytes) -> bytes:
    return column + b"\x00"


def _check_text(field: bytes) -> None:
    if field.find(b"\x00") != len(field) - 1:
        raise ValueError("not a text")


def _number(size: int) -> _Field:
    """Return the kind of a number of so many bytes."""

    def from_column(column: bytes) -> bytes:
        value = int(column) if column.isdigit() and len(column) <= _MAX_DIGITS else -1
        if column != b"%d" % value or value >> 8 * size:
            raise ValueError("not a number, or too large")
        return value.to_bytes(size, "little")

    def check(field: bytes) -> None:
        if len(field) != size:
            raise ValueError("not a number")

    return _Field(from_column, check)


_MAX_DIGITS: Final = 10
_HEX: Final = _Field(from_hex)
_FIELDS: Final = {
    b"sig": _HEX,
    b"buf": _HEX,
    b"d-modsig": _Field(_digest_field),
    b"modsig": _HEX,
    b"evmsig": _HEX,
    b"xattrnames": _Field(_text_field, _check_text),
    b"xattrlengths": _HEX,
    b"xattrvalues": _HEX,
    b"iuid": _number(4),
    b"igid": _number(4),
    b"imode": _number(2),
}
_KINDS: Final = {b"d-ng": _PLAIN, b"d-ngv2": _TYPED}
_EVM: Final = b"d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode"


def _template(name: str, form: bytes) -> Template:
    """Return the template of a format: digest, name, and other fields behind them.

    Raises:
        ValueError: a format that is not read; a LookupError says the same.
    """
    digest, path, *further = form.split(b"|", _MAX_FIELDS)
    if path != b"n-ng" or len(set(further)) != len(further):
        raise ValueError("not a format of digest, name and others")
    kinds = tuple(_FIELDS[field] for field in further)
    signature, content, appended = (
        further.index(field) if field in further else -1
        for field in (b"sig", b"d-modsig", b"modsig")
    )
    places = (signature, content, appended if content >= 0 else -1)
    return Template(name, _NAME_AND_DIGEST + len(kinds), _KINDS[digest], kinds, places)


TEMPLATES: Final = {
    b"ima": OLD,
    b"ima-ng": _template("ima-ng", b"d-ng|n-ng"),
    b"ima-sig": _template("ima-sig", b"d-ng|n-ng|sig"),
    b"ima-ngv2": _template("ima-ngv2", b"d-ngv2|n-ng"),
    b"ima-sigv2": _template("ima-sigv2", b"d-ngv2|n-ng|sig"),
    b"ima-modsig": _template("ima-modsig", b"d-ng|n-ng|sig|d-modsig|modsig"),
    b"ima-buf": _template("ima-buf", b"d-ng|n-ng|buf"),
    b"evm-sig": _template("evm-sig", _EVM),
}


@functools.lru_cache(maxsize=8)
def custom_template(form: bytes) -> Template:
    """Return the template of a format of one's own, which a list has in place of a name.

    Raises:
        ValueError: one that is not read; a LookupError says the same.
    """
    if len(form) > _MAX_FORMAT_BYTES:
        raise ValueError("format is too long")
    return _template(CUSTOM, form)


def read_columns(template: Template, columns: Sequence[bytes]) -> tuple[ImaEntry, bytes]:
    """Return what a line of the text form says, and the template data.

    Args:
        template: of the line.
        columns: after its name.

    Raises:
        ValueError: malformed; a LookupError says the same.
    """
    name, count, algorithms, kinds, _ = template
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
    others = columns[_NAME_AND_DIGEST:]
    further = [
        kind.from_column(column) if column else b""
        for kind, column in zip(kinds, others, strict=True)
    ]
    body += _join([_U32.pack(len(field)) + field if field else _EMPTY for field in further])
    return _entry(template, path, algorithm, digest, further), body


def read_data(template: Template, body: bytes) -> ImaEntry:
    """Return what template data says; it is hashed as it stands.

    Args:
        template: not the first one.
        body: all of the data.

    Raises:
        ValueError: malformed; a struct.error or LookupError says the same.
    """
    named, _, algorithms, kinds, _ = template
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
    for kind in kinds:
        (size,) = _unpack(body, at)
        at += 4 + size
        field = body[at - size : at]
        if field and kind.check is not None:
            kind.check(field)
        further.append(field)
    if at != len(body):
        raise ValueError("bytes are left or missing")
    if not further:
        return _make(ImaEntry, (path[:-1], algorithm.name, digest, named, b"", None))
    return _entry(template, path[:-1], algorithm.name, digest, further)


def old_entry(digest: bytes, path: bytes) -> tuple[ImaEntry, bytes]:
    """Return an entry of the first template, and its template data.

    Raises:
        ValueError: malformed.
    """
    if len(digest) != SHA1_BYTES or not 0 < len(path) < _OLD_NAME_BYTES or b"\x00" in path:
        raise ValueError("not an entry of the old template")
    return ImaEntry(path, "sha1", digest, "ima"), digest + path.ljust(_OLD_NAME_BYTES, b"\x00")


def _entry(
    template: Template, path: bytes, algorithm: str, digest: bytes, further: Sequence[bytes]
) -> ImaEntry:
    """Return an entry of a template with more than a digest and a name."""
    at, content, message = template.places
    signature = further[at] if at >= 0 else b""
    appended = _appended(further[content], further[message]) if message >= 0 else None
    return _make(ImaEntry, (path, algorithm, digest, template.name, signature, appended))


def _appended(field: bytes, signature: bytes) -> AppendedSignature | None:
    """Return the appended signature with the digest of the content in front of it."""
    if not field and not signature:
        return None
    name, mark, digest = field.partition(_MARK)
    algorithm = _PLAIN[name]
    if not mark or len(digest) != algorithm.size or not signature:
        raise ValueError("half an appended signature")
    return AppendedSignature(algorithm.name, digest, signature)
