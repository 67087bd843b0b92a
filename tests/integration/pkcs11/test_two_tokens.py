"""Two real tokens behind one key manager: the loss of one at every moment, and its return.

A token is lost when its directory is renamed, as if the device had been unplugged.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Block, Body
from spire_hw.errors import ConfigError, ErrorKind, LimitError, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import KeyFallback, KeyHealth
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_sim.pkcs11faults import Fault, Faults
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
PIN = "4321"


class Rig:
    """Two stores with a token each, and key managers over both."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.hsm = {name: SoftHsm(folder / name) for name in ("one", "two")}
        for name, hsm in self.hsm.items():
            hsm.init_token(name, pin=PIN)
        self.labels = {name: name for name in self.hsm}
        self.more: dict[str, dict[str, str]] = {}
        self.imports: dict[str, Block] = {}
        self.pin = folder / "pin"
        self.pin.touch(mode=0o600)
        self.pin.write_text(PIN)

    def token(self, name: str) -> Body:
        hsm = self.hsm[name]
        body = Body.from_dict(
            {
                "module_path": hsm.module,
                "token_label": self.labels[name],
                "pin_file": str(self.pin),
                "environment": {**hsm.environment, **self.more.get(name, {})},
            }
        )
        more = (self.imports[name],) if name in self.imports else ()
        return Body((*body.items, *more))

    def config(self, mode: str, names: tuple[str, ...] = ("one", "two"), **more: Any) -> Body:
        common = {
            "mode": mode,
            "key_identifier_value": "server-1",
            "start_timeout": "6s",
            "sign_timeout": "5s",
            "lost_after": "0s",
            "probe_interval": "1s",
            **more,
        }
        tokens = tuple(Block(("token", name), self.token(name), 1) for name in names)
        return Body((*Body.from_dict(common).items, *tokens))

    def build(self) -> pkcs11.Pkcs11KeyManager:
        data_dir = self.folder / "data"
        data_dir.mkdir(mode=0o700, exist_ok=True)
        made = pkcs11.build(
            HostInfo(
                side=Side.SERVER,
                trust_domain=TrustDomain.parse("example.org"),
                data_dir=data_dir,
                log=get_logger("rig"),
                clock=SystemClock(),
            )
        )
        self.stack.push_async_callback(made.close)
        return made

    async def start(self, mode: str, **more: Any) -> pkcs11.Pkcs11KeyManager:
        made = self.build()
        await made.configure(self.config(mode, **more))
        return made

    def clone(self, stage: SoftHsm | None = None) -> None:
        """Make the second token a copy of the first or another, as devices with cloning do."""
        (source,) = (stage or self.hsm["one"]).token_dir.iterdir()
        target = self.hsm["two"].token_dir / source.name
        target.mkdir(mode=0o700, exist_ok=True)
        # SoftHSM looks at the counter `generation` last, to learn what has changed.
        for file in sorted(source.iterdir(), key=lambda f: f.name == "generation"):
            shutil.copy(file, target / file.name)


@pytest.fixture
def pair(rig: Rig) -> Rig:
    """Return a rig whose second token is a clone of the first, still empty one."""
    (old,) = rig.hsm["two"].token_dir.iterdir()
    shutil.rmtree(old)
    rig.labels["two"] = "one"
    rig.clone()
    return rig


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        yield Rig(tmp_path, stack)


async def meddle(hsm: SoftHsm, statements: str, *, label: str) -> None:
    """Run statements over python-pkcs11 in another process, logged in at a token."""
    opened = (
        "import sys, pkcs11\n"
        "from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass\n"
        "from pkcs11.util.ec import encode_named_curve_parameters\n"
        "token = pkcs11.lib(sys.argv[1]).get_token(token_label=sys.argv[3])\n"
        "session = token.open(rw=True, user_pin=sys.argv[2])\n"
    )
    await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", f"{opened}{statements}session.close()\n", hsm.module, PIN, label],
        env={**os.environ, **hsm.environment},
        check=True,
    )


