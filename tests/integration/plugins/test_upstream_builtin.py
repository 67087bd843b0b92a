"""The built-in UpstreamAuthorities: CA keys in a token and in a file, above a real server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import aclosing, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import serialization

from spire_hw.clock import SystemClock
from spire_hw.config import hcl
from spire_hw.config.tree import Block
from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.x509.certificate import encode_pem, load_certificate
from spire_hw.x509.csr import build_csr
from spire_hw.x509.issue import issue_ca_certificate
from spire_hw.x509.name import Subject
from spire_hw_plugins import builtin
from spire_hw_sim.hsmca import HsmCa
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.world import World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
KEYS = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }\n'
TD = TrustDomain("example.org")
HOUR = timedelta(hours=1)


@pytest_asyncio.fixture
async def root(tmp_path: Path) -> HsmCa:
    made = HsmCa(tmp_path / "root")
    await made.self_sign()
    return made


@pytest_asyncio.fixture
async def plugins(tmp_path: Path) -> AsyncIterator[Plugins]:
    made = Plugins(tmp_path / "data")
    yield made
    for plugin in made.made:
        await plugin.close()


class Plugins:
    """Makes UpstreamAuthorities from configuration blocks."""

    def __init__(self, data_dir: Path) -> None:
        data_dir.mkdir(mode=0o700)
        self._host = HostInfo(Side.SERVER, TD, data_dir, get_logger("test"), SystemClock())
        self.made: list[Any] = []

    async def start(self, text: str) -> Any:
        block = hcl.parse(text).items[0]
        assert isinstance(block, Block)
        kind, name = block.keys
        assert kind == PluginKind.UPSTREAM_AUTHORITY.value
        (data,) = block.body.items
        assert isinstance(data, Block)
        plugin: Any = builtin.lookup(PluginKind.UPSTREAM_AUTHORITY, name, Side.SERVER)(self._host)
        self.made.append(plugin)
        assert plugin.validate(data.body) == []
        await plugin.configure(data.body)
        return plugin


async def mint(plugin: Any, spiffe_id: SpiffeId | None = TD.id, ttl: timedelta = HOUR) -> Any:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    csr = await build_csr(signer, spiffe_id=spiffe_id)
    async with aclosing(plugin.mint_x509_ca(csr, ttl)) as answers:
        return await anext(answers)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603


def openssl_verifies(roots: Path, chain: list[bytes], folder: Path) -> str:
    """Return what `openssl verify` says of a chain, leaf first."""
    (folder / "leaf.pem").write_bytes(encode_pem(chain[:1]))
    (folder / "above.pem").write_bytes(encode_pem(chain[1:]))
    above, leaf = folder / "above.pem", folder / "leaf.pem"
    done = run("openssl", "verify", "-CAfile", roots, "-untrusted", above, leaf)
    return (done.stdout + done.stderr).strip()


async def test_a_root_in_a_token_signs_the_servers_ca(root: HsmCa, tmp_path: Path) -> None:
    async with World(server_plugins=KEYS + root.plugin()) as world:
        bundle = await world.bundle()
        assert [r.der for r in bundle.x509_authorities] == [root.certificate]
        async with await world.agent() as agent:
            assert agent.identity.is_alive()
            current = agent.identity.current
            assert current is not None
            chain = list(current.chain)
            assert len(chain) == 2
            assert openssl_verifies(root.bundle_file, chain, tmp_path).endswith("leaf.pem: OK")


async def test_an_intermediate_in_a_token_signs_the_servers_ca(root: HsmCa, tmp_path: Path) -> None:
    between = HsmCa(tmp_path / "between", "between")
    await between.sign_under(root, path_length=1)
    async with World(server_plugins=KEYS + between.plugin()) as world:
        bundle = await world.bundle()
        assert [r.der for r in bundle.x509_authorities] == [root.certificate]
        chain = list(world.server.identity.svid.chain)
        assert chain[2] == between.certificate
        assert openssl_verifies(root.bundle_file, chain, tmp_path).endswith("leaf.pem: OK")


async def test_a_token_that_goes_away_is_waited_for(root: HsmCa) -> None:
    async with World(server_plugins=KEYS + root.plugin()) as world:
        before = world.server.manager.x509_slots.active
        root.hsm.remove()
        with pytest.raises(
            SpireHwError, match=r"upstreamauthority\(pkcs11\): .*look at the device"
        ):
            await world.server.manager.prepare_x509()
        # What was signed goes on signing.
        await world.server.identity.renew()
        assert world.server.manager.x509_slots.active == before
        root.hsm.put_back()
        async with asyncio.timeout(60):
            while (waiting := world.server.manager.x509_slots.prepared) is None:
                with suppress(SpireHwError):
                    await world.server.manager.prepare_x509()
        await world.server.manager.activate_x509(waiting.authority_id)


async def test_lifetimes_end_with_the_authority_above(root: HsmCa, plugins: Plugins) -> None:
    await root.self_sign(life=timedelta(minutes=30))
    plugin = await plugins.start(root.plugin())
    made = await mint(plugin, ttl=timedelta(days=3))
    end = load_certificate(made.chain[0]).not_valid_after_utc
    assert end == load_certificate(root.certificate).not_valid_after_utc
    short = await mint(plugin, ttl=timedelta(minutes=5))
    assert load_certificate(short.chain[0]).not_valid_after_utc < end


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        SpiffeId.parse("spiffe://other.org"),
        SpiffeId.parse("spiffe://example.org/web"),
    ],
)
async def test_requests_for_anything_but_the_trust_domains_ca_are_refused(
    root: HsmCa, plugins: Plugins, wrong: SpiffeId | None
) -> None:
    plugin = await plugins.start(root.plugin())
    with pytest.raises(InvalidInputError, match="unable to sign CSR: it is for"):
        await mint(plugin, wrong)
    with pytest.raises(InvalidInputError, match="unable to sign CSR: CSR"):
        await anext(plugin.mint_x509_ca(b"nonsense", HOUR))


async def test_a_renewed_certificate_is_taken_and_a_broken_file_is_not(
    root: HsmCa, plugins: Plugins
) -> None:
    plugin = await plugins.start(root.plugin())
    old = root.certificate
    root.cert_file.write_text("nothing")
    assert (await mint(plugin)).roots[0].der == old
    await root.self_sign(life=timedelta(days=700))
    assert root.certificate != old
    assert (await mint(plugin)).roots[0].der == root.certificate


async def test_what_does_not_fit_is_refused_with_the_remedy(
    root: HsmCa, plugins: Plugins, tmp_path: Path
) -> None:
    other = HsmCa(tmp_path / "other")
    await other.self_sign()
    between = HsmCa(tmp_path / "between", "between")
    await between.sign_under(root, path_length=0)
    elsewhere = "nope"
    cases = {
        root.plugin(key_label="nope"): 'no private key in token .* fits label "nope"',
        root.plugin(key_label="", key_id="02"): "no private key in token .* fits id 02",
        root.plugin(cert_file_path=str(other.cert_file)): "is not the certificate's",
        root.plugin(bundle_file_path=str(other.bundle_file)): "would not be believed: .*correct",
        between.plugin(): 'path length 0 of "CN=between,O=Sim" leaves no room',
        between.plugin(bundle_file_path=""): "bundle_file_path has to name its roots",
        root.plugin(
            cert_file_path=str(tmp_path / "none.pem")
        ): "none.pem cannot be read: No such file",
        root.plugin(token_label=elsewhere): 'token "nope" not present',
        root.plugin(uri="pkcs11:object=root", key_label=""): "",
    }
    for text, words in cases.items():
        if not words:
            await plugins.start(text)
            continue
        with pytest.raises(SpireHwError, match=words):
            await plugins.start(text)


async def test_an_authority_that_has_ended_does_not_sign(root: HsmCa, plugins: Plugins) -> None:
    await root.self_sign(life=timedelta(seconds=-1))
    with pytest.raises(NotReadyError, match=r"ended at .*: have its certificate renewed"):
        await plugins.start(root.plugin())


async def test_a_key_in_a_file_signs_the_servers_ca(tmp_path: Path) -> None:
    key = generate_private_key(KeyType.EC_P256)
    now = SystemClock().now()
    der = await issue_ca_certificate(
        None,
        trust_domain=None,
        not_before=now - HOUR,
        not_after=now + 100 * HOUR,
        signer=SoftwareSigner(key),
        subject_der=Subject(common_name="root").encode(),
    )
    (tmp_path / "ca.pem").write_bytes(encode_pem([der]))
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    (tmp_path / "ca.key").write_bytes(pem)
    block = f"""UpstreamAuthority "disk" {{ plugin_data {{
        cert_file_path = "{tmp_path}/ca.pem"
        key_file_path = "{tmp_path}/ca.key"
    }} }}"""
    async with World(server_plugins=KEYS + block) as world:
        chain = list(world.server.identity.svid.chain)
        assert openssl_verifies(tmp_path / "ca.pem", chain, tmp_path).endswith("leaf.pem: OK")
        (tmp_path / "ca.key").unlink()
        await world.server.manager.prepare_x509()


async def test_it_passes_what_hosts_ask_of_any_plugin(root: HsmCa, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("spire-hw-plugin")
    run(program, "install", tmp_path / "bin")
    data = root.plugin().partition("plugin_data {")[2].strip().removesuffix("} }")
    (tmp_path / "data.hcl").write_text(data)
    options = ("-kind", "UpstreamAuthority", "-data", tmp_path / "data.hcl")
    done = run(program, "check", *options, tmp_path / "bin" / "upstreamauthority-pkcs11")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "has a CA signed" in done.stdout
