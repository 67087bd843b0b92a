"""More than a signer takes at once, from our own client and past it; numbers are those of the fault list."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw._pb import hw_signer_pb2
from spire_hw.clock import SystemClock
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.jose.text import encode_base64url
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.plugin.keymanager import ManagedSigner
from spire_hw.spiffeid import TrustDomain
from spire_hw.x509.csr import build_csr
from spire_hw_sim.pkcs11faults import Fault, Faults
from spire_hw_sim.remoterig import RemoteRig, SignerProcess
from spire_hw_sim.signer import SignerRig, client_policy
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_plugins.keymanager.remote.manager import RemoteKeyManager

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA256 = SignOptions(HashAlgorithm.SHA256)
CA, JWT = "x509-CA-A", "JWT-Signer-A"
DOMAIN = TrustDomain.parse("example.org")
SIGN_S = 0.01


class SlowSigner:
    """A signer in a process of its own whose token takes its time over each signature, once told."""

    def __init__(self, remote: RemoteRig, most: int) -> None:
        folder = remote.folder / "far"
        policy = client_policy(max_in_flight=str(most))
        rig = SignerRig(folder, authority=remote.authority, policy=policy)
        assert rig.hsm is not None
        self.faults = Faults(folder / "faults", rig.hsm.module)
        lines = "\n".join(f'{k} = "{v}"' for k, v in self.faults.environment().items())
        text = rig.config_file.read_text()
        rig.config_file.write_text(text.replace("environment {", f"environment {{\n{lines}\n"))
        self.process = SignerProcess(rig)
        self._remote = remote

    async def manager(self) -> RemoteKeyManager:
        """Start it; return a client of it that has made two keys, the token slow from now on."""
        self.process.start()
        made = await self._remote.manager(self.process.address, start_timeout="2m", timeout="1m")
        for key_id in (CA, JWT):
            await made.generate_key(key_id, KeyType.EC_P256)
        self.faults.set(Fault("C_Sign", sleep_s=SIGN_S))
        return made


def token(number: int) -> bytes:
    now = int(SystemClock().now().timestamp())
    claims = {"sub": f"spiffe://example.org/w{number}", "aud": ["x"], "exp": now + 300}
    head = {"alg": "ES256", "kid": "a", "typ": "JWT"}
    return b".".join(encode_base64url(json.dumps(p).encode()).encode() for p in (head, claims))


class Burst:
    """Tokens that are asked for at once, and certificate requests in the middle of it."""

    def __init__(self, manager: RemoteKeyManager) -> None:
        self._manager = manager
        self.signed = 0
        self.failures: list[str] = []
        self.before_urgent: list[int] = []

    async def token(self, number: int) -> None:
        """Have one token signed."""
        try:
            await self._manager.sign_jwt(JWT, token(number), SHA256)
        except SpireHwError as e:
            self.failures.append(e.message)
        else:
            self.signed += 1

    async def request(self) -> None:
        """Have a CA's request signed; note how many tokens were signed before."""
        signer = ManagedSigner(self._manager, "", await self._manager.get_public_key(CA))
        await build_csr(signer, spiffe_id=DOMAIN.id)
        self.before_urgent.append(self.signed)


@pytest.mark.parametrize(("most", "count"), [(256, 300), (3, 60), (1, 30)])
async def test_fault_48_a_burst_beyond_what_a_signer_takes_is_signed_whole_and_what_is_urgent_first(
    tmp_path: Path, most: int, count: int
) -> None:
    async with RemoteRig(tmp_path) as remote:
        slow = SlowSigner(remote, most)
        try:
            manager = await slow.manager()
            burst = Burst(manager)
            async with asyncio.TaskGroup() as group:
                for n in range(count):
                    group.create_task(burst.token(n))
                while slow.faults.calls("C_Sign") < 5:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(SIGN_S)
                for _ in range(3):
                    group.create_task(burst.request())
            assert burst.failures == []
            assert burst.signed == count
            # Behind what the token has in hand, not behind the burst.
            assert len(burst.before_urgent) == 3
            assert max(burst.before_urgent) < count // 2
            await manager.close()
        finally:
            slow.process.stop()


async def test_fault_104_a_signer_that_is_full_of_tokens_has_room_for_a_ca(tmp_path: Path) -> None:
    async with RemoteRig(tmp_path) as remote:
        slow = SlowSigner(remote, 32)
        try:
            manager = await slow.manager()
            rig = slow.process.rig
            channel = await rig.channel(port=slow.process.port)
            burst = Burst(manager)
            async with asyncio.TaskGroup() as group:
                flood = group.create_task(rig.call("Sign", tokens(40), channel=channel))
                while slow.faults.calls("C_Sign") < 5:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(SIGN_S)
                late = group.create_task(burst.token(1000))
                await burst.request()
                assert not flood.done()
                assert not late.done()
            # The sixteenth part is kept; what had no room was asked for again until it had.
            refused = [r.refusal for r in flood.result().results if not r.signature]
            assert [r.reason for r in refused] == ["in_flight"] * 10
            assert {r.code for r in refused} == {ErrorKind.RESOURCE_EXHAUSTED.value}
            assert (burst.signed, burst.failures) == (1, [])
            await channel.close()
            await manager.close()
        finally:
            slow.process.stop()


def tokens(count: int) -> Any:
    return hw_signer_pb2.SignRequest(
        items=[
            hw_signer_pb2.SignItem(
                request_id=secrets.token_bytes(16), key_id=JWT, hash=5, jwt=token(number)
            )
            for number in range(count)
        ]
    )
