"""One kind of authority: how it is made, published and known again; its slots and their keys.

There are two kinds, X.509 and JWT. When an authority is made and when it signs is decided by
`ca.succession`; what is taken over from an earlier run by `ca.restore`.
"""

from __future__ import annotations

import secrets
import string
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, Generic, TypeVar

from typing_extensions import override

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.key import spki_der
from spire_hw.x509.certificate import load_certificate, public_key_of
from spire_hw_server.ca.journal import JwtRecord, X509Record
from spire_hw_server.ca.slots import Record, SlotName, Slots, Status

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime, timedelta

    from spire_hw.clock import Clock
    from spire_hw.key import KeyType
    from spire_hw.plugin.keymanager import ManagedSigner
    from spire_hw.spiffeid import TrustDomain
    from spire_hw.telemetry.metrics import Name
    from spire_hw_server.ca.authority import Issuer
    from spire_hw_server.ca.minted import MintedCa, Roots
    from spire_hw_server.ca.upstream import Upstream

_KID_LENGTH: Final = 32
_KID_LETTERS: Final = string.ascii_letters + string.digits

R = TypeVar("R", bound=Record)


class Line(ABC, Generic[R]):
    """The authorities of one kind.

    Args:
        key_type: type of new keys.
        trust_domain: ours.
        ttl: life of an authority.
        issuer: is given the authority that is active, and signs a CA of its own.
        upstream: the authority above; None where none is configured.

    Attributes:
        name: what messages call the kind.
        key_prefix: what its key ids in the KeyManager begin with; the slot's name follows.
        prepare_metric: upstream's name for making one.
        activate_metric: likewise for the first use of one.
        key_type: type of new keys.
        slots: its authorities.
        signers: the keys of the authorities in the slots, by authority id.
        requested: fingerprint of the key in the free slot for which a certificate was asked by hand.
    """

    name: ClassVar[str]
    key_prefix: ClassVar[str]
    prepare_metric: ClassVar[Name]
    activate_metric: ClassVar[Name]

    def __init__(
        self,
        key_type: KeyType,
        *,
        trust_domain: TrustDomain,
        ttl: timedelta,
        issuer: Issuer,
        upstream: Upstream | None,
        clock: Clock,
    ) -> None:
        self.key_type = key_type
        self._trust_domain = trust_domain
        self._ttl = ttl
        self._issuer = issuer
        self._upstream = upstream
        self._clock = clock
        self.slots: Slots[R] = Slots()
        self.signers: dict[str, ManagedSigner] = {}
        self.requested = ""

    @property
    def makes_none(self) -> bool:
        """Tell whether the next authority is not made here, but signed by hand."""
        return False

    def key_id(self, slot: SlotName) -> str:
        """Return the id of a slot's key in the KeyManager."""
        return self.key_prefix + slot.value

    def holds(self, record: R, listed: Mapping[str, ManagedSigner]) -> bool:
        """Tell whether the KeyManager lists the very key of a record."""
        signer = listed.get(self.key_id(record.slot))
        return signer is not None and spki_der(signer.public_key) == self.public_key(record)

    def old(self, authority_id: str) -> R:
        """Return the predecessor of the active authority, which has to be the one that is meant.

        Raises:
            InvalidInputError: it is another one, the active one or unknown.
        """
        if not authority_id:
            raise InvalidInputError("no authority ID provided")
        active = self.slots.active
        if active is not None and active.authority_id == authority_id:
            raise InvalidInputError("the current authority cannot be tainted or revoked")
        old = self.slots.old
        if old is None or old.authority_id != authority_id:
            raise InvalidInputError(f"authority {authority_id} is not the old one")
        return old

    def misfit(self, record: R) -> str | None:
        """Return why an authority is not what the configuration asks for now, None when it is."""
        return None

    def is_by_hand(self, record: R) -> bool:
        """Tell whether the successor of an authority is signed by hand too."""
        return False

    def check_makes(self) -> None:
        """Refuse to have the next authority made here when that is not how it is done.

        Raises:
            NotReadyError: says what has to be done instead.
        """
        return

    @abstractmethod
    async def make(self, signer: ManagedSigner, slot: SlotName) -> R:
        """Make an authority for a new key; it is not published yet.

        Raises:
            SpireHwError: the signer, a CredentialComposer or the UpstreamAuthority failed.
        """

    @abstractmethod
    def publication(self, record: R) -> Bundle:
        """Return what verifiers have to know of an authority that was just made."""

    @abstractmethod
    def is_published(self, record: R, bundle: Bundle) -> bool:
        """Tell whether the trust bundle still has an authority, or the root it hangs from."""

    @abstractmethod
    def adopt(self, record: R, signer: ManagedSigner) -> None:
        """Let an authority sign from now on."""

    @abstractmethod
    def public_key(self, record: R) -> bytes:
        """Return the DER SubjectPublicKeyInfo of an authority."""


