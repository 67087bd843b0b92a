"""The remaining plugin kinds over the wire."""

from __future__ import annotations

import os
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw._pb import plugin_agent_workloadattestor_pb2 as workload_pb
from spire_hw._pb import plugin_server_credentialcomposer_pb2 as composer_pb
from spire_hw._pb import plugin_server_notifier_pb2 as notifier_pb
from spire_hw._pb import plugin_server_upstreamauthority_pb2 as upstream_pb
from spire_hw._pb import plugin_types_pb2 as types_pb
from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import ErrorKind, InvalidInputError, SpireHwError, UnavailableError
from spire_hw.goplugin.facade import credentialcomposer, notifier, workloadattestor
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.plugin.credentialcomposer import (
    CredentialComposer,
    DistinguishedName,
    JwtSvidAttributes,
    X509CaAttributes,
    X509SvidAttributes,
)
from spire_hw.plugin.info import PluginKind, Side
from spire_hw.plugin.svidstore import StoredX509Svid
from spire_hw.plugin.upstreamauthority import LocalBundle, UpstreamX509Ca
from spire_hw.spiffeid import SpiffeId, TrustDomain
from spire_hw.transport.process import Process
from spire_hw.x509.extension import Extension
from spire_hw.x509.issue import issue_ca_certificate
from tests.integration.goplugin.wire import remote_of, remote_to, serving

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

TD = TrustDomain.parse("example.org")
OTHER = TrustDomain.parse("other.org")
NOW = datetime(2026, 11, 22, 8, tzinfo=UTC)
KEY = generate_private_key(KeyType.EC_P256)
SPKI = spki_der(KEY.public_key())
JWT = JwtAuthority("kid", SPKI, NOW, tainted=True)
WORKLOAD = SpiffeId.parse("spiffe://example.org/web")


async def ca() -> bytes:
    later = NOW + timedelta(days=1)
    signer = SoftwareSigner(KEY)
    return await issue_ca_certificate(
        None, trust_domain=TD, not_before=NOW, not_after=later, signer=signer
    )


async def bundle() -> Bundle:
    return Bundle(TD, (X509Root(await ca(), tainted=True),), (JWT,), 300, 7)


# -- workload attestor --------------------------------------------------------------------


class Looking:
    def __init__(self, values: list[str]) -> None:
        self._values = values
        self.seen: list[tuple[int, int, int, bool]] = []

    async def attest(self, process: Any) -> list[str]:
        self.seen.append((process.pid, process.uid, process.gid, process.alive()))
        return self._values


@pytest.mark.asyncio
async def test_a_workload_is_named_by_its_process_id(tmp_path: Path) -> None:
    plugin, process = Looking(["uid:0", "a:b"]), Process.of(os.getpid())
    kind = PluginKind.WORKLOAD_ATTESTOR
    async with remote_of(plugin, kind, tmp_path, Side.AGENT) as remote:
        assert await remote.attest(process) == ["uid:0", "a:b"]
    assert plugin.seen == [(os.getpid(), os.geteuid(), os.getegid(), True)]
    process.close()


@pytest.mark.asyncio
async def test_what_is_said_about_a_process_that_has_gone_does_not_count(tmp_path: Path) -> None:
    process = Process.of(os.getpid())
    process.close()
    kind = PluginKind.WORKLOAD_ATTESTOR
    async with remote_of(Looking(["uid:0"]), kind, tmp_path, Side.AGENT) as remote:
        with pytest.raises(UnavailableError, match="ended while workloadattestor"):
            await remote.attest(process)


class ByReference:
    def __init__(self) -> None:
        self.references: list[str] = []

    async def attest(self, request: Any, call: Any) -> Any:
        raise SpireHwError("not here", kind=ErrorKind.UNIMPLEMENTED)

    async def attest_reference(self, request: Any, call: Any) -> Any:
        self.references.append(request.reference.type_url)
        return workload_pb.AttestReferenceResponse(selector_values=["by:reference"])


