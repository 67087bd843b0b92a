"""What the server grants this agent: registration entries, and tokens issued for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from spire_hw.selector import Selector
    from spire_hw.spiffeid import SpiffeId, TrustDomain

Selectors = frozenset["Selector"]


@dataclass(frozen=True, slots=True)
class AgentEntry:
    """A registration entry as the agent needs it.

    Attributes:
        created_at: seconds since 1970, as the server said.
        prefetch: whether its SVID is asked for before a workload wants it.
        jwt_jti: tokens carry a unique id and are therefore never cached.
        store_svid: its SVID goes into an outside store and to no workload.
    """

    entry_id: str
    spiffe_id: SpiffeId
    selectors: Selectors
    federates_with: tuple[TrustDomain, ...]
    hint: str
    revision: int
    created_at: int
    prefetch: bool = True
    jwt_jti: bool = False
    store_svid: bool = False


@dataclass(frozen=True, slots=True)
class JwtToken:
    """A JWT-SVID, when it was issued and ends, and the key that signed it; the token is a secret."""

    token: str = field(repr=False)
    issued_at: datetime
    expires_at: datetime
    kid: str