def digest(text: str = "x") -> bytes:
    return hashlib.sha256(text.encode()).digest()


async def signs(manager: pkcs11.Pkcs11KeyManager, key_id: str) -> str:
    """Have a key sign, verify that, and return the fingerprint."""
    made = await manager.sign_data(key_id, digest(), SHA256)
    info = await manager.get_public_key(key_id)
    verify_digest(info.public_key, digest(), made.signature, SHA256)
    return made.fingerprint


async def eventually(works: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds; device errors on the way do not count."""
    async with asyncio.timeout(60):
        while True:
            with suppress(SpireHwError):
                if await works():
                    return
            await asyncio.sleep(0.05)


def holders(manager: pkcs11.Pkcs11KeyManager) -> dict[str, tuple[str, ...]]:
    assert manager._cluster is not None
    return {key_id: key.holders for key_id, key in manager._cluster._table().items()}


async def test_new_keys_go_to_the_token_that_does_not_sign(rig: Rig) -> None:
    manager = await rig.start("spread")
    for key_id in ("x509-CA-A", "x509-CA-B", "x509-CA-A", "JWT-Signer-A", "JWT-Signer-B"):
        await manager.generate_key(key_id, KeyType.EC_P256)
    where = holders(manager)
    assert {where["x509-CA-A"], where["x509-CA-B"]} == {("one",), ("two",)}
    assert {where["JWT-Signer-A"], where["JWT-Signer-B"]} == {("one",), ("two",)}
    for key_id in where:
        await signs(manager, key_id)
    assert isinstance(manager, KeyFallback)
    assert manager.stranded_keys() == {}
    assert manager.key_health().health is KeyHealth.GOOD


async def test_a_lost_token_loses_its_own_keys_only(rig: Rig) -> None:
    manager = await rig.start("spread")
    await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    await manager.generate_key("x509-CA-B", KeyType.EC_P256)
    assert holders(manager) == {"x509-CA-A": ("one",), "x509-CA-B": ("two",)}
    before = {k.key_id: k.fingerprint for k in await manager.get_public_keys()}
    rig.hsm["one"].remove()
    await eventually(lambda: fails(manager, "x509-CA-A"))
    assert await signs(manager, "x509-CA-B") == before["x509-CA-B"]
    # It is known and away, not lost: nobody may take the list for the truth about it.
    assert {k.key_id: k.fingerprint for k in await manager.get_public_keys()} == before
    assert set(manager.stranded_keys()) == {"x509-CA-A"}
    assert manager.key_health().health is KeyHealth.DEGRADED
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    assert holders(manager)["x509-CA-A"] == ("two",)
    assert manager.stranded_keys() == {}
    rig.hsm["one"].put_back()
    await eventually(lambda: is_good(manager))
    # What came back with the token does not count any more, and is destroyed there.
    assert await signs(manager, "x509-CA-A") == made.fingerprint
    await eventually(lambda: gone(rig, manager, "one", "x509-CA-A"))


async def fails_with(call: Awaitable[Any], words: str) -> bool:
    """Tell whether a call fails because of the device, which has to be told in these words."""
    try:
        await call
    except TokenError as e:
        return words in e.message and e.kind in {
            ErrorKind.UNAVAILABLE,
            ErrorKind.DEADLINE_EXCEEDED,
        }
    return False


def fails(manager: pkcs11.Pkcs11KeyManager, key_id: str) -> Awaitable[bool]:
    words = f'key "{key_id}" is on token one only, which cannot be used now'
    return fails_with(manager.sign_data(key_id, digest(), SHA256), words)


async def is_good(manager: pkcs11.Pkcs11KeyManager) -> bool:
    return manager.key_health().health is KeyHealth.GOOD


async def gone(rig: Rig, manager: pkcs11.Pkcs11KeyManager, name: str, key_id: str) -> bool:
    assert manager._cluster is not None
    return key_id not in manager._cluster._members[name].keys


async def test_a_token_that_is_away_at_start_is_known_by_its_keys(rig: Rig) -> None:
    first = await rig.start("spread")
    await first.generate_key("x509-CA-A", KeyType.EC_P256)
    await first.generate_key("x509-CA-B", KeyType.EC_P256)
    before = {k.key_id: k.fingerprint for k in await first.get_public_keys()}
    await first.close()
    rig.hsm["one"].remove()
    manager = await rig.start("spread")
    assert {k.key_id: k.fingerprint for k in await manager.get_public_keys()} == before
    assert set(manager.stranded_keys()) == {"x509-CA-A"}
    assert await fails(manager, "x509-CA-A")
    assert await signs(manager, "x509-CA-B") == before["x509-CA-B"]
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    await manager.close()
    # The token comes back while nobody looks: the younger key counts, wherever it is.
    rig.hsm["one"].put_back()
    again = await rig.start("spread")
    assert (await again.get_public_key("x509-CA-A")).fingerprint == made.fingerprint
    assert await signs(again, "x509-CA-A") == made.fingerprint
    assert holders(again) == {"x509-CA-A": ("two",), "x509-CA-B": ("two",)}


async def test_no_token_at_start_is_an_error_and_no_empty_list(rig: Rig) -> None:
    first = await rig.start("spread")
    await first.generate_key("x509-CA-A", KeyType.EC_P256)
    await first.close()
    for hsm in rig.hsm.values():
        hsm.remove()
    manager = rig.build()
    with pytest.raises(TokenError, match="no token of several can be opened") as caught:
        await manager.configure(rig.config("spread"))
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with pytest.raises(SpireHwError, match="not configured"):
        await manager.get_public_keys()


async def test_both_lost_while_running_and_back(rig: Rig) -> None:
    manager = await rig.start("spread")
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    await manager.generate_key("x509-CA-B", KeyType.EC_P256)
    for hsm in rig.hsm.values():
        hsm.remove()

    async def lists() -> bool:
        await manager.get_public_keys()
        return False

    await eventually(lambda: fails_with(lists(), "no token can be used"))
    with pytest.raises(TokenError, match="no token can be used") as caught:
        await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    # Nothing could be made anywhere else: nothing is stranded, all is to be waited for.
    assert manager.stranded_keys() == {}
    assert manager.key_health().health is KeyHealth.DOWN
    for hsm in rig.hsm.values():
        hsm.put_back()
    await eventually(lambda: is_good(manager))
    assert await signs(manager, "x509-CA-A") == made.fingerprint


async def test_a_token_lost_during_generation_leaves_the_work_to_the_other(rig: Rig) -> None:
    manager = await rig.start("spread")
    await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    await manager.generate_key("x509-CA-B", KeyType.EC_P256)
    # The next CA-A belongs on token one, which leaves in the middle of it.
    async with asyncio.TaskGroup() as group:
        generating = group.create_task(manager.generate_key("x509-CA-A", KeyType.RSA_4096))
        await asyncio.sleep(0)
        rig.hsm["one"].remove()
    made = generating.result()
    assert holders(manager)["x509-CA-A"] == ("two",)
    rig.hsm["one"].put_back()
    await eventually(lambda: is_good(manager))
    assert await signs(manager, "x509-CA-A") == made.fingerprint
    assert holders(manager)["x509-CA-A"] == ("two",)


async def test_a_token_never_seen_has_to_be_there_once(rig: Rig) -> None:
    rig.hsm["two"].remove()
    manager = rig.build()
    with pytest.raises(TokenError, match=r'token "two": .* never open here'):
        await manager.configure(rig.config("spread"))


async def test_a_token_joins_another_and_leaves_again(rig: Rig) -> None:
    alone = rig.build()
    single = Body(
        (
            *rig.token("one").items,
            *Body.from_dict({"key_identifier_value": "server-1", "start_timeout": "6s"}).items,
        )
    )
    await alone.configure(single)
    old = await alone.generate_key("x509-CA-A", KeyType.EC_P256)
    await alone.close()
    both = await rig.start("spread")
    assert await signs(both, "x509-CA-A") == old.fingerprint
    new = await both.generate_key("x509-CA-B", KeyType.EC_P256)
    assert holders(both) == {"x509-CA-A": ("one",), "x509-CA-B": ("two",)}
    for _ in range(2):
        await both.generate_key("x509-CA-A", KeyType.EC_P256)
    await both.close()
    # Known by its note although it is away at the very first start with both.
    rig.hsm["one"].remove()
    left = await rig.start("spread")
    assert await signs(left, "x509-CA-B") == new.fingerprint


async def test_the_same_keys_on_each_fail_over_and_come_back(pair: Rig) -> None:
    manager = await pair.start("same_keys")
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    assert holders(manager) == {"x509-CA-A": ("one",)}
    health = manager.key_health()
    assert health.reason == "hsm.single_copy"
    assert "is on 1 of 2 tokens, two lacks it: copy it" in health.message
    pair.clone()
    await eventually(lambda: has_both(manager))
    assert manager.key_health().health is KeyHealth.GOOD
    pair.hsm["one"].remove()

    async def steady() -> None:
        for number in range(50):
            hashed = digest(str(number))
            signature = await manager.sign_data("x509-CA-A", hashed, SHA256)
            verify_digest(made.public_key, hashed, signature.signature, SHA256)

    # Not one call fails while the first token goes: each has time left for the second.
    await asyncio.gather(*(steady() for _ in range(4)))
    await eventually(lambda: is_degraded(manager))
    assert manager.stranded_keys() == {}
    pair.hsm["one"].put_back()
    await eventually(lambda: is_good(manager))
    pair.hsm["two"].remove()
    await steady()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("C_Sign", sleep_s=3600.0),
        Fault("C_Sign", returns=0x30),
        Fault("C_Sign", signature="flipped"),
        Fault("C_Sign", crash=signal.SIGSEGV),
    ],
    ids=["hangs", "fails", "lies", "crashes"],
)
async def test_a_call_that_one_token_does_not_serve_goes_on_to_the_other(
    pair: Rig, fault: Fault
) -> None:
    faults = Faults(pair.folder / "faults", pair.hsm["one"].module)
    pair.more["one"] = faults.environment()
    manager = await pair.start("same_keys", sign_timeout="2s")
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.clone()
    await eventually(lambda: has_both(manager))
    faults.set(fault)
    async with asyncio.timeout(30):  # what a caller waits at most
        assert await signs(manager, "x509-CA-A") == made.fingerprint
    assert await is_degraded(manager)
    assert await signs(manager, "x509-CA-A") == made.fingerprint
    faults.clear()
    await eventually(lambda: is_good(manager))
    assert await signs(manager, "x509-CA-A") == made.fingerprint


async def test_what_finds_no_room_at_a_slow_token_goes_on_to_its_copy(pair: Rig) -> None:
    faults = Faults(pair.folder / "faults", pair.hsm["one"].module)
    pair.more["one"] = faults.environment()
    manager = await pair.start("same_keys", queue=16)
    made = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.clone()
    await eventually(lambda: has_both(manager))
    faults.set(Fault("C_Sign", sleep_s=0.05))
    before = faults.calls("C_Sign")
    prints = await asyncio.gather(*(signs(manager, "x509-CA-A") for _ in range(30)))
    assert set(prints) == {made.fingerprint}
    assert 16 <= faults.calls("C_Sign") - before < 30
    # That is no fault of the slow one. What finds no room at either is refused for that.
    assert await is_good(manager)
    results = await asyncio.gather(
        *(signs(manager, "x509-CA-A") for _ in range(200)), return_exceptions=True
    )
    refused = [result for result in results if not isinstance(result, str)]
    assert refused
    for error in refused:
        assert isinstance(error, LimitError)
        assert "queue full (16)" in error.message


async def has_both(manager: pkcs11.Pkcs11KeyManager) -> bool:
    return holders(manager)["x509-CA-A"] == ("one", "two")


async def is_degraded(manager: pkcs11.Pkcs11KeyManager) -> bool:
    return manager.key_health().health is KeyHealth.DEGRADED


async def test_the_same_keys_at_a_start_without_the_first(pair: Rig) -> None:
    first = await pair.start("same_keys")
    made = await first.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.clone()
    await eventually(lambda: has_both(first))
    await first.close()
    pair.hsm["one"].remove()
    manager = await pair.start("same_keys")
    assert await signs(manager, "x509-CA-A") == made.fingerprint
    new = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.hsm["one"].put_back()
    await eventually(lambda: back(manager, "one"))
    assert await signs(manager, "x509-CA-A") == new.fingerprint


async def back(manager: pkcs11.Pkcs11KeyManager, name: str) -> bool:
    assert manager._cluster is not None
    member = manager._cluster._members[name]
    return member.problem is None and member.opened is not None


async def test_single_copies_can_be_forbidden(pair: Rig) -> None:
    manager = await pair.start("same_keys", allow_single_copy=False)
    with pytest.raises(TokenError, match="would be on one token of 2 only"):
        await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    assert await manager.get_public_keys() == []


async def test_replaced_keys_are_kept_and_taken_back_over_tokens(rig: Rig) -> None:
    manager = await rig.start("spread", retain_replaced="1h")
    old = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    await manager.generate_key("x509-CA-B", KeyType.EC_P256)
    rig.hsm["one"].remove()
    await eventually(lambda: fails(manager, "x509-CA-A"))
    await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    rig.hsm["one"].put_back()
    await eventually(lambda: is_kept(manager, old.fingerprint))
    (kept,) = [k for k in await manager.retained_keys() if k.info.fingerprint == old.fingerprint]
    assert (await manager.restore_key("x509-CA-A", kept.generation)).fingerprint == old.fingerprint
    assert await signs(manager, "x509-CA-A") == old.fingerprint
    assert holders(manager)["x509-CA-A"] == ("one",)


async def test_what_is_taken_back_is_so_on_every_token(pair: Rig) -> None:
    manager = await pair.start("same_keys", retain_replaced="1h")
    old = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.clone()
    await eventually(lambda: has_both(manager))
    new = await manager.generate_key("x509-CA-A", KeyType.EC_P256)

    async def keeps_both() -> bool:
        kept = [k.info.fingerprint for k in await manager.retained_keys()]
        return kept == [old.fingerprint] * 2

    await eventually(keeps_both)
    assert (await manager.restore_key("x509-CA-A", 1)).fingerprint == old.fingerprint
    assert await has_both(manager)
    assert manager.key_health().health is KeyHealth.GOOD
    assert [k.info.fingerprint for k in await manager.retained_keys()] == [new.fingerprint]
    pair.hsm["one"].remove()
    await eventually(lambda: is_degraded(manager))
    assert await signs(manager, "x509-CA-A") == old.fingerprint


async def test_a_copy_that_is_unfit_does_not_keep_the_others_back(pair: Rig) -> None:
    manager = await pair.start("same_keys")
    for key_id in ("x509-CA-A", "x509-CA-B"):
        await manager.generate_key(key_id, KeyType.EC_P256)
    # What arrives on the second token: of two copies the first may not sign any more.
    stage = SoftHsm(pair.folder / "stage")
    (source,) = pair.hsm["one"].token_dir.iterdir()
    shutil.copytree(source, stage.token_dir / source.name)
    owner = Owner("example.org", "server-1")
    label = owner.key_label("x509-CA-A", 1)
    spoil = (
        f"wanted = {{Attribute.CLASS: ObjectClass.PRIVATE_KEY, Attribute.LABEL: {label!r}}}\n"
        "(key,) = session.get_objects(wanted)\n"
        "key[Attribute.SIGN] = False\n"
    )
    await meddle(stage, spoil, label="one")
    pair.clone(stage)

    async def has_second() -> bool:
        return holders(manager)["x509-CA-B"] == ("one", "two")

    await eventually(has_second)
    assert holders(manager)["x509-CA-A"] == ("one",)
    await signs(manager, "x509-CA-A")


async def test_fault_46_a_token_that_fails_is_opened_anew_seldom(pair: Rig) -> None:
    faults = Faults(pair.folder / "faults", pair.hsm["one"].module)
    pair.more["one"] = faults.environment()
    manager = await pair.start("same_keys", probe_interval="60s")
    await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.clone()
    await eventually(lambda: has_both(manager))
    logins = faults.calls("C_Login")
    faults.set(Fault("C_Sign", returns=0x30))
    loop = asyncio.get_running_loop()
    start = loop.time()
    while loop.time() - start < 16:  # three looks at the tokens
        await signs(manager, "x509-CA-A")
        await asyncio.sleep(0.1)
    # Each of two workers once.
    assert faults.calls("C_Login") - logins <= 2
    assert await is_degraded(manager)


async def test_a_key_made_elsewhere_is_generated_on_no_token(rig: Rig) -> None:
    make = (
        "curve = {Attribute.EC_PARAMS: encode_named_curve_parameters('secp256r1')}\n"
        "session.create_domain_parameters(KeyType.EC, curve, local=True).generate_keypair(\n"
        "    store=True, label='root 2026', id=b'9',\n"
        "    capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,\n"
        "    private_template={Attribute.SIGN_RECOVER: False})\n"
    )
    await meddle(rig.hsm["two"], make, label="two")
    rig.imports["two"] = Block(("import", "x509-CA-A"), Body.from_dict({"label": "root 2026"}), 1)
    manager = await rig.start("spread")
    made = await manager.get_public_key("x509-CA-A")
    with pytest.raises(TokenError, match=r"existing key .* never replaced") as caught:
        await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    assert caught.value.reason == "hsm.key_imported"
    assert await signs(manager, "x509-CA-A") == made.fingerprint
    assert holders(manager)["x509-CA-A"] == ("two",)


async def test_what_is_destroyed_before_its_time_is_so_on_every_token(pair: Rig) -> None:
    manager = await pair.start("same_keys", retain_replaced="1h")
    old = await manager.generate_key("x509-CA-A", KeyType.EC_P256)
    pair.clone()
    await eventually(lambda: has_both(manager))
    await manager.generate_key("x509-CA-A", KeyType.EC_P256)

    async def are_kept(count: int) -> bool:
        fingerprints = [k.info.fingerprint for k in await manager.retained_keys()]
        return fingerprints == [old.fingerprint] * count

    await eventually(lambda: are_kept(2))
    await manager.destroy_retained("x509-CA-A", 1)
    assert await are_kept(0)
    with pytest.raises(SpireHwError, match="not retained"):
        await manager.destroy_retained("x509-CA-A", 1)


async def is_kept(manager: pkcs11.Pkcs11KeyManager, fingerprint: str) -> bool:
    return any(k.info.fingerprint == fingerprint for k in await manager.retained_keys())


async def test_configurations_that_do_not_say_what_is_meant(rig: Rig) -> None:
    cases = {
        "mode is required with several tokens": rig.config(""),
        "a single token needs no token block": rig.config("spread", ("one",)),
        "accept_key_loss belongs into the token blocks": rig.config("spread", accept_key_loss=True),
        'token "one": exactly one of pin_file': Body(
            tuple(
                Block(i.keys, Body((*i.body.items, *Body.from_dict({"pin_env": "X"}).items)), 1)
                if isinstance(i, Block) and i.keys == ("token", "one")
                else i
                for i in rig.config("spread").items
            )
        ),
    }
    manager = rig.build()
    for words, config in cases.items():
        assert any(words in fault.message for fault in manager.validate(config)), words
        with pytest.raises(ConfigError):
            await manager.configure(config)
    assert manager.validate(rig.config("spread")) == []