@pytest.mark.asyncio
async def test_a_plugin_that_knows_references_alone_is_asked_by_reference(tmp_path: Path) -> None:
    plugin, process = ByReference(), Process.of(os.getpid())
    kind = PluginKind.WORKLOAD_ATTESTOR
    async with remote_to(plugin, workload_pb.DESCRIPTOR, kind, tmp_path, Side.AGENT) as remote:
        assert await remote.attest(process) == ["by:reference"]
    assert plugin.references == ["type.googleapis.com/spiffe.broker.WorkloadPIDReference"]
    process.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("values", [["a\0b"], [""], ["x"] * 1001])
async def test_selectors_that_cannot_be_are_refused(values: list[str], tmp_path: Path) -> None:
    process, kind = Process.of(os.getpid()), PluginKind.WORKLOAD_ATTESTOR
    async with remote_of(Looking(values), kind, tmp_path, Side.AGENT) as remote:
        with pytest.raises(SpireHwError, match="not acceptable"):
            await remote.attest(process)
    process.close()


@pytest.mark.asyncio
async def test_references_of_other_types_and_processes_that_are_not_there(tmp_path: Path) -> None:
    path = "/spire.plugin.agent.workloadattestor.v1.WorkloadAttestor/"
    methods = workloadattestor.methods(Looking([]), Side.AGENT)
    pod = workload_pb.AttestReferenceRequest()
    pod.reference.Pack(types_pb.Bundle())
    broken = workload_pb.AttestReferenceRequest()
    broken.reference.type_url = "type.googleapis.com/spiffe.broker.WorkloadPIDReference"
    broken.reference.value = b"\xff"
    async with serving(methods, tmp_path) as channel:
        for request in (pod, broken):
            with pytest.raises(SpireHwError, match="reference"):
                await channel.unary(
                    path + "AttestReference", request, workload_pb.AttestReferenceResponse
                )
        for pid, words in (
            (0, "not a process id"),
            (-1, "not a process id"),
            (2**30, "no process"),
        ):
            with pytest.raises(SpireHwError, match=words):
                await channel.unary(
                    path + "Attest", workload_pb.AttestRequest(pid=pid), workload_pb.AttestResponse
                )


# -- SVID store ---------------------------------------------------------------------------


class Storing:
    def __init__(self) -> None:
        self.put: list[tuple[StoredX509Svid, list[str]]] = []
        self.deleted: list[list[str]] = []

    async def put_x509_svid(self, svid: StoredX509Svid, metadata: Sequence[str]) -> None:
        self.put.append((svid, list(metadata)))

    async def delete_x509_svid(self, metadata: Sequence[str]) -> None:
        self.deleted.append(list(metadata))


@pytest.mark.asyncio
async def test_svids_go_into_a_store_and_out_of_it(tmp_path: Path) -> None:
    root, plugin = await ca(), Storing()
    svid = StoredX509Svid(
        WORKLOAD, (root,), b"key", (root, root), NOW, {TD: (root,), OTHER: (root, root)}
    )
    async with remote_of(plugin, PluginKind.SVID_STORE, tmp_path, Side.AGENT) as remote:
        await remote.put_x509_svid(svid, ["name:x"])
        await remote.delete_x509_svid(["name:x"])
        with pytest.raises(InvalidInputError, match="certificate chain"):
            await remote.put_x509_svid(replace(svid, chain=()), [])
        with pytest.raises(InvalidInputError, match="private key is missing"):
            await remote.put_x509_svid(replace(svid, private_key=b""), [])
    assert plugin.put == [(svid, ["name:x"])]
    assert plugin.deleted == [["name:x"]]
    assert "key" not in repr(svid).replace("private_key", "")


# -- notifier and bundle publisher --------------------------------------------------------


