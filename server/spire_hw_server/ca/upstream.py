"""The authority above this server's: has our CA signed, and follows what it says about its roots.

What a plugin answers is checked like a stranger's: the CA has to be for our key and our trust
domain, and an SVID issued by it has to verify against the roots that came with it, before it is
used.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.aio.backoff import Backoff
from spire_hw.aio.tasks import Tasks
from spire_hw.bundle.bundle import Bundle, JwtAuthority
from spire_hw.errors import ErrorKind, PluginError, SpireHwError
from spire_hw.plugin.upstreamauthority import JwtKeyPublisher, LocalBundleSource
from spire_hw.x509.csr import build_csr
from spire_hw_server.ca.minted import MintedCa, Roots, check_minted

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from datetime import timedelta

    from spire_hw.clock import Clock
    from spire_hw.key import Signer
    from spire_hw.log import Logger
    from spire_hw.plugin.upstreamauthority import UpstreamAuthority, UpstreamX509Ca
    from spire_hw.spiffeid import TrustDomain
    from spire_hw_server.bundles import Bundles

_ANSWER_S: Final = 60.0
_FIRST_WAIT_S: Final = 5.0
_LONGEST_WAIT_S: Final = 300.0

T = TypeVar("T")
JwtKeys = tuple[JwtAuthority, ...]


class Upstream:
    """One UpstreamAuthority plugin as the CA manager uses it.

    Args:
        plugin: the plugin.
        name: as configured.
        trust_domain: ours.
        subject: gives the DER Name our CA shall have.
        bundles: gets what upstream publishes.
        in_use: ids of the roots our authorities hang from, which are never taken out.
    """

    def __init__(
        self,
        plugin: UpstreamAuthority,
        name: str,
        *,
        trust_domain: TrustDomain,
        subject: Callable[[], Awaitable[bytes]],
        bundles: Bundles,
        in_use: Callable[[], set[str]],
        clock: Clock,
        log: Logger,
    ) -> None:
        self._plugin = plugin
        self._prefix = f"upstreamauthority({name})"
        self._trust_domain = trust_domain
        self._subject = subject
        self._bundles = bundles
        self._in_use = in_use
        self._clock = clock
        self._log = log.bind(plugin_name=name, plugin_type="UpstreamAuthority")
        self._roots_follower = Tasks(self._ended)
        self._keys_follower = Tasks(self._ended)
        self._bundle_follower = Tasks(self._ended)

    def start(self) -> None:
        """Follow what upstream publishes for our trust domain, where it can tell."""
        if isinstance(self._plugin, LocalBundleSource):
            self._bundle_follower.start("upstream bundle", self._follow_bundle(self._plugin))

    async def mint(self, signer: Signer, ttl: timedelta) -> MintedCa:
        """Have a CA certificate signed for a key; its roots are followed from then on.

        Raises:
            SpireHwError: the plugin failed, or what it made cannot be used.
        """
        csr = await build_csr(
            signer, spiffe_id=self._trust_domain.id, subject=await self._subject()
        )
        answers = self._plugin.mint_x509_ca(csr, ttl)
        try:
            first = await self._first(answers)
            minted = await self._checked(first, signer)
        except BaseException:
            await answers.aclose()
            raise
        await self._roots_follower.close()
        self._roots_follower.start("upstream roots", self._follow_roots(answers))
        return minted

    async def publish_jwt_key(self, key: JwtAuthority) -> None:
        """Publish a JWT key upstream, where that can be done; keys known there become ours.

        Raises:
            SpireHwError: the plugin failed.
        """
        if not isinstance(self._plugin, JwtKeyPublisher):
            return
        answers = self._plugin.publish_jwt_key(key)
        try:
            first = await self._first(answers)
        except SpireHwError as e:
            await answers.aclose()
            if e.kind is ErrorKind.UNIMPLEMENTED:
                return
            raise
        except BaseException:
            await answers.aclose()
            raise
        await self._keys_follower.close()
        self._keys_follower.start("upstream JWT keys", self._follow_keys(answers))
        await self._take_jwt_keys(first)

    async def close(self) -> None:
        """Stop following."""
        for tasks in (self._roots_follower, self._keys_follower, self._bundle_follower):
            await tasks.close()

    async def _first(self, answers: AsyncGenerator[T, None]) -> T:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await anext(answers)
        except TimeoutError as e:
            late = SpireHwError(
                f"no answer within {_ANSWER_S:g} s", kind=ErrorKind.DEADLINE_EXCEEDED
            )
            raise PluginError(self._prefix, late) from e
        except PluginError:
            raise
        except SpireHwError as e:
            raise PluginError(self._prefix, e) from e
        except StopAsyncIteration as e:
            raise PluginError(self._prefix, SpireHwError("it ended without an answer")) from e

    async def _checked(self, answer: UpstreamX509Ca, signer: Signer) -> MintedCa:
        try:
            return await check_minted(
                answer.chain, answer.roots, signer, self._trust_domain, self._clock.now()
            )
        except SpireHwError as e:
            unusable = SpireHwError(f"the CA it signed cannot be used: {e.message}")
            raise PluginError(self._prefix, unusable) from e

    async def _follow_roots(self, answers: AsyncGenerator[UpstreamX509Ca, None]) -> None:
        async with aclosing(answers):
            async for answer in answers:
                if answer.chain:
                    self._log.error("The plugin sent a CA nobody asked for, it is passed over")
                await self._take_roots(answer.roots)

    async def _follow_keys(self, answers: AsyncGenerator[JwtKeys, None]) -> None:
        async with aclosing(answers):
            async for keys in answers:
                await self._take_jwt_keys(keys)

    async def _follow_bundle(self, plugin: LocalBundleSource) -> None:
        backoff = Backoff(_FIRST_WAIT_S, _LONGEST_WAIT_S, factor=2.0)
        while True:
            try:
                async with aclosing(plugin.subscribe_to_local_bundle()) as bundles:
                    async for bundle in bundles:
                        backoff.reset()
                        await self._take_roots(bundle.x509_roots)
                        await self._take_jwt_keys(bundle.jwt_authorities)
            except SpireHwError as e:
                if e.kind is ErrorKind.UNIMPLEMENTED:
                    return
                self._log.warning("Upstream bundle is not followed for now", error=e.message)
            await self._clock.sleep(backoff.next_s())

    async def _take_roots(self, roots: Roots) -> None:
        """Take over what upstream says: new roots, tainted ones, and tainted ones that are gone."""
        await self._bundles.append(Bundle(self._trust_domain, x509_authorities=roots))
        named = {root.authority_id for root in roots}
        gone = {
            root.authority_id
            for root in self._bundles.own.x509_authorities
            if root.tainted and root.authority_id not in named
        }
        for authority_id in sorted(gone - self._in_use()):
            await self._bundles.change(partial(Bundle.without_x509, authority_id=authority_id))
        tainted = [root.authority_id for root in roots if root.tainted]
        self._log.info("upstream roots changed", roots=sorted(named), tainted=tainted)

    async def _take_jwt_keys(self, keys: JwtKeys) -> None:
        if keys:
            await self._bundles.append(Bundle(self._trust_domain, jwt_authorities=keys))

    def _ended(self, name: str, error: BaseException) -> None:
        """A stream broke; the next rotation opens another one."""
        self._log.warning("Upstream authority is no longer followed", what=name, error=str(error))
