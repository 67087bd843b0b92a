"""The same command by upstream's program and by ours, against a server of either make.

What is read is the same in JSON and, but for the order of lines, in words. What is written has the
same shape. What is refused is refused by both; words and exit statuses of refusals are our own.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw_sim.nodepki import PEM
from spire_hw_sim.parties import TRUST_DOMAIN, Agent, Make, Party, Role, Server, missing

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

ID = f"spiffe://{TRUST_DOMAIN}"
FOREIGN = "other.example"
PARENT = f"{ID}/parent"
_UNKNOWN_COMMAND = 127
_BASE = ("entry", "create", "-parentID", PARENT, "-selector", "unix:uid:1")
_PLAIN = f"-parentID {PARENT} -selector unix:uid:1"
_RICH = (
    "-dns a.example -hint x -x509SVIDTTL 60 -jwtSVIDTTL 30 -admin -downstream"
    f" -entryExpiry 2000000000 -federatesWith spiffe://{FOREIGN}"
)
_ENDPOINT = "-bundleEndpointURL https://127.0.0.1:1/ -bundleEndpointProfile https_web"
_REASON = missing(Role.SERVER, Role.AGENT)
pytestmark = pytest.mark.skipif(bool(_REASON), reason=_REASON)

# Placeholders: {agent} an attested agent's ID, {make} of the program that runs the command,
# {ca} a PEM file, {authority} the active X.509 authority.
READ = [
    "entry show",
    "entry show -entryID full",
    f"entry show -spiffeID {ID}/full",
    f"entry show -parentID {PARENT}",
    "entry show -selector unix:uid:1 -selector unix:gid:2",
    "entry show -selector unix:uid:1 -matchSelectorsOn exact",
    "entry show -selector unix:uid:1 -matchSelectorsOn any",
    "entry show -selector unix:uid:1 -selector unix:gid:2 -matchSelectorsOn subset",
    "entry show -downstream",
    "entry show -hint h",
    f"entry show -federatesWith spiffe://{FOREIGN}",
    "entry count",
    "entry count -downstream=true",
    "agent list",
    "agent list -attestationType x509pop",
    "agent list -attestationType none",
    "agent list -banned true",
    "agent list -banned=false",
    "agent list -canReattest true",
    "agent list -selector x509pop:subject:cn:agent -matchSelectorsOn superset",
    "agent count",
    "agent count -banned true",
    "agent show -spiffeID {agent}",
    "bundle show",
    "bundle list",
    f"bundle list -id spiffe://{FOREIGN}",
    "bundle count",
    "localauthority x509 show",
    "localauthority jwt show",
    "logger get",
    "federation list",
    "debug getinfo",
]
WRITTEN = [
    "token generate -ttl 60",
    f"token generate -spiffeID {ID}/rack-{{make}}",
    f"entry create {_PLAIN} -spiffeID {ID}/new-{{make}}",
    f"entry create -node -selector x509pop:subject:cn:x -spiffeID {ID}/node-{{make}}",
    f"entry create {_PLAIN} -spiffeID {ID}/all-{{make}} -entryID all-{{make}} {_RICH}",
    f"entry update -entryID all-{{make}} {_PLAIN} -spiffeID {ID}/changed-{{make}}",
    "entry delete -entryID all-{make}",
    "bundle set -id spiffe://{make}.example -path {ca}",
    "bundle delete -id spiffe://{make}.example",
    f"x509 mint -spiffeID {ID}/minted -dns minted.example",
    f"jwt mint -spiffeID {ID}/minted -audience db",
    "localauthority x509 prepare",
    "localauthority jwt prepare",
    "logger set -level info",
    "logger reset",
    f"federation create -trustDomain {{make}}.example {_ENDPOINT}",
    "federation delete -id {make}.example",
]
REFUSED = [
    "token generate -ttl 0",
    f"entry create {_PLAIN}",
    f"entry create -parentID {PARENT} -spiffeID {ID}/x",
    f"entry create -spiffeID {ID}/x -selector unix:uid:1",
    f"entry create {_PLAIN} -spiffeID {ID}/full",
    f"entry create {_PLAIN} -spiffeID spiffe://none.example/x",
    f"entry create {_PLAIN} -spiffeID {ID}/spire/server",
    f"entry create {_PLAIN} -spiffeID {ID}/x -federatesWith x.y",
    "entry create -selector unix:uid:1 -parentID nonsense -spiffeID nonsense",
    "entry show -entryID none",
    "entry show -selector unix:uid:1 -matchSelectorsOn nonsense",
    f"entry update -entryID none {_PLAIN} -spiffeID {ID}/x",
    "entry delete -entryID none",
    "entry delete",
    f"agent show -spiffeID {ID}/spire/agent/x509pop/none",
    f"agent evict -spiffeID {ID}/spire/agent/x509pop/none",
    f"agent ban -spiffeID {ID}/spire/agent/x509pop/none",
    f"agent evict -spiffeID {ID}/no-agent",
    f"bundle set -id {ID} -path {{ca}}",
    "bundle set -id spiffe://x.example -path /nonexistent",
    f"bundle delete -id spiffe://{FOREIGN}",
    "bundle delete -id spiffe://none.example",
    "bundle delete -id spiffe://x.example -mode nonsense",
    "x509 mint",
    "x509 mint -spiffeID spiffe://none.example/x",
    f"jwt mint -spiffeID {ID}/x",
    "localauthority x509 activate -authorityID none",
    "localauthority x509 taint -authorityID {authority}",
    "localauthority x509 revoke -authorityID {authority}",
    "localauthority jwt activate -authorityID none",
    "logger set -level nonsense",
    "nonsense",
    "entry nonsense",
    "entry show -nonsense",
]


class Bench:
    """A server with some of everything in it."""

    def __init__(self, party: Party, server: Server, agent: Agent) -> None:
        self.server = server
        self._values = {
            "agent": agent.id,
            "ca": party.root_path,
            "authority": server.ask("localauthority", "x509", "show", make=Make.UPSTREAM)["active"][
                "authority_id"
            ],
        }

    def run(self, command: str, make: Make, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a command by the program of a make."""
        text = command.format(make=make, **self._values)
        done = self.server.try_command(*text.split(), *more, make=make)
        if make is Make.OURS and done.returncode == _UNKNOWN_COMMAND and "nonsense" not in command:
            pytest.skip(f"our program has no command {command.split(maxsplit=1)[0]}")
        return done

    def both(self, command: str, *more: str) -> list[str]:
        """Return what both makes print for a command that succeeds."""
        found = []
        for make in (Make.OURS, Make.UPSTREAM):
            done = self.run(command, make, *more)
            assert done.returncode == 0, (make, done.stderr)
            found.append(done.stdout)
        return found