class Told:
    def __init__(self) -> None:
        self.seen: list[tuple[str, Bundle]] = []

    async def notify_bundle_updated(self, bundle: Bundle) -> None:
        self.seen.append(("updated", bundle))

    async def notify_and_advise_bundle_loaded(self, bundle: Bundle) -> None:
        self.seen.append(("loaded", bundle))

    async def publish_bundle(self, bundle: Bundle) -> None:
        self.seen.append(("published", bundle))


@pytest.mark.asyncio
async def test_bundles_arrive_whole(tmp_path: Path) -> None:
    plugin, given = Told(), await bundle()
    async with remote_of(plugin, PluginKind.NOTIFIER, tmp_path) as remote:
        await remote.notify_bundle_updated(given)
        await remote.notify_and_advise_bundle_loaded(given)
    async with remote_of(plugin, PluginKind.BUNDLE_PUBLISHER, tmp_path) as remote:
        await remote.publish_bundle(given)
    assert plugin.seen == [("updated", given), ("loaded", given), ("published", given)]


@pytest.mark.asyncio
async def test_a_large_bundle_arrives(tmp_path: Path) -> None:
    keys = tuple(JwtAuthority(f"{n}" + "k" * 8000, SPKI) for n in range(1000))
    plugin, given = Told(), Bundle(TD, (), keys)
    async with remote_of(plugin, PluginKind.BUNDLE_PUBLISHER, tmp_path) as remote:
        await remote.publish_bundle(given)
    assert plugin.seen == [("published", given)]


@pytest.mark.asyncio
async def test_events_from_the_future_are_answered_well(tmp_path: Path) -> None:
    plugin = Told()
    async with serving(notifier.methods(plugin, Side.SERVER), tmp_path) as channel:
        path = "/spire.plugin.server.notifier.v1.Notifier/Notify"
        await channel.unary(path, b"\x12\x02\x08\x01", notifier_pb.NotifyResponse)
    assert plugin.seen == []


# -- upstream authority -------------------------------------------------------------------


class Minting:
    def __init__(self, answers: list[UpstreamX509Ca]) -> None:
        self._answers = answers
        self.asked: list[tuple[bytes, timedelta]] = []

    async def mint_x509_ca(
        self, csr: bytes, preferred_ttl: timedelta
    ) -> AsyncGenerator[UpstreamX509Ca, None]:
        self.asked.append((csr, preferred_ttl))
        for answer in self._answers:
            yield answer


class Publishing(Minting):
    async def publish_jwt_key(
        self, key: JwtAuthority
    ) -> AsyncGenerator[tuple[JwtAuthority, ...], None]:
        yield (key,)
        yield ()

    async def subscribe_to_local_bundle(self) -> AsyncGenerator[LocalBundle, None]:
        yield LocalBundle((X509Root(await ca()),), (JWT,))


@pytest.mark.asyncio
async def test_a_ca_is_minted_and_roots_are_followed(tmp_path: Path) -> None:
    root = await ca()
    answers = [
        UpstreamX509Ca((root,), (X509Root(root),)),
        UpstreamX509Ca((), (X509Root(root, tainted=True),)),
    ]
    plugin = Minting(answers)
    async with remote_of(plugin, PluginKind.UPSTREAM_AUTHORITY, tmp_path) as remote:
        ttl = timedelta(hours=2)
        assert [minted async for minted in remote.mint_x509_ca(b"csr", ttl)] == answers
        with pytest.raises(SpireHwError) as caught:
            await anext(remote.publish_jwt_key(JWT))
        assert caught.value.kind is ErrorKind.UNIMPLEMENTED
        with pytest.raises(SpireHwError, match="not supported"):
            await anext(remote.subscribe_to_local_bundle())
    assert plugin.asked == [(b"csr", ttl)]


