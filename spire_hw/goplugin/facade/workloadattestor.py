"""WorkloadAttestor over gRPC.

Source: `spire.plugin.agent.workloadattestor.v1`. Both calls are served and used: by process id, and
by reference where the reference is a process id.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from spire_hw._pb import broker_pb2
from spire_hw._pb import plugin_agent_workloadattestor_pb2 as pb
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError, UnavailableError
from spire_hw.goplugin.facade.values import MAX_SELECTORS
from spire_hw.rpc.service import bind
from spire_hw.selector import Selector
from spire_hw.transport.process import Process

if TYPE_CHECKING:
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.plugin.info import Side
    from spire_hw.plugin.workloadattestor import WorkloadAttestor
    from spire_hw.rpc.service import Call, Method
    from spire_hw.transport.peer import CallerProcess

_SERVICE: Final = "/spire.plugin.agent.workloadattestor.v1.WorkloadAttestor/"


def remote(link: Link, side: Side) -> RemoteWorkloadAttestor:
    """Return the contract over an external plugin."""
    del side  # agents alone have them
    return RemoteWorkloadAttestor(link)


def methods(plugin: WorkloadAttestor, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    del side
    descriptor = pb.DESCRIPTOR.services_by_name["WorkloadAttestor"]
    return bind(descriptor, WorkloadAttestorService(plugin))


class RemoteWorkloadAttestor:
    """An external WorkloadAttestor; see `spire_hw.plugin.workloadattestor.WorkloadAttestor`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def attest(self, process: CallerProcess) -> list[str]:
        """Return selector values.

        The plugin knows the process by its number alone, so what it says counts only if the
        process that connected is still there afterwards.
        """
        values = await self._values(process.pid)
        if not process.alive():
            raise UnavailableError(
                f"process {process.pid} ended while {self._link.prefix} looked at it"
            )
        checked = self._link.bounded("selectors", values, MAX_SELECTORS)
        with self._link.checking("selectors"):
            for value in checked:
                Selector(self._link.name, value)
        return list(checked)

    async def _values(self, pid: int) -> list[str]:
        try:
            by_pid = await self._link.unary(
                _SERVICE + "Attest", pb.AttestRequest(pid=pid), pb.AttestResponse
            )
        except SpireHwError as e:
            if e.kind is not ErrorKind.UNIMPLEMENTED:
                raise
        else:
            return list(by_pid.selector_values)
        request = pb.AttestReferenceRequest()
        request.reference.Pack(broker_pb2.WorkloadPIDReference(pid=pid))
        by_reference = await self._link.unary(
            _SERVICE + "AttestReference", request, pb.AttestReferenceResponse
        )
        return list(by_reference.selector_values)


class WorkloadAttestorService:
    """The gRPC service over a WorkloadAttestor."""

    def __init__(self, plugin: WorkloadAttestor) -> None:
        self._plugin = plugin

    async def attest(self, request: pb.AttestRequest, call: Call) -> pb.AttestResponse:
        """Serve Attest."""
        return pb.AttestResponse(selector_values=await self._attest(request.pid))

    async def attest_reference(
        self, request: pb.AttestReferenceRequest, call: Call
    ) -> pb.AttestReferenceResponse:
        """Serve AttestReference, for references to processes."""
        wanted = broker_pb2.WorkloadPIDReference()
        name = wanted.DESCRIPTOR.full_name
        if request.reference.TypeName() != name:
            raise InvalidInputError(f"only references of type {name} are known here")
        try:
            wanted.ParseFromString(request.reference.value)
        except DecodeError as e:
            raise InvalidInputError("reference does not decode") from e
        return pb.AttestReferenceResponse(selector_values=await self._attest(wanted.pid))

    async def _attest(self, pid: int) -> list[str]:
        if pid <= 0:
            raise InvalidInputError(f"{pid} is not a process id")
        process = Process.of(pid)
        try:
            return await self._plugin.attest(process)
        finally:
            process.close()
