"""An agent of one make and a server of the other, from the first attestation to the ban.

The steps of a class are one story, told in order in one deployment.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from spire_hw.bundle.bundle import Bundle, X509Root
from spire_hw.spiffeid import TrustDomain
from spire_hw.svid.x509svid import parse_x509_svid, verify_x509_svid
from spire_hw.x509.certificate import load_chain
from spire_hw_sim.parties import TRUST_DOMAIN, WORKLOAD, Agent, Make, Party, Role, missing
from spire_hw_sim.pki import now
from spire_hw_sim.site import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw.svid.x509svid import X509Svid

TD = TrustDomain(TRUST_DOMAIN)
# Lives so short that several halves of them are over within a test.
TTLS = 'agent_ttl = "30s"\n  default_x509_svid_ttl = "30s"'
ROTATED_S = 90
SYNCED_S = 30


@dataclass
class Deployment:
    """A server of one make with an agent of the other."""

    party: Party
    agent: Agent
    attestor: str

    def svids(self, make: Make | None = None) -> list[X509Svid]:
        """Return the SVIDs the agent gives this process, each verified and with its key."""
        return [verified(found) for found in self.agent.fetch(make)]

    def wait_svid(self, spiffe_id: str = WORKLOAD, timeout_s: float = SYNCED_S) -> X509Svid:
        """Return an SVID as soon as there is one."""
        wait_until(f"an SVID for {spiffe_id}", lambda: self.find(spiffe_id), timeout_s)
        found = self.find(spiffe_id)
        assert found is not None
        return found

    def find(self, spiffe_id: str) -> X509Svid | None:
        return next((s for s in self.svids() if str(s.spiffe_id) == spiffe_id), None)

    def authorities(self) -> set[str]:
        """Return ids of the X.509 authorities a workload is told of."""
        return {
            root.authority_id
            for found in self.agent.fetch()
            for root in roots_of(found).x509_authorities
        }

    def local_authority(self, *arguments: str) -> dict[str, Any]:
        """Manage the server's CA keys; only upstream's program has the commands."""
        answer = self.party.server.ask("localauthority", *arguments, make=Make.UPSTREAM)
        assert isinstance(answer, dict)
        return answer


def roots_of(found: dict[str, Any]) -> Bundle:
    certificates = load_chain(base64.b64decode(found["bundle"]))
    encoded = [c.public_bytes(serialization.Encoding.DER) for c in certificates]
    return Bundle(TD, tuple(X509Root(der) for der in encoded))


def verified(found: dict[str, Any]) -> X509Svid:
    """Return the SVID of an answer after everything about it was checked."""
    svid = parse_x509_svid(load_chain(base64.b64decode(found["x509_svid"])))
    verify_x509_svid(svid, {TD: roots_of(found)}, now())
    key = serialization.load_der_private_key(base64.b64decode(found["x509_svid_key"]), None)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    der = serialization.Encoding.DER
    assert key.public_key().public_bytes(der, spki) == svid.public_key.public_bytes(der, spki)
    assert str(svid.spiffe_id) == found["spiffe_id"]
    return svid


def serial(svid: X509Svid) -> int:
    return svid.certificates[0].serial_number


def pairs() -> list[Any]:
    made = []
    for server, agent in ((Make.OURS, Make.UPSTREAM), (Make.UPSTREAM, Make.OURS)):
        role = Role.SERVER if server is Make.UPSTREAM else Role.AGENT
        # The commands that rotate the CA are in upstream's server program alone.
        reason = missing(role, Role.SERVER)
        made += [
            pytest.param(
                (server, agent, attestor),
                id=f"{server}-server-{agent}-agent-{attestor}",
                marks=pytest.mark.skipif(bool(reason), reason=reason),
            )
            for attestor in ("join_token", "x509pop")
        ]
    return made


@pytest.fixture(scope="class")
def deployment(request: pytest.FixtureRequest) -> Iterator[Deployment]:
    server, agent, attestor = request.param
    with Party() as party:
        party.open_server(server, keys=TTLS)
        failed = request.session.testsfailed
        yield Deployment(party, Agent(party, agent, attestor), attestor)
        if request.session.testsfailed > failed:
            print(party.logs())  # noqa: T201 - for whoever has to find out why


@pytest.mark.parametrize("deployment", pairs(), indirect=True, scope="class")
class TestAgent:
    def test_attest(self, deployment: Deployment) -> None:
        deployment.agent.start()
        record = deployment.agent.record()
        assert record is not None
        assert record["can_reattest"] is (deployment.attestor == "x509pop")
        assert not record["banned"]
        wait_until(
            "the agent has told its version",
            lambda: (deployment.agent.record() or {}).get("agent_version"),
        )
        if deployment.attestor != "x509pop":
            return
        certificate, root = deployment.agent.certificate, deployment.party.root
        fingerprints = [
            hashlib.sha1(c.der, usedforsecurity=False).hexdigest() for c in (certificate, root)
        ]
        assert record["id"]["path"] == f"/spire/agent/x509pop/{fingerprints[0]}"
        digits = f"{certificate.certificate.serial_number:x}"
        assert {s["value"] for s in record["selectors"]} == {
            "subject:cn:agent",
            f"ca:fingerprint:{fingerprints[1]}",
            f"serialnumber:{digits.zfill(len(digits) + len(digits) % 2)}",
        }

    def test_synchronise_and_fetch(self, deployment: Deployment) -> None:
        deployment.party.server.create_entry(deployment.agent.id)
        deployment.wait_svid()
        by_make = [{serial(s) for s in deployment.svids(make)} for make in Make]
        assert by_make[0] & by_make[1] or deployment.svids()  # rotated between the two
        assert len(deployment.authorities()) == 1

    def test_jwt_svid(self, deployment: Deployment) -> None:
        for fetcher in Make:
            done = deployment.agent.command(
                *("api", "fetch", "jwt", "-audience", "db", "-output", "json"), make=fetcher
            )
            assert done.returncode == 0, done.stderr
            token = next(
                part["svids"][0]["svid"] for part in _parts(done.stdout) if "svids" in part
            )
            for validator in Make:
                right = deployment.agent.command(
                    *("api", "validate", "jwt", "-audience", "db", "-svid", token), make=validator
                )
                assert right.returncode == 0, right.stderr
                assert WORKLOAD in right.stdout
                wrong = deployment.agent.command(
                    *("api", "validate", "jwt", "-audience", "web", "-svid", token), make=validator
                )
                assert wrong.returncode != 0

    def test_entries_change(self, deployment: Deployment) -> None:
        server, other = deployment.party.server, f"spiffe://{TRUST_DOMAIN}/other"
        entry_id = server.create_entry(
            deployment.agent.id, other, "-dns", "other.example", "-hint", "second"
        )
        svid = deployment.wait_svid(other)
        names = svid.certificates[0].extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.value.get_values_for_type(x509.DNSName) == ["other.example"]
        hints = {f["spiffe_id"]: f["hint"] for f in deployment.agent.fetch()}
        assert hints == {WORKLOAD: "", other: "second"}
        server.command("entry", "delete", "-entryID", entry_id)
        wait_until("it is taken back", lambda: not deployment.find(other), SYNCED_S)
        assert deployment.find(WORKLOAD)

    def test_svid_rotation(self, deployment: Deployment) -> None:
        first = serial(deployment.wait_svid())
        wait_until("a new SVID", lambda: serial(deployment.wait_svid()) != first, ROTATED_S)

    def test_agent_keeps_its_own_identity(self, deployment: Deployment) -> None:
        """Renewal with a join token, re-attestation with x509pop."""
        seen: set[str] = set()

        def often_enough() -> bool:
            record = deployment.agent.record()
            assert record is not None
            seen.add(record["x509svid_serial_number"])
            return len(seen) > 2

        wait_until("three SVIDs of the agent", often_enough, 2 * ROTATED_S)

    def test_server_restarts(self, deployment: Deployment) -> None:
        server = deployment.party.server
        first = serial(deployment.wait_svid())
        assert server.run.stop(30) == 0
        assert deployment.find(WORKLOAD), "the agent serves on while its server is away"
        server.start()
        wait_until("a new SVID", lambda: serial(deployment.wait_svid()) != first, ROTATED_S)

    def test_agent_restarts(self, deployment: Deployment) -> None:
        agent_id = deployment.agent.id
        assert deployment.agent.run.stop(30) == 0
        deployment.agent.start()
        deployment.wait_svid()
        assert deployment.agent.id == agent_id

    def test_x509_authority_rotation(self, deployment: Deployment) -> None:
        old = deployment.local_authority("x509", "show")["active"]["authority_id"]
        assert deployment.authorities() == {old}
        prepared = deployment.local_authority("x509", "prepare")
        new = prepared["prepared_authority"]["authority_id"]
        wait_until("both are published", lambda: deployment.authorities() == {old, new}, SYNCED_S)
        deployment.local_authority("x509", "activate", "-authorityID", new)
        deployment.local_authority("x509", "taint", "-authorityID", old)
        wait_until("SVIDs are signed by the new one", lambda: issuer(deployment) == new, ROTATED_S)
        # The agent's own SVID has to be replaced before the old authority is forgotten.
        first = (deployment.agent.record() or {})["x509svid_serial_number"]
        wait_until(
            "the agent has a new SVID too",
            lambda: (deployment.agent.record() or {})["x509svid_serial_number"] != first,
            ROTATED_S,
        )
        deployment.local_authority("x509", "revoke", "-authorityID", old)
        wait_until("the old one is gone", lambda: deployment.authorities() == {new}, SYNCED_S)
        before = serial(deployment.wait_svid())
        wait_until("a new SVID", lambda: serial(deployment.wait_svid()) != before, ROTATED_S)

    def test_jwt_authority_rotation(self, deployment: Deployment) -> None:
        old = deployment.local_authority("jwt", "show")["active"]["authority_id"]
        new = deployment.local_authority("jwt", "prepare")["prepared_authority"]["authority_id"]
        deployment.local_authority("jwt", "activate", "-authorityID", new)
        deployment.local_authority("jwt", "taint", "-authorityID", old)
        deployment.local_authority("jwt", "revoke", "-authorityID", old)

        def key_ids() -> set[str]:
            done = deployment.agent.command(
                *("api", "fetch", "jwt", "-audience", "rotated", "-output", "json")
            )
            if done.returncode:
                return set()
            tokens = [s["svid"] for part in _parts(done.stdout) for s in part.get("svids", ())]
            return {_header(token)["kid"] for token in tokens}

        wait_until("JWT-SVIDs are signed by the new key", lambda: key_ids() == {new}, SYNCED_S)

    def test_eviction(self, deployment: Deployment) -> None:
        agent, server = deployment.agent, deployment.party.server
        agent_id = agent.id
        server.command("agent", "evict", "-spiffeID", agent_id)
        if deployment.attestor == "x509pop":
            wait_until("the agent attests again", agent.record, ROTATED_S)
            assert agent.id == agent_id
            deployment.wait_svid()
        else:
            wait_until("the agent cannot go on", lambda: not agent.run.is_running, ROTATED_S)
            assert agent.record() is None

    def test_ban(self, deployment: Deployment) -> None:
        agent, server = deployment.agent, deployment.party.server
        if deployment.attestor == "join_token":
            deployment.agent = agent = Agent(
                deployment.party, agent.make, "join_token", name="second"
            )
            agent.start()
        server.command("agent", "ban", "-spiffeID", agent.id)
        wait_until("the banned agent ends", lambda: not agent.run.is_running, ROTATED_S)
        record = agent.record()
        assert record is not None
        assert record["banned"]
        agent.start(wait=False)
        wait_until(
            "it is refused when it comes back",
            lambda: not agent.run.is_running or "banned" in agent.run.log(),
            ROTATED_S,
        )
        assert not deployment.agent.fetch()


def issuer(deployment: Deployment) -> str:
    """Return the id of the authority that signed the workload's SVID."""
    certificate = deployment.wait_svid().certificates[-1]
    extension = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    return (extension.value.key_identifier or b"").hex()


def _parts(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    return found if isinstance(found, list) else [found]


def _header(token: str) -> dict[str, Any]:
    part = token.split(".", maxsplit=1)[0]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found
