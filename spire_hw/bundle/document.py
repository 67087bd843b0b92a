"""Bundles on their way: the SPIFFE document, PEM, and the Workload API's JWT key sets.

Spec: SPIFFE Trust Domain and Bundle section 4; SPIFFE Workload API section 6.2.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Final

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.jose.jwk import jwk_of, parse_jwk
from spire_hw.jose.text import decode_base64, encode_json, parse_json_object
from spire_hw.key import spki_der
from spire_hw.x509 import certificate as certificates

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from spire_hw.spiffeid import TrustDomain

MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
INDENT: Final = 4
_WHAT: Final = "bundle document"
_X509, _JWT = "x509-svid", "jwt-svid"
_MAX_SEQUENCE: Final = (1 << 64) - 1
_MAX_HINT: Final = (1 << 31) - 1
_MAX_KEYS: Final = 10_000


def encode_document(bundle: Bundle, *, indent: int | None = INDENT) -> bytes:
    """Return the SPIFFE bundle document of a bundle.

    Args:
        bundle: taints are not shown in it.
        indent: blanks for each level; None writes it compactly.

    Raises:
        InvalidInputError: an authority that JOSE cannot express, or that does not parse.
    """
    keys: list[dict[str, Any]] = []
    for root in bundle.x509_authorities:
        jwk = jwk_of(certificates.public_key_of(root.certificate), use=_X509)
        keys.append(jwk | {"x5c": [base64.b64encode(root.der).decode("ascii")]})
    keys += [jwk_of(key.public_key, kid=key.kid, use=_JWT) for key in bundle.jwt_authorities]
    document: dict[str, Any] = {"keys": keys}
    if bundle.sequence:
        document["spiffe_sequence"] = bundle.sequence
    if bundle.refresh_hint_s:
        document["spiffe_refresh_hint"] = bundle.refresh_hint_s
    return encode_json(document, indent=indent)


def encode_jwks(bundle: Bundle) -> bytes:
    """Return the Workload API's key set: JWT keys with kid and without use."""
    return encode_json({"keys": [jwk_of(k.public_key, kid=k.kid) for k in bundle.jwt_authorities]})


def parse_document(trust_domain: TrustDomain, data: bytes) -> Bundle:
    """Read a SPIFFE bundle document.

    Keys of unknown type or use and keys that cannot be used are left out one by one, also those
    that share a kid without being the same; a bundle without any key trusts nobody.

    Args:
        trust_domain: whose bundle it is; the document does not say.
        data: UTF-8 JSON, at most 4 MiB.

    Raises:
        EncodingError: not such a document.
    """
    document = _object(data)
    roots: dict[bytes, X509Root] = {}
    keys = []
    for jwk in _keys(document):
        if jwk.get("use") == _X509:
            root = _parse_root(jwk)
            if root is not None:
                roots[root.der] = root
        elif jwk.get("use") == _JWT:
            keys.append(_parse_jwt(jwk))
    return Bundle(
        trust_domain,
        tuple(roots.values()),
        _unambiguous(keys),
        refresh_hint_s=_count(document, "spiffe_refresh_hint", _MAX_HINT),
        sequence=_count(document, "spiffe_sequence", _MAX_SEQUENCE),
    )


def parse_jwks(trust_domain: TrustDomain, data: bytes) -> Bundle:
    """Read a key set of the Workload API into a bundle that has JWT keys only.

    Raises:
        EncodingError: not a key set.
    """
    keys = [_parse_jwt(jwk) for jwk in _keys(_object(data)) if jwk.get("use", _JWT) == _JWT]
    return Bundle(trust_domain, jwt_authorities=_unambiguous(keys))


def encode_pem(bundle: Bundle) -> bytes:
    """Return the X.509 authorities as PEM.

    Raises:
        EncodingError: an authority does not parse.
    """
    return certificates.encode_pem(root.der for root in bundle.x509_authorities)


def parse_pem(trust_domain: TrustDomain, data: bytes) -> Bundle:
    """Read X.509 authorities from PEM.

    Raises:
        EncodingError: no certificate in it, or one that does not parse.
    """
    found = dict.fromkeys(certificates.parse_pem(data))
    return Bundle(trust_domain, tuple(X509Root(der) for der in found))


def _object(data: bytes) -> dict[str, Any]:
    if len(data) > MAX_DOCUMENT_BYTES:
        raise EncodingError(_WHAT, f"is longer than {MAX_DOCUMENT_BYTES} bytes")
    return parse_json_object(data, _WHAT)


def _keys(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    keys = document.get("keys")
    if not isinstance(keys, list):
        raise EncodingError(_WHAT, "has no list of keys")
    if len(keys) > _MAX_KEYS:
        raise EncodingError(_WHAT, f"has more than {_MAX_KEYS} keys")
    return (jwk for jwk in keys if isinstance(jwk, dict))


def _parse_root(jwk: Mapping[str, Any]) -> X509Root | None:
    chain = jwk.get("x5c")
    if not isinstance(chain, list) or len(chain) != 1 or not isinstance(chain[0], str):
        return None
    try:
        root = X509Root(decode_base64(chain[0], "x5c"))
        certified = certificates.public_key_of(root.certificate)
        stated = parse_jwk(jwk)
    except InvalidInputError:
        return None
    return root if spki_der(certified) == spki_der(stated) else None


def _parse_jwt(jwk: Mapping[str, Any]) -> JwtAuthority | None:
    kid = jwk.get("kid")
    if not isinstance(kid, str) or not kid:
        return None
    try:
        return JwtAuthority(kid, spki_der(parse_jwk(jwk)))
    except InvalidInputError:
        return None


def _unambiguous(keys: Iterable[JwtAuthority | None]) -> tuple[JwtAuthority, ...]:
    by_kid: dict[str, set[JwtAuthority]] = {}
    for key in keys:
        if key is not None:
            by_kid.setdefault(key.kid, set()).add(key)
    return tuple(found.pop() for found in by_kid.values() if len(found) == 1)


def _count(document: Mapping[str, Any], name: str, limit: int) -> int:
    value = document.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise EncodingError(_WHAT, f"{name} is not a whole number between 0 and {limit}")
    return value
