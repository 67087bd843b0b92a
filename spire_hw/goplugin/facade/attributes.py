"""What composers may amend, to and from protobuf.

`read_...` checks all it reads; `write_...` changes the fields we know in a message and leaves any
other alone.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.plugin.credentialcomposer import (
    DistinguishedName,
    JwtSvidAttributes,
    X509CaAttributes,
    X509SvidAttributes,
)
from spire_hw.x509.dnsname import check_dns_names
from spire_hw.x509.extension import WRITTEN, Extension

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from google.protobuf.struct_pb2 import Struct, Value

    from spire_hw._pb import plugin_server_credentialcomposer_pb2 as pb

_OID: Final = re.compile(r"[0-2](\.(0|[1-9][0-9]{0,17})){1,31}")
_TEXTS: Final = (
    "country",
    "organization",
    "organizational_unit",
    "locality",
    "province",
    "street_address",
    "postal_code",
)
_MAX_ITEMS: Final = 64
_MAX_TEXT: Final = 1024
_MAX_DNS_NAMES: Final = 1024
_MAX_EXTENSION_BYTES: Final = 64 << 10
_MAX_CLAIM_ITEMS: Final = 10_000
_MAX_NESTING: Final = 32
# The largest span in which doubles tell all integers apart.
_EXACT: Final = 2.0**53


def write_ca(attributes: X509CaAttributes, message: pb.X509CAAttributes) -> None:
    """Write what may be amended of a CA certificate into a message."""
    _write_name(attributes.subject, message.subject)
    message.policy_identifiers[:] = attributes.policy_identifiers
    _write_extensions(attributes.extra_extensions, message)


def read_ca(message: pb.X509CAAttributes) -> X509CaAttributes:
    """Return what a message says about a CA certificate.

    Raises:
        InvalidInputError: something that cannot stand in a certificate.
    """
    policies = _bounded("policy identifiers", message.policy_identifiers)
    return X509CaAttributes(
        _read_name(message.subject),
        tuple(_checked_oid(oid) for oid in policies),
        _read_extensions(message.extra_extensions),
    )


def write_svid(attributes: X509SvidAttributes, message: pb.X509SVIDAttributes) -> None:
    """Write what may be amended of an X509-SVID into a message."""
    _write_name(attributes.subject, message.subject)
    message.dns_sans[:] = attributes.dns_names
    _write_extensions(attributes.extra_extensions, message)


def read_svid(message: pb.X509SVIDAttributes) -> X509SvidAttributes:
    """Return what a message says about an X509-SVID.

    Raises:
        InvalidInputError: something that cannot stand in a certificate.
    """
    names = _bounded("DNS names", message.dns_sans, _MAX_DNS_NAMES)
    return X509SvidAttributes(
        _read_name(message.subject),
        check_dns_names(tuple(names)),
        _read_extensions(message.extra_extensions),
    )


def write_jwt(attributes: JwtSvidAttributes, message: pb.JWTSVIDAttributes) -> None:
    """Write the claims of a JWT-SVID into a message.

    Raises:
        InvalidInputError: a value that JSON does not have.
    """
    message.claims.Clear()
    _write_struct(attributes.claims, message.claims)


def read_jwt(message: pb.JWTSVIDAttributes) -> JwtSvidAttributes:
    """Return the claims in a message; whole numbers, which travel as doubles, as integers.

    Raises:
        InvalidInputError: a value that JSON does not have, or too much.
    """
    left = [_MAX_CLAIM_ITEMS]
    return JwtSvidAttributes(_read_struct(message.claims, left, 0))


def _write_name(name: DistinguishedName, message: pb.DistinguishedName) -> None:
    for field in _TEXTS:
        getattr(message, field)[:] = getattr(name, field)
    message.serial_number = name.serial_number
    message.common_name = name.common_name
    if _read_extra_names(message) != name.extra_names:
        del message.extra_names[:]
        for oid, text in name.extra_names:
            message.extra_names.add(oid=oid, string_value=text)


def _read_name(message: pb.DistinguishedName) -> DistinguishedName:
    texts = {field: tuple(_bounded(field, getattr(message, field))) for field in _TEXTS}
    for field, values in texts.items():
        for value in values:
            _check_text(field, value)
    _check_text("serial number", message.serial_number)
    _check_text("common name", message.common_name)
    _bounded("extra names", message.extra_names)
    for extra in message.extra_names:
        _checked_oid(extra.oid)
        _check_text("extra name", extra.string_value)
    return DistinguishedName(
        **texts,
        serial_number=message.serial_number,
        common_name=message.common_name,
        extra_names=_read_extra_names(message),
    )


def _read_extra_names(message: pb.DistinguishedName) -> tuple[tuple[str, str], ...]:
    return tuple((extra.oid, extra.string_value) for extra in message.extra_names)


def _write_extensions(
    extensions: Sequence[Extension], message: pb.X509CAAttributes | pb.X509SVIDAttributes
) -> None:
    if [(e.oid, e.value, e.critical) for e in message.extra_extensions] == [
        (e.oid, e.value, e.critical) for e in extensions
    ]:
        return
    del message.extra_extensions[:]
    for extension in extensions:
        message.extra_extensions.add(
            oid=extension.oid, value=extension.value, critical=extension.critical
        )


def _read_extensions(messages: Sequence[pb.X509Extension]) -> tuple[Extension, ...]:
    found: dict[str, Extension] = {}
    for message in _bounded("extensions", messages):
        oid = _checked_oid(message.oid)
        if oid in WRITTEN:
            raise EncodingError(f"extension {oid}", "is written by the server alone")
        if oid in found:
            raise EncodingError(f"extension {oid}", "occurs twice")
        if len(message.value) > _MAX_EXTENSION_BYTES:
            raise EncodingError(f"extension {oid}", f"is over {_MAX_EXTENSION_BYTES} bytes")
        found[oid] = Extension(oid, message.value, message.critical)
    return tuple(found.values())


def _write_struct(values: Mapping[str, Any], message: Struct) -> None:
    for name, value in values.items():
        _write_value(value, message.fields[name])


def _write_value(value: Any, message: Value) -> None:
    match value:
        case None:
            message.null_value = 0  # type: ignore[assignment]  # the enum's only member
        case bool():
            message.bool_value = value
        case int() | float() if abs(value) <= _EXACT:
            message.number_value = value
        case str():
            message.string_value = value
        case dict():
            message.struct_value.Clear()
            message.struct_value.SetInParent()
            _write_struct(value, message.struct_value)
        case list() | tuple():
            message.list_value.SetInParent()
            for item in value:
                _write_value(item, message.list_value.values.add())
        case _:
            raise InvalidInputError(f"a claim of type {type(value).__name__} cannot be sent")


def _read_struct(message: Struct, left: list[int], nesting: int) -> dict[str, Any]:
    return {name: _read_value(value, left, nesting) for name, value in message.fields.items()}


def _read_value(message: Value, left: list[int], nesting: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or nesting > _MAX_NESTING:
        raise EncodingError("claims", "too many, or nested too deeply")
    match message.WhichOneof("kind"):
        case "number_value":
            return _number(message.number_value)
        case "string_value":
            return message.string_value
        case "bool_value":
            return message.bool_value
        case "struct_value":
            return _read_struct(message.struct_value, left, nesting + 1)
        case "list_value":
            return [_read_value(item, left, nesting + 1) for item in message.list_value.values]
        case "null_value":
            return None
        case _:
            raise EncodingError("claims", "a value is missing")


def _number(value: float) -> int | float:
    if not math.isfinite(value):
        raise EncodingError("claims", "a number is not finite")
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


def _bounded(what: str, values: Sequence[Any], most: int = _MAX_ITEMS) -> Iterable[Any]:
    if len(values) > most:
        raise EncodingError(what, f"{len(values)} of them, at most {most} are taken")
    return values


def _checked_oid(text: str) -> str:
    if _OID.fullmatch(text) is None:
        raise EncodingError("OID", f"{text[:64]!a} is not of the form 1.2.3")
    return text


def _check_text(what: str, text: str) -> None:
    if len(text) > _MAX_TEXT or "\0" in text:
        raise EncodingError(what, f"has a NUL, or is over {_MAX_TEXT} characters")
