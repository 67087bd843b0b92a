from __future__ import annotations

import shutil
import tempfile
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from aiohttp import web

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.bundle.document import encode_document
from spire_hw.config.hcl import parse
from spire_hw.errors import NotFoundError, NotReadyError, SpireHwError, UnavailableError
from spire_hw.log import get_logger
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.certificate import encode_pem
from spire_hw_agent.config import build_settings
from spire_hw_agent.storage import Storage
from spire_hw_agent.trust import Trust
from spire_hw_sim.clock import SimClock
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

pytestmark = pytest.mark.asyncio

TD = TrustDomain("example.org")
FIRST = Authority("example.org")
SECOND = Authority("example.org")
PLUGINS = 'plugins { KeyManager "memory" {} NodeAttestor "tpm" {} WorkloadAttestor "unix" {} }'


@pytest_asyncio.fixture
async def home() -> AsyncIterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="trust"))
    yield made
    shutil.rmtree(made)


def trust_in(home: Path, keys: str, clock: SimClock | None = None) -> Trust:
    text = f"""
    agent {{
      trust_domain = "example.org" server_address = "s" server_port = 1
      {keys}
    }}
    {PLUGINS}
    """
    storage = Storage(home / "data")
    settings = build_settings(parse(text))
    return Trust(settings, storage, clock=clock or SimClock(), log=get_logger("test"))


@asynccontextmanager
async def served(home: Path, answer: Callable[[], web.Response]) -> AsyncIterator[str]:
    async def handle(_: web.Request) -> web.Response:
        return answer()

    application = web.Application()
    application.router.add_get("/bundle", handle)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.UnixSite(runner, str(home / "b.sock")).start()
    try:
        yield (
            f'trust_bundle_url = "http://localhost/bundle" '
            f'trust_bundle_unix_socket = "{home}/b.sock" trust_bundle_format = "spiffe"'
        )
    finally:
        await runner.cleanup()


async def test_the_file_is_read_again_until_something_was_learnt(home: Path) -> None:
    file = home / "bundle.pem"
    trust = trust_in(home, f'trust_bundle_path = "{file}"')
    with pytest.raises(NotFoundError, match="does not exist"):
        await trust.for_attestation()
    for authority in (FIRST, SECOND):
        file.write_bytes(encode_pem([authority.der]))
        assert await trust.for_attestation() == Bundle(TD, (X509Root(authority.der),))
    await trust.accept(FIRST.bundle())
    assert await trust.for_attestation() == FIRST.bundle()


@pytest.mark.parametrize("content", [b"", b"garbage", b"x" * (5 << 20)])
async def test_a_file_without_a_bundle(home: Path, content: bytes) -> None:
    (home / "bundle.pem").write_bytes(content)
    with pytest.raises(NotReadyError):
        await trust_in(home, f'trust_bundle_path = "{home}/bundle.pem"').for_attestation()


async def test_a_bundle_over_http(home: Path) -> None:
    document = encode_document(FIRST.bundle())
    async with served(home, lambda: web.Response(body=document)) as keys:
        found = await trust_in(home, keys).for_attestation()
    assert found is not None
    assert found.x509_authorities == FIRST.bundle().x509_authorities
    assert found.jwt_authorities == FIRST.bundle().jwt_authorities


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=500),
        lambda: web.Response(status=302, headers={"Location": "http://localhost/bundle"}),
        lambda: web.Response(body=b"x"),
        lambda: web.Response(body=b" " * (5 << 20)),
    ],
    ids=["error", "redirect", "garbage", "huge"],
)
async def test_a_bad_answer_over_http(home: Path, answer: Callable[[], web.Response]) -> None:
    async with served(home, answer) as keys:
        with pytest.raises(SpireHwError):
            await trust_in(home, keys).for_attestation()


async def test_nobody_at_the_url(home: Path) -> None:
    async with served(home, web.Response) as keys:
        pass
    with pytest.raises(UnavailableError, match="cannot be fetched"):
        await trust_in(home, keys).for_attestation()


async def test_insecure_bootstrap_lasts_until_something_was_learnt(home: Path) -> None:
    trust = trust_in(home, "insecure_bootstrap = true")
    assert await trust.for_attestation() is None
    await trust.accept(FIRST.bundle())
    assert await trust.for_attestation() == FIRST.bundle()


async def test_bundles_that_are_no_use_are_not_accepted(home: Path) -> None:
    trust = trust_in(home, "insecure_bootstrap = true")
    await trust.accept(FIRST.bundle())
    for wrong in (Bundle(TD), Bundle(TD, (X509Root(b"x"),)), Authority("else.example").bundle()):
        with pytest.raises(SpireHwError):
            await trust.accept(wrong)
    assert trust.bundle == FIRST.bundle()


@pytest.mark.parametrize(("mode", "due"), [("never", False), ("auto", True), ("always", True)])
async def test_a_mismatch_has_to_last(home: Path, mode: str, due: bool) -> None:
    clock = SimClock()
    (home / "bundle.pem").write_bytes(encode_pem([SECOND.der]))
    keys = (
        f'trust_bundle_path = "{home}/bundle.pem" rebootstrap_mode = "{mode}" '
        'rebootstrap_delay = "10m"'
    )
    trust = trust_in(home, keys, clock)
    await trust.accept(FIRST.bundle())
    trust.distrust()
    await clock.advance(timedelta(minutes=9))
    trust.distrust()
    assert not trust.is_rebootstrap_due()
    await clock.advance(timedelta(minutes=1))
    assert trust.is_rebootstrap_due() == due
    expected = SECOND if due else FIRST
    assert await trust.for_attestation() == expected.bundle()
    assert trust.bundle == FIRST.bundle()  # kept until an attestation succeeded
    trust.trust_again()
    assert not trust.is_rebootstrap_due()


async def test_tainted_authorities_are_named(home: Path) -> None:
    trust = trust_in(home, "insecure_bootstrap = true")
    tainted = X509Root(FIRST.der, tainted=True)
    await trust.accept(Bundle(TD, (tainted, X509Root(SECOND.der))))
    assert trust.tainted() == {tainted.authority_id}
