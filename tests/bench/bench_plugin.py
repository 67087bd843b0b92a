"""Print `external_plugin_sign_added_ms`: what it costs a signature that its key is in a plugin.

The same KeyManager (`memory`, P-256) signs in this process and as an external plugin of our host;
the difference of both medians is what the way there and back takes, wall time with both processes
at work. Rounds alternate, and the quietest one counts: on a busy machine the others tell about the
machine. Nothing is asserted.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from spire_hw import log
from spire_hw.catalog import Catalog
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import parse
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.plugin.info import HostInfo, PluginKind, Side
from spire_hw.plugin.keymanager import Keys
from spire_hw.plugin.section import Count, parse_plugins
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins import builtin

if TYPE_CHECKING:
    from spire_hw.plugin.info import Builder
    from spire_hw.plugin.keymanager import ManagedSigner

ROUNDS = 30
CALLS = 200
OPTIONS = SignOptions(HashAlgorithm.SHA256)
PROGRAM = Path(sys.executable).with_name("spire-hw-plugin")
BLOCKS = f"""
KeyManager "memory" {{ plugin_data {{}} }}
KeyManager "outside" {{
  plugin_cmd = "{PROGRAM}"
  plugin_args = ["serve", "-side", "server", "KeyManager", "memory"]
}}
"""


def table(kind: PluginKind, name: str) -> Builder:
    return builtin.lookup(kind, name, Side.SERVER)


async def median_ms(signer: ManagedSigner) -> float:
    digest = bytes(32)
    times = []
    for _ in range(CALLS):
        before = time.perf_counter()
        await signer.sign(digest, OPTIONS)
        times.append(time.perf_counter() - before)
    return statistics.median(times) * 1000


async def main() -> None:
    log.output().level = log.Level.ERROR
    with tempfile.TemporaryDirectory() as directory:
        host = HostInfo(
            Side.SERVER,
            TrustDomain("example.org"),
            Path(directory),
            log.get_logger("catalog"),
            SystemClock(),
        )
        blocks = parse_plugins(parse(BLOCKS))
        rules = {PluginKind.KEY_MANAGER: Count(2, 2)}
        catalog = await Catalog.load(blocks, table, host, rules)
        try:
            signers = [
                await Keys(p.plugin, p.name).generate("key", KeyType.EC_P256)
                for p in catalog.all(PluginKind.KEY_MANAGER)
            ]
            rounds = [[await median_ms(s) for s in signers] for _ in range(ROUNDS)]
        finally:
            await catalog.close()
    inside, outside = (min(column) for column in zip(*rounds, strict=True))
    sys.stdout.write(
        f"in process      {inside:8.3f} ms\n"
        f"external plugin {outside:8.3f} ms\n"
        f"external_plugin_sign_added_ms {outside - inside:.3f}\n"
    )


if __name__ == "__main__":
    asyncio.run(main())