@pytest.mark.asyncio
async def test_jwt_keys_and_local_bundles_are_followed(tmp_path: Path) -> None:
    async with remote_of(Publishing([]), PluginKind.UPSTREAM_AUTHORITY, tmp_path) as remote:
        assert [keys async for keys in remote.publish_jwt_key(JWT)] == [(JWT,), ()]
        found = [local async for local in remote.subscribe_to_local_bundle()]
        assert [len(local.x509_roots) for local in found] == [1]
        async with aclosing(remote.publish_jwt_key(JWT)) as keys:
            assert await anext(keys) == (JWT,)


def certificate(der: bytes) -> types_pb.X509Certificate:
    return types_pb.X509Certificate(asn1=der)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("chains", "roots", "words"),
    [
        ([], [], "ended without one"),
        ([0], [1], "0 certificates"),
        ([17], [1], "17 certificates"),
        ([1], [0], "no upstream roots"),
        ([1], [1025], "1025 of them"),
        ([1, 1], [1, 1], "a second certificate chain"),
    ],
)
async def test_a_ca_that_cannot_be_is_refused(
    chains: list[int], roots: list[int], words: str, tmp_path: Path
) -> None:
    der = await ca()

    class Script:
        async def mint_x509ca_and_subscribe(self, request: Any, call: Any) -> Any:
            for length, count in zip(chains, roots, strict=True):
                yield upstream_pb.MintX509CAResponse(
                    x509_ca_chain=[certificate(der)] * length,
                    upstream_x509_roots=[certificate(der)] * count,
                )

        publish_jwt_key_and_subscribe = subscribe_to_local_bundle = mint_x509ca_and_subscribe

    kind = PluginKind.UPSTREAM_AUTHORITY

    async def all_of(remote: Any) -> None:
        async for _ in remote.mint_x509_ca(b"csr", timedelta()):
            continue

    async with remote_to(Script(), upstream_pb.DESCRIPTOR, kind, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=words):
            await all_of(remote)


# -- credential composer ------------------------------------------------------------------

SUBJECT = DistinguishedName(country=("US",), common_name="x", extra_names=(("2.5.4.65", "p"),))
SVID = X509SvidAttributes(SUBJECT, ("a.example",), (Extension("1.2.3", b"\x05\x00", True),))
CLAIMS = {"sub": str(WORKLOAD), "exp": 1763800000, "n": None, "b": True, "l": [1, 2.5, {"x": {}}]}


class Composing(CredentialComposer):
    async def compose_server_x509_ca(self, attributes: X509CaAttributes) -> X509CaAttributes:
        return replace(attributes, policy_identifiers=("1.2.3.4",))

    async def compose_workload_x509_svid(
        self, spiffe_id: SpiffeId, public_key: Any, attributes: X509SvidAttributes
    ) -> X509SvidAttributes:
        assert (spiffe_id, spki_der(public_key)) == (WORKLOAD, SPKI)
        return replace(attributes, dns_names=(*attributes.dns_names, "b.example"))

    async def compose_workload_jwt_svid(
        self, spiffe_id: SpiffeId, attributes: JwtSvidAttributes
    ) -> JwtSvidAttributes:
        return JwtSvidAttributes({**attributes.claims, "team": "blue"})


@pytest.mark.asyncio
async def test_composers_amend_what_they_want_and_leave_the_rest(tmp_path: Path) -> None:
    async with remote_of(Composing(), PluginKind.CREDENTIAL_COMPOSER, tmp_path) as remote:
        authority = X509CaAttributes(SUBJECT, (), SVID.extra_extensions)
        made = await remote.compose_server_x509_ca(authority)
        assert made == replace(authority, policy_identifiers=("1.2.3.4",))
        made = await remote.compose_workload_x509_svid(WORKLOAD, KEY.public_key(), SVID)
        assert made == replace(SVID, dns_names=("a.example", "b.example"))
        made = await remote.compose_workload_jwt_svid(WORKLOAD, JwtSvidAttributes(CLAIMS))
        assert made.claims == CLAIMS | {"team": "blue"}
        assert [type(made.claims[name]) for name in ("exp", "b")] == [int, bool]
        assert await remote.compose_agent_x509_svid(WORKLOAD, KEY.public_key(), SVID) is None
        assert await remote.compose_server_x509_svid(SVID) is None


