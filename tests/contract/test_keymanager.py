"""One suite for every KeyManager, on both sides; the checks are upstream's shared suite and more."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import inspect
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.errors import (
    ConfigFault,
    ErrorKind,
    InvalidInputError,
    PluginError,
    SpireHwError,
)
from spire_hw.goplugin.external import ExternalPlugin
from spire_hw.goplugin.place import Place
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    PrivateKey,
    SignOptions,
    fingerprint,
    generate_private_key,
    spki_der,
    verify_digest,
)
from spire_hw.log import get_logger
from spire_hw.plugin.custody import Custody
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.keymanager import KeyEvidenceSource, Keys, ManagedSigner
from spire_hw.plugin.section import PluginConfig
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.cli.install import launcher
from spire_hw_plugins.keymanager import disk, memory, pkcs11
from spire_hw_plugins.keymanager.remote import manager as remote
from spire_hw_sim.liarsigner import LiarSigner, write_client
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

_ALL = frozenset(KeyType)
_CUSTODY = {
    "pkcs11": Custody.HSM_REPORTED,
    "tpm": Custody.TPM_CERTIFIED,
    "disk": Custody.SOFTWARE,
    "memory": Custody.SOFTWARE,
    "remote": Custody.SIGNER_STATED,
}
# These run as processes of their own too.
_ALSO_OUTSIDE = {("disk", Side.SERVER), ("remote", Side.SERVER), ("tpm", Side.AGENT)}

# Everything at once that a TPM can do for its keys.
_GUARDED = (
    ("session", "salted"),
    ("persistent_handles", "0x81008100"),
    ("policy_pcrs", {"sha256": [0, 7]}),
)


@dataclass(frozen=True)
class Target:
    name: str
    side: Side
    builder: Callable[[HostInfo], Any]
    types: frozenset[KeyType] = _ALL
    persists: bool = True
    external: bool = False
    settings: tuple[tuple[str, object], ...] = ()
    mode: str = ""

    @property
    def id(self) -> str:
        guarded = f"-{self.mode}" if self.mode else "-guarded" if self.settings else ""
        return f"{self.name}-{self.side.value}{guarded}" + ("-external" if self.external else "")


class External:
    """One of our key managers as a host has it that started it as an external plugin."""

    def __init__(self, target: Target, host: HostInfo, directory: Path) -> None:
        program = directory / "plugin"
        program.write_bytes(launcher(PluginKind.KEY_MANAGER, target.name))
        program.chmod(0o755)
        config = PluginConfig(
            PluginKind.KEY_MANAGER,
            target.name,
            cmd=str(program),
            args=("-side", target.side.value, "-dataDir", str(host.data_dir)),
            checksum=hashlib.sha256(program.read_bytes()).hexdigest(),
        )
        self._place = Place.open()
        self._plugin = ExternalPlugin(config, host, HostServices(), self._place, environ=os.environ)
        self._opened = self._closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plugin.contract, name)

    async def validate(self, config: Body) -> list[ConfigFault]:
        await self._open()
        return [ConfigFault(0, note) for note in await self._plugin.validate(config.to_hcl())]

    async def configure(self, config: Body) -> None:
        await self._open()
        await self._plugin.configure(config.to_hcl())

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await self._plugin.close()
            self._place.close()

    async def _open(self) -> None:
        if not self._opened:
            self._opened = True
            await self._plugin.open()


def _targets() -> list[Any]:
    rows = []
    guarded = []
    for side in Side:
        # RSA-4096 takes seconds to make: once per implementation is enough.
        types = _ALL if side is Side.SERVER else _ALL - {KeyType.RSA_4096}
        rows += [
            (Target("memory", side, memory.build, types, persists=False), ()),
            (Target("disk", side, disk.build, types), ()),
            (Target("pkcs11", side, pkcs11.build, types), (pytest.mark.hsm,)),
        ]
        if side is Side.SERVER:
            few = types - {KeyType.RSA_4096}
            rows.append((Target("remote", side, remote.build, few), ()))
            for mode in ("spread", "same_keys"):
                several = Target("pkcs11", side, pkcs11.build, few, mode=mode)
                rows.append((several, (pytest.mark.hsm,)))
        if importlib.util.find_spec("spire_hw_plugins.keymanager.tpm") is not None:
            tpm = importlib.import_module("spire_hw_plugins.keymanager.tpm")
            target = Target("tpm", side, tpm.build, _ALL - {KeyType.RSA_4096})
            rows.append((target, (pytest.mark.tpm,)))
            if side is Side.AGENT:
                guarded.append((replace(target, settings=_GUARDED), (pytest.mark.tpm,)))
    rows += [(replace(t, external=True), m) for t, m in rows if (t.name, t.side) in _ALSO_OUTSIDE]
    rows += guarded
    return [pytest.param(target, id=target.id, marks=marks) for target, marks in rows]


class Bench:
    """Builds instances of one implementation that share whatever is behind them."""

    def __init__(self, target: Target, tmp_path: Path, stack: AsyncExitStack) -> None:
        self.target = target
        self.data_dir = tmp_path / "data"
        self.data_dir.mkdir(mode=0o700)
        self._stack = stack
        self._directory = tmp_path
        self._config: dict[str, object] = {}

    async def prepare(self) -> None:
        """Make what is behind the implementation."""
        if self.target.name == "remote":
            self._config = await self._signer(self._directory)
        else:
            self._config = self._make_config(self._directory)

    async def _signer(self, tmp_path: Path) -> dict[str, object]:
        # Not the real one: its policy lets nobody replace a key that has just signed.
        signer = LiarSigner()
        await signer.start()
        self._stack.push_async_callback(signer.stop)
        return write_client(signer.authority, tmp_path / "client").config(signer.address)

    def _make_config(self, tmp_path: Path) -> dict[str, object]:
        match self.target.name, self.target.side:
            case "disk", Side.SERVER:
                return {"keys_path": str(self.data_dir / "keys.json")}
            case "disk", _:
                return {"directory": str(self.data_dir)}
            case "pkcs11", _ if self.target.mode:
                return _two_tokens(tmp_path, self.target.mode)
            case "pkcs11", _:
                return _softhsm(tmp_path)
            case "tpm", _:
                swtpm = self._stack.enter_context(Swtpm(tmp_path / "swtpm"))
                return {"tcti": swtpm.tcti, **dict(self.target.settings)}
            case _:
                return {}

    def host(self) -> HostInfo:
        return HostInfo(
            side=self.target.side,
            trust_domain=TrustDomain.parse("example.org"),
            data_dir=self.data_dir,
            log=get_logger("test"),
            clock=SystemClock(),
        )

    def config(self) -> Body:
        return Body.from_dict(self._config)

    def build(self) -> Any:
        if self.target.external:
            made = External(self.target, self.host(), self._directory)
            self._stack.push_async_callback(made.close)
            return made
        return self.target.builder(self.host())

    async def start(self) -> Any:
        plugin = self.build()
        self._stack.push_async_callback(plugin.close)
        await plugin.configure(self.config())
        return plugin


def _softhsm(tmp_path: Path) -> dict[str, object]:
    if SoftHsm.find_module() is None:
        pytest.skip("SoftHSM is not installed")
    hsm = SoftHsm(tmp_path / "hsm")
    hsm.init_token("spire", pin="4321")
    pin = tmp_path / "pin"
    pin.write_text("4321\n")
    pin.chmod(0o600)
    return {
        "module_path": hsm.module,
        "token_label": "spire",
        "pin_file": str(pin),
        "key_identifier_value": "server-1",
        "environment": hsm.environment,
    }


def _two_tokens(tmp_path: Path, mode: str) -> dict[str, object]:
    """Return a configuration of two tokens; the keys of the first are not copied to the second."""
    tokens: dict[str, object] = {}
    common: dict[str, object] = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        one = _softhsm(tmp_path / name)
        common = {"key_identifier_value": one.pop("key_identifier_value")}
        tokens[name] = one
    return {**common, "mode": mode, "token": tokens}


@pytest_asyncio.fixture(params=_targets())
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        made = Bench(request.param, tmp_path, stack)
        await made.prepare()
        yield made


@pytest_asyncio.fixture
async def plugin(bench: Bench) -> Any:
    return await bench.start()


@pytest.fixture
def keys(bench: Bench, plugin: Any) -> Keys:
    return Keys(plugin, bench.target.name)


def options_for(key_type: KeyType) -> list[SignOptions]:
    plain = [SignOptions(h) for h in HashAlgorithm]
    if key_type in {KeyType.EC_P256, KeyType.EC_P384}:
        return plain
    return plain + [SignOptions(h, pss=True) for h in HashAlgorithm]


@cache
def _template_key(key_type: KeyType) -> PrivateKey:
    small = {KeyType.RSA_4096: KeyType.RSA_2048}
    return generate_private_key(small.get(key_type, key_type))


async def self_signed(signer: ManagedSigner, options: SignOptions) -> x509.Certificate:
    """Sign a certificate as the server does: to-be-signed bytes by hand, the digest by the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "contract")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(signer.public_key)
        .serial_number(7)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
    )
    pss = padding.PSS(padding.MGF1(options.hash.instance), options.hash.digest_size)
    template = builder.sign(
        _template_key(signer.info.key_type),
        options.hash.instance,  # type: ignore[arg-type]
        rsa_padding=pss if options.pss else None,
    )
    tbs = template.tbs_certificate_bytes
    outer = template.public_bytes(Encoding.DER)
    algorithm = _after_tbs(outer, tbs)
    signature = await signer.sign(options.hash.digest(tbs), options)
    return x509.load_der_x509_certificate(
        _sequence(tbs + algorithm + _tlv(0x03, b"\0" + signature))
    )


