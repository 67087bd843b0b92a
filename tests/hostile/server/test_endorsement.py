"""Endorsement keys over real sockets: those not let in leave an audit record and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Self

import pytest
import pytest_asyncio

from spire_hw import log as logs
from spire_hw._pb import hw_admin_pb2, types_pb2
from spire_hw._pb import server_agent_pb2 as pb
from spire_hw.config import hcl
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.tpm.certificate import encode_pem, parse_certificate
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim import ekca
from spire_hw_sim.ekca import CrlSpec, ek_spec
from spire_hw_sim.servers import (
    AGENT,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    make_csr,
    server_config,
)
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmnode import TpmNode, Vendor
from spire_hw_sim.weakkeys import roca_modulus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_sim.clock import SimClock

pytestmark = pytest.mark.asyncio
MORE = "audit_log_enabled = true\nratelimit { attestation = false signing = false }"
PD, UN = ErrorKind.PERMISSION_DENIED, ErrorKind.UNAVAILABLE


@dataclass
class Site:
    """A server that knows one maker with revocation lists, and enrolled keys."""

    server: Server
    operator: Operator
    vendor: Vendor
    revoked: TpmNode
    log: StringIO

    @classmethod
    async def open(cls, directory: Path, clock: SimClock) -> Self:
        log = StringIO()
        logs.configure(logs.LogSettings(format=logs.Format.JSON), stream=log)
        vendor = Vendor.make()
        revoked = vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-2"))))
        _write(directory, vendor, revoked)
        plugin = f"""
          NodeAttestor "tpm" {{ plugin_data {{
            endorsement_ca_path = "{directory}/makers" ek_policy = "ca_or_hash"
            crl_path = "{directory}/crls"
            pcrs = {{ sha256 = [0, 2, 4, 7] }}
          }} }}"""
        text = server_config(directory, key_manager="memory", more=MORE, plugins=plugin)
        server = Server(build_settings(hcl.parse(text, "server.conf")), clock=clock)
        await server.start()
        return cls(server, Operator(server.settings.socket_path), vendor, revoked, log)

    async def close(self) -> None:
        await self.operator.close()
        await self.server.close()
        logs.unconfigure()

    def audit(self) -> list[dict[str, Any]]:
        """Return the records about attestations."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        records = [line for line in lines if line.get("type") == "audit"]
        return [line for line in records if line.get("method") == "AttestAgent"]

    def refused_hash(self) -> str | None:
        """Return the hash in the admission's record."""
        lines = [json.loads(line) for line in self.log.getvalue().splitlines()]
        [record] = [line for line in lines if line.get("msg") == "Node attestation refused"]
        hash_: str | None = record.get("ek_hash")
        return hash_

    async def ask(self, path: str, request: Any, answer: Any) -> Any:
        return await self.operator.channel.unary(path, request, answer, timeout_s=TIMEOUT_S)

    async def agents(self) -> bytes:
        """Return all that is stored of nodes."""
        found = await self.ask(AGENT + "ListAgents", pb.ListAgentsRequest(), pb.ListAgentsResponse)
        return bytes(found.SerializeToString(deterministic=True))

    async def enroll(self, node: TpmNode) -> None:
        request = hw_admin_pb2.EnrollEksRequest()
        request.eks.add(ek_hash=node.ek_hash, owner="ops")
        path = "/spire_hw.server.v1.Tpm/EnrollEks"
        await self.ask(path, request, hw_admin_pb2.EnrollEksResponse)

    async def attest(self, node: TpmNode) -> None:
        assert node.key is not None
        stranger = ScriptedAgent(self.server.port, await self.operator.bundle(), self.server.clock)
        params = pb.AttestAgentRequest.Params(
            data=types_pb2.AttestationData(type="tpm", payload=node.payload()),
            params=pb.AgentX509SVIDParams(csr=await make_csr(node.key.private)),
        )
        path, answer = AGENT + "AttestAgent", pb.AttestAgentResponse
        async with (
            await stranger.channel() as channel,
            channel.bidi(path, answer, timeout_s=TIMEOUT_S) as call,
        ):
            await call.send(pb.AttestAgentRequest(params=params))
            message: Any = await call.receive()
            response = node.answer(message.challenge)
            await call.send(pb.AttestAgentRequest(challenge_response=response))
            message = await call.receive()
            assert message.result.svid.cert_chain


