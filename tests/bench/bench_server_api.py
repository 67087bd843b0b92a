"""Print `x509_api_vs_openssl` and `jwt_api_per_cpu_s`: what the server's hot calls cost.

The server is a process of its own with its usual log level; an agent calls it over mTLS from this
one. Only the server's CPU time counts. `x509_api_vs_openssl` is certificates per CPU second, in
batches of 100, against what one core does with OpenSSL alone when it verifies a CSR's signature and
makes one signature (ECDSA P-256 both), measured in turns. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw._pb import server_svid_pb2
from spire_hw.key import KeyType, generate_private_key
from spire_hw_sim.meter import MeteredServer, OpenSsl, server_process, tell
from spire_hw_sim.servers import (
    SVID,
    Operator,
    ScriptedAgent,
    entry_message,
    make_csr,
    server_config,
)

if TYPE_CHECKING:
    from spire_hw.rpc.client import Channel

BATCH = 100
ROUNDS = 8
CALLERS = 8


async def certificates(
    server: MeteredServer, agent: ScriptedAgent, channel: Channel, ids: list[str], count: int
) -> None:
    """Measure BatchNewX509SVID."""
    csrs = [await make_csr(generate_private_key(KeyType.EC_P256)) for _ in ids]
    wanted = list(zip(ids, csrs, strict=True))
    await agent.batch_new(channel, wanted)
    limit = OpenSsl()
    best = pair = float("inf")
    batches = max(1, count // ROUNDS // BATCH)
    for _ in range(ROUNDS):
        pair = min(pair, limit.pair_s())
        before = server.cpu_s()
        for _ in range(batches):
            answers = await agent.batch_new(channel, wanted)
            assert all(a.status.code == 0 for a in answers)
        best = min(best, (server.cpu_s() - before) / batches / BATCH)
    sys.stdout.write(
        f"BatchNewX509SVID       {best * 1e6:6.0f} us ({1 / best:,.0f} per CPU second)\n"
        f"OpenSSL verify + sign  {pair * 1e6:6.0f} us\n"
    )
    tell("x509_api_vs_openssl", pair / best)


async def tokens(server: MeteredServer, channel: Channel, entry_id: str, count: int) -> None:
    """Measure NewJWTSVID."""
    request = server_svid_pb2.NewJWTSVIDRequest(entry_id=entry_id, audience=["bench"])

    async def ask(number: int) -> None:
        for _ in range(number):
            await channel.unary(
                SVID + "NewJWTSVID", request, server_svid_pb2.NewJWTSVIDResponse, timeout_s=20
            )

    await ask(50)
    each = count // ROUNDS // CALLERS
    rates = []
    for _ in range(ROUNDS):
        before = server.cpu_s()
        await asyncio.gather(*(ask(each) for _ in range(CALLERS)))
        rates.append(each * CALLERS / (server.cpu_s() - before))
    tell("jwt_api_per_cpu_s", max(rates))


async def measure(server: MeteredServer, certificate_count: int, token_count: int) -> None:
    """Print both figures."""
    operator = Operator(server.socket)
    agent = ScriptedAgent(server.port, await operator.bundle())
    await agent.attest(await operator.token())
    assert agent.spiffe_id is not None
    results = await operator.create(
        *(entry_message(f"/w/{i}", agent.spiffe_id, [f"unix:uid:{i}"]) for i in range(BATCH))
    )
    ids = [r.entry.id for r in results]
    async with await agent.channel() as channel:
        await certificates(server, agent, channel, ids, certificate_count)
        await tokens(server, channel, ids[0], token_count)
    await operator.close()


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--certificates", type=int, default=16_000)
    parser.add_argument("--tokens", type=int, default=6_400)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        directory = Path(name)
        config = server_config(directory, more="ratelimit { signing = false attestation = false }")
        with server_process(directory, config) as server:
            asyncio.run(measure(server, arguments.certificates, arguments.tokens))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
