"""What an UpstreamAuthority answers is believed only when an SVID under it would verify."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError, UnavailableError
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.log import get_logger
from spire_hw.plugin.upstreamauthority import UpstreamX509Ca
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.csr import parse_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid
from spire_hw.x509.name import CA_SUBJECT
from spire_hw_server.ca.upstream import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

DOMAIN, OTHER = TrustDomain("example.org"), TrustDomain("other.example")
HOUR = timedelta(hours=1)


class Root:
    """A root that signs CAs."""

    authority: X509Authority

    @classmethod
    async def make(cls, domain: TrustDomain = DOMAIN, *, life: timedelta = 10 * HOUR) -> Root:
        made = cls()
        signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
        now = SystemClock().now()
        certificate = await issue_ca_certificate(
            None,
            trust_domain=domain,
            not_before=now - 20 * HOUR,
            not_after=now + life,
            signer=signer,
        )
        made.authority = X509Authority(certificate, signer)
        return made

    async def sign(
        self, spki: bytes, domain: TrustDomain = DOMAIN, *, end: timedelta = HOUR
    ) -> bytes:
        now = SystemClock().now()
        return await issue_ca_certificate(
            self.authority,
            trust_domain=domain,
            not_before=now - 15 * HOUR,
            not_after=now + end,
            spki=spki,
        )

    @property
    def trusted(self) -> X509Root:
        return X509Root(self.authority.certificate)


class Plugin:
    """Answers what it is told to."""

    def __init__(self, answer: Callable[[bytes], Any]) -> None:
        self._answer = answer
        self.closed = False

    async def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        assert preferred_ttl == HOUR
        try:
            made = await self._answer(parse_csr(csr).spki)
            for answer in made if isinstance(made, list) else [made]:
                yield answer
        finally:
            self.closed = True


class Bundles:
    """The server's bundle, as far as the upstream room uses it."""

    def __init__(self) -> None:
        self.own = Bundle(DOMAIN)

    async def append(self, bundle: Bundle) -> Bundle:
        self.own = self.own.merged(bundle)
        return self.own

    async def change(self, function: Callable[[Bundle], Bundle]) -> Bundle:
        self.own = function(self.own)
        return self.own


async def subject() -> bytes:
    return CA_SUBJECT


def upstream(plugin: Any, bundles: Bundles | None = None, in_use: set[str] | None = None) -> Any:
    return Upstream(
        plugin,
        "above",
        trust_domain=DOMAIN,
        subject=subject,
        bundles=bundles or Bundles(),  # type: ignore[arg-type]
        in_use=lambda: in_use or set(),
        clock=SystemClock(),
        log=get_logger("ca_manager"),
    )


def signer() -> SoftwareSigner:
    return SoftwareSigner(generate_private_key(KeyType.EC_P256))


@pytest_asyncio.fixture
async def root() -> Root:
    return await Root.make()


@pytest.mark.asyncio
async def test_a_good_answer_through_an_intermediate(root: Root) -> None:
    middle_signer = signer()
    middle = await root.sign(spki_der(middle_signer.public_key), end=5 * HOUR)
    between = X509Authority(middle, middle_signer, (middle,))

    async def answer(spki: bytes) -> UpstreamX509Ca:
        now = SystemClock().now()
        certificate = await issue_ca_certificate(
            between,
            trust_domain=DOMAIN,
            not_before=now - HOUR,
            not_after=now + HOUR,
            spki=spki,
        )
        return UpstreamX509Ca((certificate, middle), (root.trusted,))

    key = signer()
    above = upstream(Plugin(answer))
    minted = await above.mint(key, HOUR)
    assert minted.root_id == root.authority.authority_id
    leaf = await issue_x509_svid(
        X509Authority(minted.certificate, key, minted.chain),
        spki=spki_der(key.public_key),
        spiffe_id=DOMAIN.member("web"),
        not_before=SystemClock().now(),
        not_after=minted.not_after,
    )
    assert leaf
    await above.close()


