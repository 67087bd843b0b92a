"""The attestor in a process of its own: what it refuses has the same code and words as inside."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw._pb import server_agent_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.config import hcl
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw_plugins.nodeattestor.tpm.wire import decode_challenge, encode_response
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings
from spire_hw_sim.servers import (
    AGENT,
    TIMEOUT_S,
    Operator,
    ScriptedAgent,
    make_csr,
    server_config,
)
from spire_hw_sim.softtpm import AK_ATTRIBUTES, SoftTpm, make_ak, make_ek
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from spire_hw_plugins.nodeattestor.tpm.wire import Response

pytestmark = pytest.mark.asyncio

LIMITS = "ratelimit { attestation = false signing = false }"
VENDOR = Vendor.make()
KEY = ec.generate_private_key(ec.SECP256R1())
IA, PD = ErrorKind.INVALID_ARGUMENT, ErrorKind.PERMISSION_DENIED


@pytest_asyncio.fixture
async def server(short_dir: Path) -> AsyncIterator[Server]:
    (short_dir / "roots.der").write_bytes(VENDOR.root.certificate)
    command = Path(sys.executable).with_name("spire-hw-plugin")
    outside = f'plugin_cmd = "{command}" plugin_args = ["serve", "NodeAttestor", "tpm"]'
    plugin = f"""
      NodeAttestor "tpm" {{
        {outside}
        plugin_data {{
          endorsement_ca_path = "{short_dir}/roots.der" ek_policy = "ca"
          require_tpm_key = false bind_csr = false
        }}
      }}"""
    text = server_config(short_dir, key_manager="memory", more=LIMITS, plugins=plugin)
    running = Server(build_settings(hcl.parse(text, "server.conf")))
    await running.start()
    yield running
    await running.close()


async def attest(
    server: Server, node: TpmNode, payload: bytes, bend: Callable[[Response], Response]
) -> None:
    operator = Operator(server.settings.socket_path)
    stranger = ScriptedAgent(server.port, await operator.bundle(), server.clock)
    await operator.close()
    csr = await make_csr(KEY)
    params = pb.AttestAgentRequest.Params(
        data=types_pb2.AttestationData(type="tpm", payload=payload),
        params=pb.AgentX509SVIDParams(csr=csr),
    )
    async with (
        await stranger.channel() as channel,
        channel.bidi(AGENT + "AttestAgent", pb.AttestAgentResponse, timeout_s=TIMEOUT_S) as call,
    ):
        await call.send(pb.AttestAgentRequest(params=params))
        message: Any = await call.receive()
        said = encode_response(bend(node.respond(decode_challenge(message.challenge))))
        await call.send(pb.AttestAgentRequest(challenge_response=said))
        message = await call.receive()
        assert message.result.svid.cert_chain


def machine() -> TpmNode:
    return VENDOR.equip(TpmNode(SoftTpm(ek=make_ek("L-2")), key=None))


def stranger() -> TpmNode:
    return Vendor.make("Stranger").equip(machine())


def free() -> TpmNode:
    node = machine()
    node.tpm.ak = make_ak(attributes=AK_ATTRIBUTES & ~(1 << 16))
    return node


def other_sign(response: Response) -> Response:
    quote = response.quotes[0]
    bent = quote.sig[:-1] + bytes((quote.sig[-1] ^ 1,))
    return replace(response, quotes=(replace(quote, sig=bent),))


def as_it_is(response: Response) -> Response:
    return response


CASES: list[tuple[Callable[[], TpmNode], bytes, Callable[[Response], Response], ErrorKind, str]] = [
    (machine, b"[]", as_it_is, IA, "envelope: one JSON object expected"),
    (stranger, b"", as_it_is, PD, "ek: issuer is not trusted [ek_untrusted]"),
    (free, b"", as_it_is, IA, "ak: key is not restricted [ak_attributes]"),
    (
        machine,
        b"",
        lambda r: replace(r, secret=bytes(32)),
        IA,
        "challenge: secret does not match [secret_mismatch]",
    ),
    (machine, b"", other_sign, IA, "quote: signature does not verify [quote_signature]"),
]


async def test_refusals_have_one_code_and_one_text(server: Server) -> None:
    for make, payload, bend, kind, words in CASES:
        node = make()
        with pytest.raises(SpireHwError) as caught:
            await attest(server, node, payload or node.payload(), bend)
        assert caught.value.kind is kind
        assert caught.value.message == f"nodeattestor(tpm): {words}"
    node = machine()
    await attest(server, node, node.payload(), as_it_is)