class X509Line(Line[X509Record]):
    """The X.509 authorities: self-signed, or signed by the authority above."""

    name = "X.509"
    key_prefix = "x509-CA-"
    prepare_metric = ("ca", "manager", "x509_ca", "prepare")
    activate_metric = ("ca", "manager", "x509_ca", "activate")

    def __init__(
        self,
        key_type: KeyType,
        *,
        trust_domain: TrustDomain,
        ttl: timedelta,
        issuer: Issuer,
        upstream: Upstream | None,
        clock: Clock,
    ) -> None:
        super().__init__(
            key_type,
            trust_domain=trust_domain,
            ttl=ttl,
            issuer=issuer,
            upstream=upstream,
            clock=clock,
        )
        self._minted_roots: dict[str, Roots] = {}

    @property
    @override
    def makes_none(self) -> bool:
        """Tell whether the root above the active authority is kept offline."""
        active = self.slots.active
        return active is not None and self.is_by_hand(active)

    @override
    def is_by_hand(self, record: X509Record) -> bool:
        """Tell whether the root above an authority is kept offline."""
        return record.offline and self._upstream is None

    @override
    def check_makes(self) -> None:
        """Refuse to leave a root that is kept offline, which nobody has asked for."""
        active = self.slots.active
        if active is None or not self.makes_none:
            return
        raise NotReadyError(
            f"X.509 authority {active.authority_id} was signed under an offline root and ends at "
            f"{active.not_after.isoformat()}: make a request for the next one (spire-hw-server ca csr), "
            "have it signed and import it (ca import), or go on with a self-signed one "
            "(localauthority x509 prepare)"
        )

    @override
    async def make(self, signer: ManagedSigner, slot: SlotName) -> X509Record:
        """Make a CA certificate, or have one signed above."""
        now = self._clock.now().replace(microsecond=0)
        if self._upstream is not None:
            return await self._mint(self._upstream, signer, slot, now)
        made = await self._issuer.self_signed(signer, now, self._ttl)
        return X509Record(
            slot=slot,
            authority_id=made.authority_id,
            issued_at=now,
            not_after=made.not_after,
            status=Status.PREPARED,
            certificate=made.certificate,
        )

    async def _mint(
        self, upstream: Upstream, signer: ManagedSigner, slot: SlotName, now: datetime
    ) -> X509Record:
        minted = await upstream.mint(signer, self._ttl)
        self._minted_roots[minted.authority_id] = minted.roots
        return _record_of(minted, slot, now, offline=False)

    def take(self, minted: MintedCa, slot: SlotName) -> X509Record:
        """Return the record of a CA that was signed by hand."""
        self._minted_roots[minted.authority_id] = minted.roots
        now = self._clock.now().replace(microsecond=0)
        return _record_of(minted, slot, now, offline=True)

    @override
    def publication(self, record: X509Record) -> Bundle:
        """Return the upstream roots that came with a CA, or a self-signed CA itself."""
        roots = self._minted_roots.pop(record.authority_id, (X509Root(record.certificate),))
        return Bundle(self._trust_domain, x509_authorities=roots)

    @override
    def is_published(self, record: X509Record, bundle: Bundle) -> bool:
        """Tell whether the bundle has a self-signed CA, or the root of another one, untainted."""
        if record.upstream_authority_id:
            return any(
                root.authority_id == record.upstream_authority_id and not root.tainted
                for root in bundle.x509_authorities
            )
        return any(root.der == record.certificate for root in bundle.x509_authorities)

    @override
    def misfit(self, record: X509Record) -> str | None:
        """Return why a CA is not what the configuration asks for: who signed it."""
        if self.is_by_hand(record):
            return None
        if bool(record.upstream_chain) == (self._upstream is not None):
            return None
        if self._upstream is not None:
            return "it is self-signed, and an UpstreamAuthority is configured now"
        return "an UpstreamAuthority signed it, and none is configured now"

    @override
    def adopt(self, record: X509Record, signer: ManagedSigner) -> None:
        """Let a CA sign from now on."""
        self._issuer.use_x509(record.certificate, record.upstream_chain, signer)

    @override
    def public_key(self, record: X509Record) -> bytes:
        return spki_der(public_key_of(load_certificate(record.certificate)))


def _record_of(minted: MintedCa, slot: SlotName, now: datetime, *, offline: bool) -> X509Record:
    return X509Record(
        slot=slot,
        authority_id=minted.authority_id,
        issued_at=now,
        not_after=minted.not_after,
        status=Status.PREPARED,
        certificate=minted.certificate,
        upstream_chain=minted.chain,
        upstream_authority_id=minted.root_id,
        offline=offline,
    )


class JwtLine(Line[JwtRecord]):
    """The JWT keys; published by the authority above as well, where it does that."""

    name = "JWT"
    key_prefix = "JWT-Signer-"
    prepare_metric = ("ca", "manager", "jwt_key", "prepare")
    activate_metric = ("manager", "jwt_key", "activate")

    @override
    async def make(self, signer: ManagedSigner, slot: SlotName) -> JwtRecord:
        """Give a key an id, and publish it upstream."""
        now = self._clock.now().replace(microsecond=0)
        record = JwtRecord(
            slot=slot,
            authority_id="".join(secrets.choice(_KID_LETTERS) for _ in range(_KID_LENGTH)),
            issued_at=now,
            not_after=now + self._ttl,
            status=Status.PREPARED,
            public_key=spki_der(signer.public_key),
        )
        if self._upstream is not None:
            await self._upstream.publish_jwt_key(_published(record))
        return record

    @override
    def publication(self, record: JwtRecord) -> Bundle:
        """Return the key as verifiers see it."""
        return Bundle(self._trust_domain, jwt_authorities=(_published(record),))

    @override
    def is_published(self, record: JwtRecord, bundle: Bundle) -> bool:
        """Tell whether the bundle has a key of that id."""
        return bundle.jwt_key(record.authority_id) is not None

    @override
    def adopt(self, record: JwtRecord, signer: ManagedSigner) -> None:
        """Let a key sign from now on."""
        self._issuer.use_jwt(record.authority_id, record.not_after, signer)

    @override
    def public_key(self, record: JwtRecord) -> bytes:
        return record.public_key


def _published(record: JwtRecord) -> JwtAuthority:
    return JwtAuthority(record.authority_id, record.public_key, record.not_after)