def _after_tbs(outer: bytes, tbs: bytes) -> bytes:
    start = outer.index(tbs) + len(tbs)
    length = outer[start + 1]
    return outer[start : start + 2 + length]


def _tlv(tag: int, content: bytes) -> bytes:
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8)
    return bytes((tag, 0x80 | len(size))) + size + content


def _sequence(content: bytes) -> bytes:
    return _tlv(0x30, content)


async def check_key(signer: ManagedSigner, key_id: str, key_type: KeyType) -> None:
    """K1 to K4 of the reference."""
    assert signer.info.key_id == key_id
    assert signer.info.key_type is key_type
    public_key = signer.public_key
    assert signer.info.fingerprint == fingerprint(spki_der(public_key))
    if key_type in {KeyType.EC_P256, KeyType.EC_P384}:
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        wanted = "secp256r1" if key_type is KeyType.EC_P256 else "secp384r1"
        assert public_key.curve.name == wanted
    else:
        assert isinstance(public_key, rsa.RSAPublicKey)
        assert public_key.key_size == (2048 if key_type is KeyType.RSA_2048 else 4096)
    for options in options_for(key_type):
        certificate = await self_signed(signer, options)
        certificate.verify_directly_issued_by(certificate)


def digest(text: str = "x") -> bytes:
    return hashlib.sha256(text.encode()).digest()