@pytest.mark.asyncio
async def test_fields_newer_than_this_code_come_back_from_a_composer(tmp_path: Path) -> None:
    unknown = b"\xa2\x06\x03new"  # field 100
    request = composer_pb.ComposeServerX509CARequest()
    request.attributes.subject.common_name = "x"
    raw = request.attributes.SerializeToString() + unknown
    request.attributes.ParseFromString(raw)
    methods = credentialcomposer.methods(Composing(), Side.SERVER)
    async with serving(methods, tmp_path) as channel:
        answer = await channel.unary(
            "/spire.plugin.server.credentialcomposer.v1.CredentialComposer/ComposeServerX509CA",
            request,
            composer_pb.ComposeServerX509CAResponse,
        )
    assert unknown in answer.attributes.SerializeToString()
    assert answer.attributes.policy_identifiers == ["1.2.3.4"]


def svid_answer(**values: Any) -> composer_pb.X509SVIDAttributes:
    return composer_pb.X509SVIDAttributes(**values)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        (svid_answer(dns_sans=["not a name"]), "DNS"),
        (svid_answer(dns_sans=["a.example"] * 1025), "1025"),
        (svid_answer(extra_extensions=[{"oid": "1.2", "value": b"x"}] * 2), "twice"),
        (svid_answer(extra_extensions=[{"oid": "2.5.29.17"}]), "by the server alone"),
        (svid_answer(extra_extensions=[{"oid": "1.2.x"}]), "OID"),
        (svid_answer(extra_extensions=[{"oid": "1.2", "value": b"x" * 65537}]), "over 65536"),
        (svid_answer(subject={"common_name": "x" * 1025}), "common name"),
        (svid_answer(subject={"country": ["US"] * 65}), "country"),
        (svid_answer(subject={"extra_names": [{"oid": "", "string_value": "x"}]}), "OID"),
    ],
)
async def test_attributes_that_cannot_be_are_refused(
    attributes: Any, words: str, tmp_path: Path
) -> None:
    class Script:
        async def compose_server_x509_svid(self, request: Any, call: Any) -> Any:
            return composer_pb.ComposeServerX509SVIDResponse(attributes=attributes)

        compose_server_x509_ca = compose_agent_x509_svid = compose_server_x509_svid
        compose_workload_x509_svid = compose_workload_jwt_svid = compose_server_x509_svid

    kind = PluginKind.CREDENTIAL_COMPOSER
    async with remote_to(Script(), composer_pb.DESCRIPTOR, kind, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=words):
            await remote.compose_server_x509_svid(SVID)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ({"sub": "spiffe://example.org/admin"}, "changes the subject"),
        ({"sub": str(WORKLOAD), "x": float("nan")}, "not finite"),
        ({"sub": str(WORKLOAD), "x": [0] * 10_000}, "too many"),
    ],
)
async def test_claims_that_cannot_be_are_refused(
    claims: dict[str, Any], words: str, tmp_path: Path
) -> None:
    class Script:
        async def compose_workload_jwt_svid(self, request: Any, call: Any) -> Any:
            answer = composer_pb.ComposeWorkloadJWTSVIDResponse()
            answer.attributes.claims.update(claims)
            return answer

        compose_server_x509_ca = compose_agent_x509_svid = compose_workload_jwt_svid
        compose_workload_x509_svid = compose_server_x509_svid = compose_workload_jwt_svid

    kind = PluginKind.CREDENTIAL_COMPOSER
    async with remote_to(Script(), composer_pb.DESCRIPTOR, kind, tmp_path) as remote:
        with pytest.raises(SpireHwError, match=words):
            await remote.compose_workload_jwt_svid(WORKLOAD, JwtSvidAttributes(CLAIMS))
