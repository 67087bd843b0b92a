"""What every trust domain's verifiers trust: the server's own bundle, watched, and foreign ones."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from spire_hw.aio.watch import Watch
from spire_hw.bundle.bundle import Bundle
from spire_hw.errors import NotFoundError
from spire_hw.spiffeid import TrustDomain
from spire_hw_server.datastore.follow import Follower
from spire_hw_server.datastore.records import ChangeKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Change


class Bundles:
    """Bundles of a running server, kept in step with the store.

    Args:
        datastore: where they are.
        trust_domain: the server's own.
        clock: time.
        log: where trouble is reported.
        poll_s: seconds between looks at what other servers changed.
        full_reload_s: seconds between complete reloads.

    Attributes:
        watch: the own bundle, without authorities before there is one.
        all_watch: every bundle by trust domain, the own one among them once there is one.
    """

    def __init__(
        self,
        datastore: Datastore,
        *,
        trust_domain: TrustDomain,
        clock: Clock,
        log: Logger,
        poll_s: float = 5.0,
        full_reload_s: float = 86400.0,
    ) -> None:
        self._datastore = datastore
        self._trust_domain = trust_domain
        self.watch: Watch[Bundle] = Watch(Bundle(trust_domain))
        self.all_watch: Watch[Mapping[TrustDomain, Bundle]] = Watch(MappingProxyType({}))
        self._follower = Follower(
            datastore,
            self,
            name="bundles",
            clock=clock,
            log=log,
            poll_s=poll_s,
            full_reload_s=full_reload_s,
        )

    @property
    def own(self) -> Bundle:
        """Return the own bundle as it is now."""
        return self.watch.value

    @property
    def all(self) -> Mapping[TrustDomain, Bundle]:
        """Return every bundle as it is now; the mapping never changes."""
        return self.all_watch.value

    async def start(self) -> None:
        """Load everything and follow the store.

        Raises:
            SpireHwError: the store cannot be read.
        """
        await self._follower.start()

    async def refresh(self) -> None:
        """Catch up with everything committed before the call.

        Raises:
            SpireHwError: the store cannot be read.
        """
        await self._follower.refresh()

    async def close(self) -> None:
        """Stop following."""
        await self._follower.close()

    async def get(self, trust_domain: TrustDomain) -> Bundle:
        """Return a bundle, asking the store for one that is not known yet.

        Raises:
            NotFoundError: there is none.
        """
        known = self.all.get(trust_domain)
        return known if known is not None else await self._datastore.get_bundle(trust_domain)

    async def append(self, bundle: Bundle) -> Bundle:
        """Merge authorities into the own bundle.

        Returns:
            The own bundle as it is stored and watched now.

        Raises:
            InvalidInputError: another trust domain's authorities, or a key id that is taken.
        """
        # Merging refuses other trust domains before anything is stored.
        Bundle(self._trust_domain).merged(bundle)
        await self._datastore.append_bundle(bundle)
        return await self._caught_up()

    async def change(self, function: Callable[[Bundle], Bundle]) -> Bundle:
        """Change the own bundle in one transaction: taint, revoke.

        Args:
            function: pure; may be called in another thread and more than once.

        Returns:
            The own bundle as it is stored and watched now.

        Raises:
            NotFoundError: there is no own bundle yet.
            SpireHwError: what the function raised.
        """
        await self._datastore.update_bundle(self._trust_domain, function)
        return await self._caught_up()

    async def prune(self, expired_before: datetime) -> bool:
        """Drop own authorities that expired before a moment; tell whether there were any.

        Raises:
            NotReadyError: nothing usable would be left.
        """
        try:
            pruned = await self._datastore.prune_bundle(self._trust_domain, expired_before)
        except NotFoundError:
            return False
        await self._caught_up()
        return pruned

    async def _caught_up(self) -> Bundle:
        await self._follower.refresh()
        return self.own

    async def load(self) -> None:
        """Read everything anew; called by the follower."""
        self._set({b.trust_domain: b for b in await self._datastore.list_bundles()})

    async def apply(self, changes: Sequence[Change]) -> None:
        """Read what changed; called by the follower."""
        names = {c.key for c in changes if c.kind is ChangeKind.BUNDLE}
        if not names:
            return
        bundles = dict(self.all)
        for trust_domain in (TrustDomain.parse(name) for name in sorted(names)):
            try:
                bundles[trust_domain] = await self._datastore.get_bundle(trust_domain)
            except NotFoundError:
                bundles.pop(trust_domain, None)
        self._set(bundles)

    def _set(self, bundles: dict[TrustDomain, Bundle]) -> None:
        if bundles != self.all:
            self.all_watch.set(MappingProxyType(bundles))
        own = bundles.get(self._trust_domain, Bundle(self._trust_domain))
        if own != self.own:
            self.watch.set(own)