@pytest.fixture(scope="module", params=Make, ids=lambda make: f"{make}-server")
def deployment(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with Party() as party:
        server = party.open_server(request.param)
        agent = Agent(party, request.param, "x509pop")
        agent.start()
        (party.directory / "other.pem").write_bytes(party.root.certificate.public_bytes(PEM))
        server.command("bundle", "set", "-id", FOREIGN, "-path", party.directory / "other.pem")
        server.command(*_BASE, "-spiffeID", f"{ID}/plain", "-entryID", "plain")
        server.command(
            *(*_BASE, "-selector", "unix:gid:2", "-spiffeID", f"{ID}/rich", "-entryID", "rich"),
            *("-dns", "a.example", "-dns", "b.example", "-hint", "h", "-federatesWith", FOREIGN),
            *("-x509SVIDTTL", "60", "-jwtSVIDTTL", "30", "-downstream", "-admin"),
        )
        server.command(*_BASE, "-spiffeID", f"{ID}/full", "-entryID", "full")
        yield Bench(party, server, agent)


@pytest.mark.parametrize("command", READ)
def test_reading(deployment: Bench, command: str) -> None:
    ours, theirs = (_comparable(text) for text in deployment.both(command, "-output", "json"))
    assert ours == theirs
    words = [sorted(_lines(text)) for text in deployment.both(command)]
    assert words[0] == words[1]


@pytest.mark.parametrize("command", WRITTEN)
def test_writing(deployment: Bench, command: str) -> None:
    ours, theirs = deployment.both(command, "-output", "json")
    assert shape(json.loads(ours)) == shape(json.loads(theirs))


@pytest.mark.parametrize("command", REFUSED)
def test_refusing(deployment: Bench, command: str) -> None:
    for make in Make:
        done = deployment.run(command, make)
        assert done.returncode != 0, (make, done.stdout)
        assert done.stderr


def shape(value: Any) -> Any:
    """Return JSON with every scalar replaced by the name of its type, lists by one element."""
    if isinstance(value, dict):
        return {name: shape(member) for name, member in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def _comparable(text: str) -> Any:
    found = json.loads(text)
    if isinstance(found, dict):
        found.pop("uptime", None)
    return found


def _lines(text: str) -> list[str]:
    return [re.sub(r"(Uptime: +)\S+", r"\1-", line.rstrip()) for line in text.splitlines() if line]
