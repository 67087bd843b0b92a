"""What hosts expect of node and workload attestors.

Source: the behaviour of SPIRE 1.15's hosts towards `NodeAttestor` and `WorkloadAttestor` plugins.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from spire_hw._pb import plugin_agent_workloadattestor_pb2 as workload_pb
from spire_hw._pb import plugin_server_nodeattestor_pb2 as server_pb
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.goplugin.conformance.report import (
    FailedError,
    NotedError,
    SkippedError,
    answered,
    refused,
)
from spire_hw.plugin.info import Side
from spire_hw.plugin.nodeattestor import AttestationRequest
from spire_hw.transport.process import Process

if TYPE_CHECKING:
    from spire_hw.goplugin.conformance.bench import Bench
    from spire_hw.goplugin.conformance.report import Report
    from spire_hw.spiffeid import SpiffeId

_ATTEST: Final = "/spire.plugin.server.nodeattestor.v1.NodeAttestor/Attest"
_NONSENSE: Final = {
    "a few bytes": b"\x00\xff\x7f",
    "an empty JSON object": b"{}",
    "JSON of other things": b'[[[[{"a": null}]]]]',
    "64 KiB of zeros": bytes(64 << 10),
}
# What a server makes of a payload that is not acceptable, and what it does itself.
_REFUSALS: Final = {ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED}
_NO_PROCESS: Final = 2**30


async def examine_node(bench: Bench, report: Report) -> None:
    """Ask a node attestor's half everything that can be asked without the other one."""
    if bench.subject.side is Side.AGENT:
        async with report.step("sends a payload before it hears anything") as step:
            exchange = _Exchange()
            await bench.contract.aid_attestation(exchange, None)
            step.detail = f"{len(exchange.sent[0])} bytes"
        return
    async with report.step("refuses payloads that are nonsense"):
        odd = [await _nonsense(bench, what, payload) for what, payload in _NONSENSE.items()]
        found = "; ".join(filter(None, odd))
        if found:
            raise NotedError(found)
    async with report.step("refuses a stream that does not begin with a payload"):
        for what, messages in (
            ("no message", []),
            ("an empty payload", [server_pb.AttestRequest(payload=b"")]),
            ("an answer to nothing", [server_pb.AttestRequest(challenge_response=b"x")]),
        ):
            await refused(_stream(bench, messages), what)


async def _nonsense(bench: Bench, what: str, payload: bytes) -> str:
    """Attest with a payload; return what should be said about the refusal, "" for nothing."""

    async def answer(challenge: bytes) -> bytes:
        del challenge
        return payload

    async def admit(agent_id: SpiffeId) -> None:
        del agent_id

    request = AttestationRequest(payload, answer, None, admit, "192.0.2.1")
    error = await refused(bench.contract.attest(request), what)
    return "" if error.kind in _REFUSALS else f"{what}: {answered(error)}"


async def _stream(bench: Bench, messages: list[server_pb.AttestRequest]) -> None:
    call = bench.run.channel.bidi(_ATTEST, server_pb.AttestResponse, timeout_s=30)
    async with call:
        for message in messages:
            await call.send(message)
        await call.done_sending()
        while await call.receive() is not None:
            continue


class _Exchange:
    """An agent's stream to a server that asks nothing."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    @property
    def server_verified(self) -> bool:
        """Tell that there is no server to know."""
        return False

    async def send(self, data: bytes) -> None:
        """Take what the plugin says."""
        self.sent.append(data)

    async def receive(self) -> bytes:
        """Ask nothing.

        Raises:
            SpireHwError: always.
        """
        raise SpireHwError("the server asks nothing")

    async def next_challenge(self) -> bytes | None:
        """Ask nothing."""
        return None


async def examine_workload(bench: Bench, report: Report) -> None:
    """Ask a workload attestor about this process and about none."""
    async with report.step("attests a process") as step:
        process = Process.of(os.getpid())
        try:
            values = await bench.contract.attest(process)
        finally:
            process.close()
        step.detail = ", ".join(values) or "no selectors: this is no process of its kind"
    async with report.step("says nothing about a process that is not there"):
        for pid in (_NO_PROCESS, 0, -1):
            await _silent(bench, pid)
    async with report.step("does not pretend to know every reference"):
        request = workload_pb.AttestReferenceRequest()
        request.reference.Pack(workload_pb.AttestRequest())
        call = bench.call("AttestReference", request, workload_pb.AttestReferenceResponse)
        error = await refused(call, "a made-up reference")
        if error.kind is ErrorKind.UNIMPLEMENTED:
            raise SkippedError("it does not serve AttestReference, which is allowed")
        if error.kind is not ErrorKind.INVALID_ARGUMENT:
            raise FailedError(f"{answered(error)}; expected INVALID_ARGUMENT")


async def _silent(bench: Bench, pid: int) -> None:
    request = workload_pb.AttestRequest(pid=pid)
    try:
        answer = await bench.call("Attest", request, workload_pb.AttestResponse)
    except SpireHwError as e:
        if e.kind is ErrorKind.UNIMPLEMENTED:
            raise SkippedError("it knows references alone") from e
        return
    if answer.selector_values:
        raise FailedError(f"process {pid} has selectors {', '.join(answer.selector_values)}")
