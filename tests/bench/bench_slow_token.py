"""Print `slow_token_other_rpc_p99_ratio`: what a slow token costs calls that need no signature.

Two servers, processes of their own, keep their keys in SoftHSM; one token takes half a second more
over each signature. Agents ask both for JWT-SVIDs at the same pace, more than the slow one can
serve, while others fetch entries and bundles. The figure is the 99th percentile of these calls at the
slow server against the same at the fast one, the best of several rounds in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw._pb import server_bundle_pb2, server_entry_pb2, server_svid_pb2, types_pb2
from spire_hw.errors import SpireHwError
from spire_hw_sim.meter import MeteredServer, server_process, tell
from spire_hw_sim.pkcs11faults import Fault, Faults
from spire_hw_sim.servers import (
    BUNDLE,
    ENTRY,
    SVID,
    Operator,
    ScriptedAgent,
    entry_message,
    server_config,
)
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from spire_hw.rpc.client import Channel

SIGN_S = 0.5
ASKING = 8
PAUSE_S = 0.25
ROUNDS = 8
CALLS = 150


@dataclass(slots=True)
class Subject:
    """A server under measurement.

    Attributes:
        channel: an agent's connection.
        entry_id: an entry of that agent.
        p99_s: of each round.
        signed: JWT-SVIDs it gave.
    """

    channel: Channel
    entry_id: str
    p99_s: list[float] = field(default_factory=list)
    signed: int = 0

    async def ask_for_tokens(self) -> None:
        """Ask for JWT-SVIDs for ever; a queue that is full refuses some."""
        request = server_svid_pb2.NewJWTSVIDRequest(entry_id=self.entry_id, audience=["bench"])
        while True:
            with suppress(SpireHwError):
                await self.channel.unary(
                    SVID + "NewJWTSVID", request, server_svid_pb2.NewJWTSVIDResponse, timeout_s=20
                )
                self.signed += 1
            await asyncio.sleep(PAUSE_S)

    async def round(self) -> None:
        """Make calls that need no signature."""
        took = []
        entries = server_entry_pb2.GetAuthorizedEntriesRequest()
        bundle = server_bundle_pb2.GetBundleRequest()
        for _ in range(CALLS):
            for path, wanted, answer in (
                (
                    ENTRY + "GetAuthorizedEntries",
                    entries,
                    server_entry_pb2.GetAuthorizedEntriesResponse,
                ),
                (BUNDLE + "GetBundle", bundle, types_pb2.Bundle),
            ):
                start = time.perf_counter()
                await self.channel.unary(path, wanted, answer, timeout_s=20)
                took.append(time.perf_counter() - start)
        took.sort()
        self.p99_s.append(took[len(took) * 99 // 100])


def config_of(directory: Path, faults: Faults, hsm: SoftHsm) -> str:
    """Return a server.conf with a tampered token."""
    pin = directory / "pin"
    pin.write_text("1234")
    pin.chmod(0o600)
    environment = {**hsm.environment, **faults.environment()}
    lines = "\n".join(f'{name} = "{value}"' for name, value in environment.items())
    keys = f"""KeyManager "pkcs11" {{ plugin_data {{
      module_path = "{hsm.module}"
      token_label = "ca"
      pin_file = "{pin}"
      key_identifier_value = "bench"
      environment {{ {lines} }}
    }} }}"""
    text = server_config(directory, key_manager="memory", more="ratelimit { signing = false }")
    return text.replace('KeyManager "memory" { plugin_data {  } }', keys)


async def subject_of(server: MeteredServer, stack: AsyncExitStack) -> Subject:
    """Join an agent and give it something to ask for."""
    operator = Operator(server.socket)
    agent = ScriptedAgent(server.port, await operator.bundle())
    await agent.attest(await operator.token())
    assert agent.spiffe_id is not None
    entries = [entry_message(f"/w/{n}", agent.spiffe_id, [f"unix:uid:{n}"]) for n in range(20)]
    created = await operator.create(*entries)
    await operator.close()
    channel = await stack.enter_async_context(await agent.channel())
    return Subject(channel, created[0].entry.id)


async def measure(fast: MeteredServer, slow: MeteredServer, faults: Faults, rounds: int) -> None:
    """Print the figure."""
    async with AsyncExitStack() as stack:
        subjects = {
            "fast": await subject_of(fast, stack),
            "slow": await subject_of(slow, stack),
        }
        faults.set(Fault("C_Sign", sleep_s=SIGN_S))
        asking = [
            asyncio.ensure_future(subject.ask_for_tokens())  # noqa: TID251 - ended below
            for subject in subjects.values()
            for _ in range(ASKING)
        ]
        await asyncio.sleep(2 * SIGN_S)
        for _ in range(rounds):
            for subject in subjects.values():
                await subject.round()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        faults.clear()
    for name, subject in subjects.items():
        shown = ", ".join(f"{p * 1e3:.1f}" for p in subject.p99_s)
        sys.stdout.write(f"{name}: {subject.signed} JWT-SVIDs; p99 of the rounds in ms: {shown}\n")
    tell(
        "slow_token_other_rpc_p99_ratio", min(subjects["slow"].p99_s) / min(subjects["fast"].p99_s)
    )


def main() -> None:
    """Start both servers, measure, stop them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        configs, plans = [], []
        for which in ("f", "s"):
            directory = Path(name) / which
            directory.mkdir()
            hsm = SoftHsm(directory / "hsm")
            hsm.init_token("ca")
            plans.append(Faults(directory / "faults", hsm.module))
            configs.append((directory, config_of(directory, plans[-1], hsm)))
        with server_process(*configs[0]) as fast, server_process(*configs[1]) as slow:
            asyncio.run(measure(fast, slow, plans[1], arguments.rounds))


if __name__ == "__main__":
    main()