SHA256 = SignOptions(HashAlgorithm.SHA256)


@pytest.mark.asyncio
async def test_generates_gets_and_lists_every_type(bench: Bench, keys: Keys) -> None:
    assert await keys.list() == []
    for key_type in sorted(bench.target.types, key=lambda t: t.value):
        made = await keys.generate(key_type.config_name, key_type)
        await check_key(made, key_type.config_name, key_type)
        await check_key(await keys.get(key_type.config_name), key_type.config_name, key_type)
    listed = await keys.list()
    assert {s.info.key_id for s in listed} == {t.config_name for t in bench.target.types}
    for signer in listed:
        await check_key(signer, signer.info.key_id, signer.info.key_type)


@pytest.mark.asyncio
async def test_refuses_types_it_does_not_support(bench: Bench, keys: Keys) -> None:
    for key_type in _ALL - bench.target.types:
        if bench.target.name != "tpm":
            continue
        with pytest.raises(SpireHwError):
            await keys.generate("big", key_type)
        assert await keys.list() == []


@pytest.mark.asyncio
async def test_empty_key_id_is_refused_everywhere(plugin: Any, keys: Keys) -> None:
    wanted = f"keymanager({keys.name}): key id is required"
    for call in (keys.generate("", KeyType.EC_P256), keys.get("")):
        with pytest.raises(PluginError) as caught:
            await call
        assert caught.value.message == wanted
        assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    with pytest.raises(InvalidInputError, match="key id is required"):
        await plugin.sign_data("", digest(), SHA256)


