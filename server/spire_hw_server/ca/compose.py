"""What CredentialComposer plugins make of the things the server is about to sign.

They run in the order of the configuration, each on what the one before made. SPIFFE IDs and the
claims that say for whom and for how long a token is good are not theirs to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from spire_hw.errors import InvalidInputError, PluginError, SpireHwError
from spire_hw.key import parse_spki
from spire_hw.plugin.credentialcomposer import (
    DistinguishedName,
    JwtSvidAttributes,
    X509CaAttributes,
    X509SvidAttributes,
)
from spire_hw.x509 import der
from spire_hw.x509.extension import WRITTEN, Extension
from spire_hw.x509.name import decode_name, encode_name

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from spire_hw.plugin.credentialcomposer import CredentialComposer
    from spire_hw.spiffeid import SpiffeId

A = TypeVar("A", X509CaAttributes, X509SvidAttributes, JwtSvidAttributes)

_POLICIES: Final = "2.5.29.32"
# In the order in which upstream writes them.
_LISTS: Final = {
    "country": "2.5.4.6",
    "organization": "2.5.4.10",
    "organizational_unit": "2.5.4.11",
    "locality": "2.5.4.7",
    "province": "2.5.4.8",
    "street_address": "2.5.4.9",
    "postal_code": "2.5.4.17",
}
_SINGLES: Final = {"common_name": "2.5.4.3", "serial_number": "2.5.4.5"}
_FIXED_CLAIMS: Final = ("sub", "aud", "iat")


@dataclass(frozen=True, slots=True)
class Amended:
    """What goes into a certificate besides what the server decides.

    Attributes:
        subject: DER Name.
        dns_names: DNS SANs.
        extensions: beyond those the server writes.
    """

    subject: bytes
    dns_names: tuple[str, ...] = ()
    extensions: tuple[Extension, ...] = ()


class Composers:
    """The composers of one server, by name; false when there are none."""

    def __init__(self, composers: Sequence[tuple[str, CredentialComposer]] = ()) -> None:
        self._composers = tuple(composers)

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self._composers)

    async def ca(self, subject: bytes) -> Amended:
        """Amend a CA certificate of this server.

        Raises:
            SpireHwError: a composer failed, or wants what cannot be.
        """
        before = X509CaAttributes(read_subject(subject))
        after = await self._run(before, lambda c, a: c.compose_server_x509_ca(a))
        extensions = after.extra_extensions
        if after.policy_identifiers:
            extensions = (*extensions, _policies(after.policy_identifiers))
        _check_extensions(extensions)
        return Amended(_subject(subject, before.subject, after.subject), (), extensions)

    async def server_svid(self, subject: bytes) -> Amended:
        """Amend this server's own SVID; errors as in `ca`."""
        return await self._svid(subject, (), lambda c, a: c.compose_server_x509_svid(a))

    async def agent_svid(self, spiffe_id: SpiffeId, spki: bytes, subject: bytes) -> Amended:
        """Amend an agent's SVID; errors as in `ca`."""
        key = parse_spki(spki)
        return await self._svid(
            subject, (), lambda c, a: c.compose_agent_x509_svid(spiffe_id, key, a)
        )

    async def workload_svid(
        self, spiffe_id: SpiffeId, spki: bytes, subject: bytes, dns_names: tuple[str, ...]
    ) -> Amended:
        """Amend a workload's SVID; errors as in `ca`."""
        key = parse_spki(spki)
        return await self._svid(
            subject, dns_names, lambda c, a: c.compose_workload_x509_svid(spiffe_id, key, a)
        )

    async def jwt_svid(self, spiffe_id: SpiffeId, claims: dict[str, Any]) -> dict[str, Any]:
        """Amend the claims of a JWT-SVID; errors as in `ca`."""
        before = JwtSvidAttributes(claims)
        after = await self._run(before, lambda c, a: c.compose_workload_jwt_svid(spiffe_id, a))
        made = dict(after.claims)
        for name in _FIXED_CLAIMS:
            if made.get(name) != claims[name]:
                raise InvalidInputError(f'a CredentialComposer wants to change the claim "{name}"')
        end = made.get("exp")
        if not isinstance(end, int) or not claims["iat"] < end <= claims["exp"]:
            raise InvalidInputError('a CredentialComposer made a claim "exp" that cannot be')
        return made

    async def _svid(
        self,
        subject: bytes,
        dns_names: tuple[str, ...],
        compose: Callable[
            [CredentialComposer, X509SvidAttributes], Awaitable[X509SvidAttributes | None]
        ],
    ) -> Amended:
        before = X509SvidAttributes(read_subject(subject), dns_names)
        after = await self._run(before, compose)
        _check_extensions(after.extra_extensions)
        return Amended(
            _subject(subject, before.subject, after.subject),
            after.dns_names,
            after.extra_extensions,
        )

    async def _run(
        self, attributes: A, compose: Callable[[CredentialComposer, A], Awaitable[A | None]]
    ) -> A:
        for name, composer in self._composers:
            try:
                made = await compose(composer, attributes)
            except SpireHwError as e:
                raise PluginError(f"credentialcomposer({name})", e) from e
            attributes = attributes if made is None else made
        return attributes


def read_subject(name: bytes) -> DistinguishedName:
    """Return a DER Name in words.

    Raises:
        EncodingError: not a DER Name.
    """
    by_oid = {dotted: field for field, dotted in (_LISTS | _SINGLES).items()}
    lists: dict[str, list[str]] = {}
    extra: list[tuple[str, str]] = []
    for dotted, text in decode_name(name):
        field = by_oid.get(dotted)
        if field is None or (field in _SINGLES and field in lists):
            extra.append((dotted, text))
        else:
            lists.setdefault(field, []).append(text)
    values: dict[str, Any] = {
        field: texts[0] if field in _SINGLES else tuple(texts) for field, texts in lists.items()
    }
    return DistinguishedName(**values, extra_names=tuple(extra))


def write_subject(name: DistinguishedName) -> bytes:
    """Return a subject as DER Name.

    Raises:
        InvalidInputError: an attribute is empty or too long.
    """
    attributes = [(dotted, text) for f, dotted in _LISTS.items() for text in getattr(name, f)]
    attributes += [(dotted, getattr(name, f)) for f, dotted in _SINGLES.items() if getattr(name, f)]
    return encode_name([*attributes, *name.extra_names])


def _subject(given: bytes, before: DistinguishedName, after: DistinguishedName) -> bytes:
    """Return the name as it was given when nothing of it was changed."""
    return given if after == before else write_subject(after)


def _policies(identifiers: Sequence[str]) -> Extension:
    return Extension(
        _POLICIES, der.sequence(*(der.sequence(der.oid(dotted)) for dotted in identifiers))
    )


def _check_extensions(extensions: Sequence[Extension]) -> None:
    oids = [extension.oid for extension in extensions]
    if len(set(oids)) != len(oids) or WRITTEN.intersection(oids):
        raise InvalidInputError(
            "a CredentialComposer adds an extension twice or one that the server writes"
        )
