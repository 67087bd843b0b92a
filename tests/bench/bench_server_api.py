"""What the server's hot calls cost: certificates and tokens per second of server CPU.

Run: `python tests/bench/bench_server_api.py`. The server is a process of its own; agents call it
over mTLS from this one. Nothing is asserted.

`x509_api_vs_openssl` is certificates per server CPU second against what one core does with OpenSSL
alone when it verifies a CSR's signature and makes one signature (ECDSA P-256 both).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from spire_hw import log as logs
from spire_hw._pb import server_svid_pb2
from spire_hw.key import KeyType, generate_private_key
from spire_hw_server.app import Server
from spire_hw_sim.servers import (
    SVID,
    Operator,
    ScriptedAgent,
    entry_message,
    make_csr,
    server_settings,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

BATCH = 100


def tell(line: str) -> None:
    """Print one figure."""
    sys.stdout.write(line + "\n")


def openssl_pairs_per_s() -> float:
    """Return how many (verify, sign) pairs of ECDSA P-256 one core does in a second."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = key.public_key()
    prehashed = ec.ECDSA(utils.Prehashed(hashes.SHA256()))
    digest = hashlib.sha256(b"bench").digest()
    signature = key.sign(digest, prehashed)
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        for _ in range(1000):
            public.verify(signature, digest, prehashed)
            key.sign(digest, prehashed)
        best = max(best, 1000 / (time.process_time() - start))
    return best


def serve(directory: str, port_out: Connection) -> None:
    """Run a server in this process until it is terminated."""
    logs.configure(logs.LogSettings(level=logs.Level.ERROR))
    more = "ratelimit { signing = false attestation = false }"
    settings = server_settings(Path(directory), key_manager="disk", more=more)

    async def main() -> None:
        server = Server(settings)
        await server.start()
        port_out.send(server.port)
        await server.failed()

    asyncio.run(main())


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and its children."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


async def measure(directory: Path, pid: int, port: int, certificates: int, tokens: int) -> None:
    """Print both figures."""
    operator = Operator(directory / "api.sock")
    agent = ScriptedAgent(port, await operator.bundle())
    await agent.attest(await operator.token())
    assert agent.spiffe_id is not None
    results = await operator.create(
        *(entry_message(f"/w/{i}", agent.spiffe_id, [f"unix:uid:{i}"]) for i in range(BATCH))
    )
    ids = [r.entry.id for r in results]
    csrs = [await make_csr(generate_private_key(KeyType.EC_P256)) for _ in ids]
    channel = await agent.channel()
    await agent.batch_new(channel, list(zip(ids, csrs, strict=True)))

    before = cpu_s(pid)
    for _ in range(certificates // BATCH):
        answers = await agent.batch_new(channel, list(zip(ids, csrs, strict=True)))
        assert all(a.status.code == 0 for a in answers)
    spent = cpu_s(pid) - before
    rate = certificates / spent
    limit = openssl_pairs_per_s()
    tell(f"BatchNewX509SVID: {certificates} certificates, {spent:.2f} CPU s, {rate:.0f} per CPU s")
    tell(f"OpenSSL verify+sign: {limit:.0f} per CPU s")
    tell(f"x509_api_vs_openssl: {rate / limit:.3f}")

    request = server_svid_pb2.NewJWTSVIDRequest(entry_id=ids[0], audience=["bench"])

    async def ask(count: int) -> None:
        for _ in range(count):
            await channel.unary(
                SVID + "NewJWTSVID", request, server_svid_pb2.NewJWTSVIDResponse, timeout_s=20
            )

    await ask(50)
    before = cpu_s(pid)
    await asyncio.gather(*(ask(tokens // 8) for _ in range(8)))
    spent = cpu_s(pid) - before
    tell(f"NewJWTSVID: {tokens} calls, {spent:.2f} CPU s, {tokens / spent:.0f} per CPU s")
    await channel.close()
    await operator.close()


def main() -> None:
    """Start the server, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--certificates", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=4_000)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=serve, args=(name, theirs))
        process.start()
        try:
            assert ours.poll(30)
            port = ours.recv()
            asyncio.run(
                measure(
                    Path(name), process.pid or 0, port, arguments.certificates, arguments.tokens
                )
            )
        finally:
            process.terminate()
            process.join(20)


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
