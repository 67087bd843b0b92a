"""Keys of every kind between the two makes: nodes' certificates, authorities, workloads."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw_sim.nodepki import rsa_key
from spire_hw_sim.parties import Agent, Make, Party, Role, missing
from spire_hw_sim.site import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

_REASON = missing(Role.SERVER, Role.AGENT)
pytestmark = [
    pytest.mark.skipif(bool(_REASON), reason=_REASON),
    pytest.mark.parametrize(
        ("server_make", "agent_make"),
        [(Make.OURS, Make.UPSTREAM), (Make.UPSTREAM, Make.OURS)],
        ids=["ours-server-upstream-agent", "upstream-server-ours-agent"],
    ),
]
NODE_KEYS: dict[str, Callable[[], Any]] = {
    "rsa-2048": rsa_key,
    "rsa-3072": lambda: rsa_key(3072),
    "ec-p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ec-p521": lambda: ec.generate_private_key(ec.SECP521R1()),
}


def test_node_certificates(server_make: Make, agent_make: Make) -> None:
    """x509pop with intermediates and with every kind of key."""
    with Party() as party:
        server = party.open_server(server_make)
        for name, make_key in NODE_KEYS.items():
            node = party.root.below().issue(make_key(), common_name=name)
            agent = Agent(party, agent_make, "x509pop", name=name, certificate=node)
            agent.start()
            assert agent.run.stop(30) == 0
        names = {
            selector["value"].removeprefix("subject:cn:")
            for record in server.agents()
            for selector in record["selectors"]
            if selector["value"].startswith("subject:cn:")
        }
        assert names == set(NODE_KEYS)


@pytest.mark.parametrize(
    ("ca", "jwt", "workload"),
    [
        ("rsa-2048", "rsa-2048", "rsa-2048"),
        ("ec-p384", "ec-p384", "ec-p384"),
        ("rsa-4096", "ec-p256", "ec-p256"),
    ],
)
def test_authorities_and_workloads(
    server_make: Make, agent_make: Make, ca: str, jwt: str, workload: str
) -> None:
    with Party() as party:
        server = party.open_server(
            server_make, keys=f'ca_key_type = "{ca}"\n jwt_key_type = "{jwt}"'
        )
        agent = Agent(
            party, agent_make, "x509pop", keys=f'workload_x509_svid_key_type = "{workload}"'
        )
        agent.start()
        server.create_entry(agent.id)
        wait_until("an SVID", agent.fetch, 60)
        (found,) = agent.fetch()
        key = serialization.load_der_private_key(base64.b64decode(found["x509_svid_key"]), None)
        assert isinstance(key, rsa.RSAPrivateKey) is workload.startswith("rsa")
        for make in Make:
            done = agent.command("api", "fetch", "jwt", "-audience", "db", make=make)
            assert done.returncode == 0, done.stderr
