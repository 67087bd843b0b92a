"""SVIDStore: puts the SVIDs of workloads that cannot reach an agent into an outside store.

The contract is upstream's `spire.plugin.agent.svidstore.v1.SVIDStore`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from spire_hw.spiffeid import SpiffeId, TrustDomain


@dataclass(frozen=True, slots=True)
class StoredX509Svid:
    """An X509-SVID with its key, as it goes into a store.

    Attributes:
        spiffe_id: whose it is.
        chain: DER, leaf first.
        private_key: PKCS#8 DER; a secret.
        bundle: DER roots of the own trust domain.
        expires_at: end of the leaf's validity.
        federated_bundles: DER roots of other trust domains.
    """

    spiffe_id: SpiffeId
    chain: tuple[bytes, ...]
    private_key: bytes = field(repr=False)
    bundle: tuple[bytes, ...]
    expires_at: datetime
    federated_bundles: Mapping[TrustDomain, tuple[bytes, ...]]


class SvidStore(Protocol):
    """What an SVIDStore plugin implements.

    `metadata` are the values of the entry's selectors; they say where in the store.
    """

    async def put_x509_svid(self, svid: StoredX509Svid, metadata: Sequence[str]) -> None:
        """Store an SVID, over the one that was there.

        Raises:
            InvalidInputError: metadata that name no place.
            UnavailableError: the store is away.
        """
        ...

    async def delete_x509_svid(self, metadata: Sequence[str]) -> None:
        """Take an SVID out of the store; one that is not there is no error.

        Raises:
            InvalidInputError: metadata that name no place.
            UnavailableError: the store is away.
        """
        ...