@pytest.mark.asyncio
async def test_unknown_key_is_not_found(plugin: Any, keys: Keys) -> None:
    with pytest.raises(PluginError) as caught:
        await keys.get("nope")
    assert caught.value.message == f'keymanager({keys.name}): key "nope" not found'
    assert caught.value.kind is ErrorKind.NOT_FOUND
    with pytest.raises(SpireHwError) as signing:
        await plugin.sign_data("nope", digest(), SHA256)
    assert signing.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.asyncio
async def test_holder_of_a_replaced_key_is_told(plugin: Any, keys: Keys) -> None:
    old = await keys.generate("id", KeyType.EC_P256)
    await check_key(old, "id", KeyType.EC_P256)
    new = await keys.generate("id", KeyType.RSA_2048)
    await check_key(new, "id", KeyType.RSA_2048)
    with pytest.raises(PluginError, match="does not match") as caught:
        await old.sign(digest(), SHA256)
    assert caught.value.kind is ErrorKind.INTERNAL
    assert [s.info.fingerprint for s in await keys.list()] == [new.info.fingerprint]
    made = await plugin.sign_data("id", digest(), SHA256)
    assert made.fingerprint == new.info.fingerprint


@pytest.mark.asyncio
async def test_old_key_signs_until_the_new_one_is_returned(plugin: Any, keys: Keys) -> None:
    old = await keys.generate("id", KeyType.EC_P256)
    generating = asyncio.get_running_loop().create_future()

    async def regenerate() -> None:
        generating.set_result(None)
        await keys.generate("id", KeyType.EC_P256)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(regenerate())
        await generating
        seen = set()
        while not task.done():
            made = await plugin.sign_data("id", digest(), SHA256)
            seen.add(made.fingerprint)
            await asyncio.sleep(0)
    new = await keys.get("id")
    assert new.info.fingerprint != old.info.fingerprint
    assert seen <= {old.info.fingerprint, new.info.fingerprint}
    assert old.info.fingerprint in seen


@pytest.mark.asyncio
async def test_digest_of_another_length_is_refused(plugin: Any) -> None:
    await plugin.generate_key("id", KeyType.EC_P256)
    for length in (0, 31, 33, 48, 200):
        with pytest.raises(InvalidInputError):
            await plugin.sign_data("id", bytes(length), SHA256)


@pytest.mark.asyncio
async def test_pss_does_not_fit_an_ec_key(plugin: Any) -> None:
    await plugin.generate_key("id", KeyType.EC_P256)
    with pytest.raises(InvalidInputError):
        await plugin.sign_data("id", digest(), SignOptions(HashAlgorithm.SHA256, pss=True))


@pytest.mark.asyncio
async def test_pss_salt_markers_mean_the_hash_length(plugin: Any) -> None:
    info = await plugin.generate_key("id", KeyType.RSA_2048)
    for salt in (-1, 0):
        options = SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=salt)
        made = await plugin.sign_data("id", digest(), options)
        assert len(made.signature) == 256
        exact = SignOptions(HashAlgorithm.SHA256, pss=True, salt_length=32)
        verify_digest(info.public_key, digest(), made.signature, exact)


@pytest.mark.asyncio
async def test_ids_with_special_characters_stay_apart(keys: Keys) -> None:
    ids = [
        "bundle-acme-example.org",
        "bundle-acme-example.org+rsa",
        "bundle-acme-acme_account+key",
        "JWT-Signer-A",
        "JWT-Signer-B",
    ]
    made = {key_id: await keys.generate(key_id, KeyType.EC_P256) for key_id in ids}
    listed = {s.info.key_id: s.info.fingerprint for s in await keys.list()}
    assert listed == {key_id: s.info.fingerprint for key_id, s in made.items()}


