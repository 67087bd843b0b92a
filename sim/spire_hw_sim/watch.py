"""A server that watches machines with emulated TPMs, for tests that move its time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from spire_hw._pb import hw_posture_pb2 as pb
from spire_hw.config import hcl
from spire_hw.errors import SpireHwError
from spire_hw_agent.upstream.posture import Asked
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.beater import Beater
from spire_hw_sim.fleet.keys import FleetKeys
from spire_hw_sim.servers import TIMEOUT_S, Operator, server_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw.posture.heartbeat import HeartbeatChallenge
    from spire_hw_agent.upstream.posture import Standing
    from spire_hw_sim.beater import BeaterStream
    from spire_hw_sim.clock import SimClock

ADMIN: Final = "/spire_hw.server.v1.PostureAdmin/"
# The longest a heartbeat may be away, with the steps time is moved in.
A_BEAT: Final = timedelta(seconds=71)
UNLIMITED: Final = "ratelimit { attestation = false signing = false }"


class Watch:
    """A server that can be started again, its operator, and machines.

    Attributes:
        settings: text of the block `posture`, without the directory of policies.
        attestor: further settings of the attestor.
        plugins: further plugin blocks.
        keys: of the machines, and of who made them.
    """

    def __init__(self, directory: Path, clock: SimClock) -> None:
        """Describe it.

        Args:
            directory: short enough for a socket path.
            clock: its time.
        """
        self.clock = clock
        self.settings = ""
        self.attestor = ""
        self.plugins = ""
        self._directory = directory
        self.keys = FleetKeys(directory / "fleet")
        self._policies = directory / "policies"
        self._policies.mkdir()
        self._servers: list[tuple[Server, Operator]] = []
        self._made = 0

    @property
    def server(self) -> Server:
        """Return the server that was started last."""
        return self._servers[-1][0]

    @property
    def operator(self) -> Operator:
        """Return its admin socket."""
        return self._servers[-1][1]

    def write_policy(self, text: str) -> None:
        """Write the only policy; `server.reconfigure` has it read."""
        (self._policies / "web.hcl").write_text(text)

    def forget_policy(self) -> None:
        """Delete it."""
        (self._policies / "web.hcl").unlink()

    def allow(self, *beaters: Beater, pcr: int = 4, rules: str = "") -> None:
        """Write a policy that knows the present values of a PCR of some machines."""
        values = sorted({b.node.tpm.pcrs["sha256", pcr].hex() for b in beaters})
        listed = ", ".join(f'"{v}"' for v in values)
        text = f'policy "web" {{ pcrs {{ sha256 {{ "{pcr}" = [{listed}] }} }} {rules} }}'
        self.write_policy(text)

    async def start(self, name: str = "a") -> Server:
        """Start a server; all of them share one database."""
        directory = self._directory / name
        directory.mkdir(exist_ok=True)
        plugin = (
            f'NodeAttestor "tpm" {{ plugin_data {{ endorsement_ca_path = "{self.keys.roots}"'
            f" pcrs {{ sha256 = [0, 2, 4, 7] }} {self.attestor} }} }}"
        )
        text = server_config(directory, plugins=self.plugins, more=UNLIMITED).replace(
            'NodeAttestor "join_token"', f'{plugin}\n  NodeAttestor "join_token"'
        )
        block = f'posture {{ policy_dir = "{self._policies}" {self.settings} }}'
        text = text.replace(f"{directory}/data/db.sqlite3", f"{self._directory}/db.sqlite3")
        server = Server(build_settings(hcl.parse(f"{text}\n{block}", "s")), clock=self.clock)
        await server.start()
        self._servers.append((server, Operator(server.settings.socket_path)))
        return server

    async def stop(self) -> None:
        """Stop the server that was started last."""
        server, operator = self._servers.pop()
        await operator.close()
        await server.close()

    async def close(self) -> None:
        """Stop all."""
        while self._servers:
            await self.stop()

    async def machine(self) -> Beater:
        """Return another machine; all of them booted the same."""
        self._made += 1
        node = self.keys.node(self._made)
        node.tpm.pcrs = dict(node.tpm.pcrs)
        return Beater(node, self.server.port, await self.operator.bundle(), self.clock)

    async def known(self) -> Beater:
        """Return a machine that has attested."""
        beater = await self.machine()
        await beater.attest()
        return beater

    async def pass_time(self, step: timedelta, *beaters: Beater) -> None:
        """Move the servers' time, and the TPM clocks of machines."""
        for beater in beaters:
            beater.tick(step.total_seconds())
        await self.clock.advance(step)

    async def admin(self, method: str, request: Any, answer: Any) -> Any:
        """Call a method of PostureAdmin."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.operator.channel.unary(
                ADMIN + method, request, answer, timeout_s=TIMEOUT_S
            )

    async def state(self, beater: Beater) -> pb.NodePosture:
        """Return what is known of a machine."""
        request = pb.GetStateRequest(agent_id=beater.id.text)
        found: pb.NodePosture = await self.admin("GetState", request, pb.NodePosture)
        return found

    async def history(self, beater: Beater) -> list[pb.EvidenceRecord]:
        """Return what a machine showed, the newest first."""
        request = pb.ListEvidenceRequest(agent_id=beater.id.text)
        answer = await self.admin("ListEvidence", request, pb.ListEvidenceResponse)
        return list(answer.records)

    async def by_hand(self, method: str, beater: Beater, comment: str = "") -> pb.NodePosture:
        """Put a machine in quarantine, or release it."""
        kind = pb.QuarantineRequest if method == "Quarantine" else pb.ReleaseRequest
        request = kind(agent_id=beater.id.text, comment=comment)
        found: pb.NodePosture = await self.admin(method, request, pb.NodePosture)
        return found

    @asynccontextmanager
    async def streaming(self, beater: Beater) -> AsyncIterator[BeaterStream]:
        """Hold a stream whose first state was read."""
        async with asyncio.timeout(TIMEOUT_S), beater.stream() as stream:
            await stream.state()
            yield stream

    async def challenge(
        self, stream: BeaterStream, within: timedelta = A_BEAT
    ) -> HeartbeatChallenge:
        """Let time pass until the next heartbeat comes."""
        end = self.clock.now() + within
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(stream.challenge())
            while not asked.done():
                if self.clock.now() >= end:
                    raise SpireHwError("no challenge came")
                await self.pass_time(timedelta(seconds=5), stream.beater)
                await asyncio.wait({asked}, timeout=0.05)
        return asked.result()

    async def beat(self, stream: BeaterStream, within: timedelta = A_BEAT) -> Standing:
        """Answer the next heartbeat honestly and return what the server says to it.

        After a boot the server asks twice: for the quote, then for all there is.
        """
        asked: Asked | Standing | None = Asked(await self.challenge(stream, within), 0)
        while isinstance(asked, Asked):
            await stream.raw.answer(stream.beater.answer(asked.challenge))
            asked = await stream.raw.receive()
        if asked is None:
            raise SpireHwError("the stream has ended")
        return asked