@pytest.mark.asyncio
async def test_answers_that_cannot_be_used(root: Root) -> None:  # noqa: C901 - one function each
    stranger = await Root.make()
    foreign = await Root.make(OTHER)
    mine = signer()

    async def no_chain(spki: bytes) -> UpstreamX509Ca:
        return UpstreamX509Ca((), (root.trusted,))

    async def no_roots(spki: bytes) -> UpstreamX509Ca:
        return UpstreamX509Ca((await root.sign(spki),), ())

    async def tainted(spki: bytes) -> UpstreamX509Ca:
        roots = (X509Root(root.authority.certificate, tainted=True),)
        return UpstreamX509Ca((await root.sign(spki),), roots)

    async def unrelated(spki: bytes) -> UpstreamX509Ca:
        return UpstreamX509Ca((await root.sign(spki),), (stranger.trusted,))

    async def other_key(spki: bytes) -> UpstreamX509Ca:
        key = spki_der(generate_private_key(KeyType.EC_P256).public_key())
        return UpstreamX509Ca((await root.sign(key),), (root.trusted,))

    async def other_domain(spki: bytes) -> UpstreamX509Ca:
        return UpstreamX509Ca((await foreign.sign(spki, OTHER),), (foreign.trusted,))

    async def expired(spki: bytes) -> UpstreamX509Ca:
        return UpstreamX509Ca((await root.sign(spki, end=-HOUR),), (root.trusted,))

    async def no_ca(spki: bytes) -> UpstreamX509Ca:
        now = SystemClock().now()
        leaf = await issue_x509_svid(
            root.authority,
            spki=spki,
            spiffe_id=DOMAIN.member("web"),
            not_before=now - HOUR,
            not_after=now + HOUR,
        )
        return UpstreamX509Ca((leaf,), (root.trusted,))

    async def nonsense(spki: bytes) -> UpstreamX509Ca:
        return UpstreamX509Ca((b"nonsense",), (root.trusted,))

    async def nothing(spki: bytes) -> list[UpstreamX509Ca]:
        return []

    async def away(spki: bytes) -> UpstreamX509Ca:
        raise UnavailableError("upstreamauthority(above): away")

    for answer, words in {
        no_chain: "there is none in its answer",
        no_roots: "no root",
        tainted: "no root",
        unrelated: "",
        other_key: "is not about the signer's key",
        other_domain: 'is of "other.example"',
        expired: "",
        no_ca: "CA",
        nonsense: "",
        nothing: "it ended without an answer",
        away: "away",
    }.items():
        plugin, bundles = Plugin(answer), Bundles()
        above = upstream(plugin, bundles)
        with pytest.raises(SpireHwError) as caught:
            await above.mint(mine, HOUR)
        assert words in caught.value.message, answer.__name__
        assert caught.value.message.startswith("upstreamauthority(above): ") or answer is away
        assert plugin.closed
        assert bundles.own == Bundle(DOMAIN)
        await above.close()


@pytest.mark.asyncio
async def test_a_tainted_root_that_is_gone_is_taken_out_unless_it_is_in_use(root: Root) -> None:
    old, new = await Root.make(), await Root.make()
    tainted = X509Root(old.authority.certificate, tainted=True)

    async def answer(spki: bytes) -> list[UpstreamX509Ca]:
        chain = (await new.sign(spki),)
        return [
            UpstreamX509Ca(chain, (new.trusted, tainted)),
            UpstreamX509Ca((), (new.trusted, tainted)),
            UpstreamX509Ca((), (new.trusted,)),
        ]

    for in_use, left in ((set(), 1), ({old.authority.authority_id}, 2)):
        bundles = Bundles()
        above = upstream(Plugin(answer), bundles, in_use)
        await above.mint(signer(), HOUR)
        # The stream ends by itself: what follows it has seen all of it then.
        for task in list(above._roots_follower._tasks):
            with suppress(SpireHwError):
                await task
        assert len(bundles.own.x509_authorities) == left
        await above.close()


@pytest.mark.asyncio
async def test_a_chain_nobody_asked_for_is_passed_over(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    async def answer(spki: bytes) -> list[UpstreamX509Ca]:
        good = UpstreamX509Ca((await root.sign(spki),), (root.trusted,))
        return [good, good]

    bundles = Bundles()
    above = upstream(Plugin(answer), bundles)
    await above.mint(signer(), HOUR)
    for task in list(above._roots_follower._tasks):
        await task
    assert "a CA nobody asked for" in capsys.readouterr().out
    await above.close()


@pytest.mark.asyncio
async def test_jwt_keys_are_published_where_that_can_be_done() -> None:
    key = JwtAuthority("kid", spki_der(generate_private_key(KeyType.EC_P256).public_key()))

    class Publisher(Plugin):
        kind: ErrorKind | None = None

        async def publish_jwt_key(
            self, key: JwtAuthority
        ) -> AsyncGenerator[tuple[JwtAuthority, ...], None]:
            if self.kind is not None:
                raise SpireHwError("no", kind=self.kind)
            yield (key,)

    async def unused(spki: bytes) -> Any:
        return SimpleNamespace()

    bundles = Bundles()
    await upstream(Plugin(unused), bundles).publish_jwt_key(key)
    assert bundles.own.jwt_authorities == ()
    plugin = Publisher(unused)
    above = upstream(plugin, bundles)
    plugin.kind = ErrorKind.UNIMPLEMENTED
    await above.publish_jwt_key(key)
    assert bundles.own.jwt_authorities == ()
    plugin.kind = ErrorKind.UNAVAILABLE
    with pytest.raises(SpireHwError):
        await above.publish_jwt_key(key)
    plugin.kind = None
    await above.publish_jwt_key(key)
    assert [k.kid for k in bundles.own.jwt_authorities] == ["kid"]
    await above.close()