@pytest.mark.asyncio
async def test_keys_survive_a_restart_oldest_first(bench: Bench) -> None:
    if not bench.target.persists:
        pytest.skip("nothing is kept by design")
    first = await bench.start()
    for key_id in ("b", "a", "long-key-id.with+odd-characters", "b"):
        await first.generate_key(key_id, KeyType.EC_P256)
    before = [(k.key_id, k.fingerprint) for k in await first.get_public_keys()]
    await first.close()
    second = await bench.start()
    after = [(k.key_id, k.fingerprint) for k in await second.get_public_keys()]
    assert sorted(after) == sorted(before)
    if bench.target.mode != "spread":  # the order is each device's own
        assert after == before
        assert [key_id for key_id, _ in after] == ["a", "long-key-id.with+odd-characters", "b"]
    for key_id, mark in after:
        assert (await second.sign_data(key_id, digest(), SHA256)).fingerprint == mark


@pytest.mark.asyncio
async def test_nothing_works_before_configure(bench: Bench) -> None:
    plugin = bench.build()
    with pytest.raises(SpireHwError) as caught:
        await plugin.generate_key("id", KeyType.EC_P256)
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert "not configured" in caught.value.message
    with pytest.raises(SpireHwError) as listing:
        await plugin.get_public_keys()
    assert listing.value.kind is ErrorKind.FAILED_PRECONDITION


@pytest.mark.asyncio
async def test_unknown_settings_are_refused(bench: Bench) -> None:
    plugin = bench.build()
    wrong = Body.from_dict({**bench._config, "no_such_thing": "1"})
    assert any("no_such_thing" in fault.message for fault in await faults_of(plugin, wrong))
    with pytest.raises(InvalidInputError):
        await plugin.configure(wrong)
    assert await faults_of(plugin, bench.config()) == []


async def faults_of(plugin: Any, config: Body) -> list[ConfigFault]:
    found = plugin.validate(config)
    return await found if inspect.isawaitable(found) else found


@pytest.mark.asyncio
async def test_many_signatures_at_once_are_all_right(plugin: Any) -> None:
    one = await plugin.generate_key("one", KeyType.EC_P256)
    two = await plugin.generate_key("two", KeyType.RSA_2048)

    async def sign(number: int) -> None:
        info = two if number % 5 == 0 else one
        hashed = digest(str(number))
        made = await plugin.sign_data(info.key_id, hashed, SHA256)
        verify_digest(info.public_key, hashed, made.signature, SHA256)

    async with asyncio.TaskGroup() as group:
        for number in range(60):
            group.create_task(sign(number))


@pytest.mark.asyncio
async def test_two_generations_of_one_id_take_turns(plugin: Any) -> None:
    made = await asyncio.gather(
        plugin.generate_key("id", KeyType.EC_P256), plugin.generate_key("id", KeyType.EC_P256)
    )
    assert made[0].fingerprint != made[1].fingerprint
    (left,) = await plugin.get_public_keys()
    assert left.fingerprint in {m.fingerprint for m in made}


@pytest.mark.asyncio
async def test_a_key_manager_tells_in_whose_custody_keys_are(bench: Bench, plugin: Any) -> None:
    if bench.target.name not in _CUSTODY or bench.target.external:
        assert not isinstance(plugin, KeyEvidenceSource)
        return
    await plugin.generate_key("id", KeyType.EC_P256)
    evidence = await plugin.key_evidence("id")
    assert evidence.custody is _CUSTODY[bench.target.name]
    assert evidence.location
    assert evidence.attributes
    with pytest.raises(SpireHwError) as caught:
        await plugin.key_evidence("nope")
    assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.asyncio
async def test_configure_again_keeps_the_keys(bench: Bench, plugin: Any) -> None:
    made = await plugin.generate_key("id", KeyType.EC_P256)
    await plugin.configure(bench.config())
    assert [k.fingerprint for k in await plugin.get_public_keys()] == [made.fingerprint]
    await plugin.generate_key("id", KeyType.EC_P256)
