"""Print `drift_to_cutoff_s`: from the heartbeat that saw a changed PCR to the workload's stream closed.

Server, agent and TPM (swtpm) are real programs, the CA's key is in a token. A workload holds a
FetchX509SVID stream, a PCR is extended, and the next heartbeat sees it: the clock runs from the
agent's log line about the server's question to the refusal that ends the stream, so quote, verdict,
the datastore's transaction, the message back and the agent's clearing up are all in it. Then policy
admits the new value, the node heals, and it starts over; the slowest round counts. The time from the
change itself is printed too: most of it is waiting for the next heartbeat, here once a second.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import re
import signal
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Final

from spire_hw.clock import SystemClock
from spire_hw.errors import DeniedError
from spire_hw_sim.meter import tell
from spire_hw_sim.site import Site
from spire_hw_sim.workload import Workload

if TYPE_CHECKING:
    from spire_hw_sim.site import Node

_ASKED: Final = re.compile(r'time="([^"]+)".*msg="The server asks for a heartbeat"')
_PCR: Final = 4
_CLOCK: Final = SystemClock()


class Bench:
    """A site whose policy follows one PCR."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._value = bytes(32)
        self._policies = site.directory / "policies"
        self._policies.mkdir()
        self.measure(b"boot")
        self.allow()
        block = f'posture {{ policy_dir = "{self._policies}" heartbeat_interval = "1s" }}'
        site.start_server(change=lambda text: f"{text}\n{block}\n")
        site.wait_ready()
        self.node: Node = site.node("n")
        self.node.start(keys='log_level = "DEBUG"')
        self.node.wait_in_use()
        site.register(self.node)

    def measure(self, data: bytes) -> None:
        """Note that this was measured."""
        self._value = hashlib.sha256(self._value + hashlib.sha256(data).digest()).digest()

    def allow(self) -> None:
        """Let policy admit what was measured up to now."""
        drift = 'pcr_changed_without_reset = "accept"'
        pcrs = f'pcrs {{ sha256 {{ "{_PCR}" = ["{self._value.hex()}"] }} }}'
        text = f'policy "p" {{ {pcrs} drift {{ {drift} }} }}\n'
        (self._policies / "p.hcl").write_text(text)

    def asked_before(self, moment: float) -> float:
        """Return when the server last asked before a moment, as the agent's log has it."""
        found = _ASKED.findall(self.node.agent.log())
        times = (datetime.fromisoformat(one).timestamp() for one in found)
        return max(one for one in times if one < moment)

    async def round(self) -> tuple[float, float]:
        """Return the seconds from heartbeat, and from the change, to the end of the stream."""
        await self.node.fetch_soon()
        async with Workload(self.node.socket) as workload, workload.x509_svids() as stream:
            await anext(stream)
            changed = _CLOCK.now().timestamp()
            self.node.tpm.extend_pcr(_PCR, b"more")
            self.measure(b"more")
            try:
                while True:
                    await anext(stream)
            except DeniedError:
                ended = _CLOCK.now().timestamp()
        seen = self.asked_before(ended)
        self.allow()
        self.site.server.send(signal.SIGUSR1)
        return ended - seen, ended - changed


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with Site() as site:
        bench = Bench(site)
        rounds = [asyncio.run(bench.round()) for _ in range(arguments.rounds)]
    for seen, changed in rounds:
        sys.stdout.write(f"{seen:.3f} s from the heartbeat, {changed:.3f} s from the change\n")
    tell("drift_to_cutoff_s", max(seen for seen, _ in rounds))


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    main()