def _write(directory: Path, vendor: Vendor, revoked: TpmNode) -> None:
    for folder, ca in (("roots", vendor.root), ("intermediates", vendor.intermediate)):
        (directory / "makers" / folder).mkdir(parents=True)
        (directory / "makers" / folder / "a.pem").write_bytes(encode_pem(ca.certificate))
    (directory / "crls").mkdir()
    assert revoked.certificate is not None
    serial = parse_certificate(revoked.certificate).serial
    (directory / "crls" / "a.crl").write_bytes(vendor.intermediate.issue_crl(CrlSpec([serial])))
    # Of the root's own list nothing but an old one is left.
    old = CrlSpec(next_update=ekca.utc("20250102"), extensions=[])
    old.extensions.append(
        ekca.extension(ekca.CRL_SCOPE, ekca.tlv(0x30, b"\x81\x01\xff"), critical=True)
    )
    (directory / "crls" / "old.crl").write_bytes(vendor.root.issue_crl(old))


@pytest_asyncio.fixture
async def site(short_dir: Path, clock: SimClock) -> AsyncIterator[Site]:
    site = await Site.open(short_dir, clock)
    yield site
    await site.close()


def _weak(site: Site) -> TpmNode:
    """Return a node whose certificate has a key of the faulty generator."""
    node = TpmNode(SoftTpm(ek=make_ek("L-1")))
    spec = ek_spec(node.tpm.ek.private.public_key())
    good = node.tpm.ek.private.public_key().public_numbers().n  # type: ignore[union-attr]
    old, new = (n.to_bytes(256, "big") for n in (good, roca_modulus()))
    spec.spki = spec.spki.replace(old, new)
    node.certificate = site.vendor.intermediate.issue(spec)
    return node


def _direct(site: Site) -> TpmNode:
    """Return a node certified by the root itself, of which no list counts."""
    node = TpmNode(SoftTpm(ek=make_ek("L-2")))
    node.certificate = site.vendor.root.issue(ek_spec(node.tpm.ek.private.public_key()))
    return node


ROWS = {
    "unknown maker": (
        lambda _: Vendor.make("Stranger").equip(TpmNode(SoftTpm(ek=make_ek("L-2")))),
        PD,
        "ek: issuer is not trusted [ek_untrusted]",
    ),
    "not enrolled": (
        lambda _: TpmNode(SoftTpm(ek=make_ek("L-2"))),
        PD,
        "ek: endorsement key is not registered [ek_unlisted]",
    ),
    "revoked": (lambda site: site.revoked, PD, "ek: certificate is revoked [ek_revoked]"),
    "unknown": (_direct, UN, "ek: revocation state is not known [ek_revocation_unknown]"),
    "weak": (_weak, PD, "CVE-2017-15361"),
}


@pytest.mark.parametrize("row", ROWS)
async def test_refused_key_leaves_an_audit_record_alone(site: Site, row: str) -> None:
    make, kind, words = ROWS[row]
    node, honest = make(site), site.vendor.equip(TpmNode(SoftTpm(ek=make_ek("L-2"))))
    before = await site.agents()
    with pytest.raises(SpireHwError) as caught:
        await site.attest(node)
    assert caught.value.kind is kind
    assert caught.value.message.startswith("nodeattestor(tpm): ek: ")
    assert words in caught.value.message
    [record] = site.audit()
    assert record["status"] == "error"
    assert record["status_code"] == kind.name
    assert words in record["status_message"]
    # A key of the faulty generator is refused where it is read, before it has a hash.
    assert site.refused_hash() == (None if row == "weak" else node.ek_hash)
    assert await site.agents() == before
    await site.attest(honest)
    assert await site.agents() != before


@pytest.mark.parametrize("row", ["unknown maker", "not enrolled", "unknown"])
async def test_enrolment_lets_in_what_is_not_disowned(site: Site, row: str) -> None:
    node = ROWS[row][0](site)
    await site.enroll(node)
    await site.attest(node)


@pytest.mark.parametrize("row", ["revoked", "weak"])
async def test_enrolment_does_not_let_in_what_is_disowned(site: Site, row: str) -> None:
    node = ROWS[row][0](site)
    await site.enroll(node)
    with pytest.raises(SpireHwError) as caught:
        await site.attest(node)
    assert caught.value.kind is PD
