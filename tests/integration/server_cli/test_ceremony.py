"""A root that is kept offline, from its key to a workload: two tokens, one server, the commands."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.cli.run import run
from spire_hw.clock import SystemClock
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.spiffeid import SpiffeId
from spire_hw.x509.authority import ParentCa
from spire_hw.x509.certificate import encode_pem, load_certificate, parse_pem
from spire_hw.x509.csr import build_csr
from spire_hw.x509.issue import issue_ca_certificate
from spire_hw.x509.name import Subject
from spire_hw_server.cli.commands import root
from spire_hw_sim.programs import command_line
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.terminal import Terminal
from spire_hw_sim.world import TRUST_DOMAIN, World

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
PIN = "1234"


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


class Offline:
    """The root's own machine: a token, and the commands."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys
        self.hsm = SoftHsm(folder / "root-hsm")
        self.hsm.init_token("root", pin=PIN)
        self.pin = folder / "root-pin"
        self.pin.touch(mode=0o600)
        self.pin.write_text(PIN)
        self.number = 0

    def key(self, label: str = "root-2026") -> str:
        query = f"module-path={self.hsm.module}&pin-source=file:{self.pin}"
        return f"pkcs11:token=root;object={label}?{query}"

    async def run(self, *words: str | Path) -> Answer:
        self.capsys.readouterr()
        arguments = [str(word) for word in words]
        code = await asyncio.to_thread(run, root, "spire-hw-server", arguments)
        said = self.capsys.readouterr()
        return Answer(code, said.out, said.err)

    async def root(self, *more: str, label: str = "root-2026") -> Answer:
        files = ("-out", self.folder / f"{label}.pem", "-record", self.folder / label)
        name = ("-commonName", "Sim Root", "-organization", "Sim")
        return await self.run("ca", "root", "-key", self.key(label), *name, *files, *more)

    async def sign(self, csr: Path, *more: str, label: str = "root-2026") -> Answer:
        self.number += 1
        files = ("-out", self.out, "-record", self.folder / f"ceremony-{self.number}")
        cert = ("-cert", self.folder / f"{label}.pem", "-csr", csr)
        common = ("-key", self.key(label), "-trustDomain", TRUST_DOMAIN)
        return await self.run("ca", "sign", *common, *cert, *files, *more)

    @property
    def out(self) -> Path:
        return self.folder / f"signed-{self.number}.pem"

    @property
    def root_file(self) -> Path:
        return self.folder / "root-2026.pem"


@pytest.fixture
def offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Offline:
    made = Offline(tmp_path, capsys)
    for name, value in made.hsm.environment.items():
        monkeypatch.setenv(name, value)
    return made


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    hsm = SoftHsm(tmp_path / "server-hsm")
    hsm.init_token("server", pin=PIN)
    pin = tmp_path / "server-pin"
    pin.touch(mode=0o600)
    pin.write_text(PIN)
    plugin = f"""KeyManager "pkcs11" {{ plugin_data {{
      module_path = "{hsm.module}"
      token_label = "server"
      pin_file = "{pin}"
      key_identifier_value = "server-1"
      environment {{ SOFTHSM2_CONF = "{hsm.conf}" }}
    }} }}"""
    async with World(server_plugins=plugin) as made:
        yield made


def socket(world: World) -> tuple[str, str]:
    return ("-socketPath", str(world.directory / "s.sock"))


async def openssl_verifies(root: Path, chain: tuple[bytes, ...], folder: Path) -> str:
    (folder / "leaf.pem").write_bytes(encode_pem(chain[:1]))
    (folder / "above.pem").write_bytes(encode_pem(chain[1:]))
    process = await asyncio.create_subprocess_exec(
        *("openssl", "verify", "-x509_strict", "-CAfile", str(root)),
        *("-untrusted", str(folder / "above.pem"), str(folder / "leaf.pem")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return out.decode().strip()


async def test_a_workload_hangs_from_a_root_that_was_never_online(
    offline: Offline, world: World, tmp_path: Path
) -> None:
    # Nobody is there to be asked: no key is left on the token either, which -yes would run into.
    assert "nobody to ask" in (await offline.root()).err
    made = await offline.root("-yes")
    assert made.code == 0, made.err
    assert "Witnesses" in made.out
    record = json.loads((tmp_path / "root-2026.json").read_text())
    assert record["key"]["sensitive"] == "true"
    assert record["key"]["never_extractable"] == "true"
    before = world.server.manager.x509_slots.active
    assert before is not None

    csr = tmp_path / "server.csr"
    asked = await offline.run("ca", "csr", "-out", csr, *socket(world))
    assert asked.code == 0, asked.err
    assert "x509-CA-B" in asked.out
    # A restart, and a rotation that is not due yet, leave the key of the request alone.
    await world.start_server(await world.stop_server())
    await world.server.manager.tick()
    refused = await offline.sign(csr)
    assert refused.code == 2
    assert "nobody to ask" in refused.err
    assert "Key SHA-256" in refused.err
    assert not offline.out.exists()
    signed = await offline.sign(csr, "-yes", "-ttl", "720h")
    assert signed.code == 0, signed.err
    record = json.loads((tmp_path / f"ceremony-{offline.number}.json").read_text())
    assert record["plan"]["trust_domain"] == f"spiffe://{TRUST_DOMAIN}"
    assert record["plan"]["path_length"] == "0"
    assert record["result"]["certificate_sha256"] in signed.out

    files = ("-chain", str(offline.out), "-root", str(offline.root_file))
    taken = await offline.run("ca", "import", *files, "-activate", *socket(world))
    assert taken.code == 0, taken.err
    active = world.server.manager.x509_slots.active
    assert active is not None
    assert active.authority_id == record["result"]["authority_id"]
    assert active.upstream_authority_id in {
        r.authority_id for r in (await world.bundle()).x509_authorities
    }
    async with await world.agent() as agent:
        current = agent.identity.current
        assert current is not None
        said = await openssl_verifies(offline.root_file, current.chain, tmp_path)
        assert said.endswith("leaf.pem: OK"), said
    # After a restart it goes on, and nothing is made in its place.
    await world.start_server(await world.stop_server())
    again = world.server.manager.x509_slots.active
    assert again == active
    await world.server.identity.renew()
    chain = world.server.identity.svid.chain
    assert (await openssl_verifies(offline.root_file, chain, tmp_path)).endswith("leaf.pem: OK")
    # The next one is asked for in the same way.
    assert (await offline.run("ca", "csr", "-out", tmp_path / "next.csr", *socket(world))).code == 0


async def test_the_server_refuses_what_was_not_signed_for_it(
    offline: Offline, world: World, tmp_path: Path
) -> None:
    assert (await offline.root("-yes")).code == 0
    files = ("-chain", str(offline.root_file), "-root", str(offline.root_file))
    early = await offline.run("ca", "import", *files, *socket(world))
    assert early.code != 0
    assert "no request was made" in early.err
    first, second = tmp_path / "first.csr", tmp_path / "second.csr"
    assert (await offline.run("ca", "csr", "-out", first, *socket(world))).code == 0
    assert (await offline.run("ca", "csr", "-out", second, *socket(world))).code == 0
    assert (await offline.sign(first, "-yes")).code == 0
    old = offline.out
    wrong_key = await offline.run(
        "ca", "import", "-chain", old, "-root", offline.root_file, *socket(world)
    )
    assert "was another request made since" in wrong_key.err
    assert (await offline.root("-yes", label="other")).code == 0
    assert (await offline.sign(second, "-yes")).code == 0
    wrong_root = await offline.run(
        "ca", "import", "-chain", offline.out, "-root", tmp_path / "other.pem", *socket(world)
    )
    assert wrong_root.code != 0
    assert "unknown authority" in wrong_root.err
    no_chain = await offline.run(
        "ca", "import", "-chain", offline.root_file, "-root", offline.root_file, *socket(world)
    )
    assert "no certificate below the root" in no_chain.err
    # Nothing of that came into the bundle, and what fits is taken.
    assert len((await world.bundle()).x509_authorities) == 1
    taken = await offline.run(
        "ca", "import", "-chain", offline.out, "-root", offline.root_file, *socket(world)
    )
    assert taken.code == 0, taken.err
    assert world.server.manager.x509_slots.prepared is not None
    waits = await offline.run("ca", "csr", "-out", tmp_path / "third.csr", *socket(world))
    assert "is prepared and waits" in waits.err
    assert not (tmp_path / "third.csr").exists()


async def request(path: Path, spiffe_id: str, *, key_type: KeyType = KeyType.EC_P256) -> Path:
    signer = SoftwareSigner(generate_private_key(key_type))
    csr = await build_csr(signer, spiffe_id=SpiffeId.parse(spiffe_id))
    await asyncio.to_thread(path.write_bytes, csr)
    return path


async def test_the_ceremony_refuses_what_it_must_not_sign(offline: Offline, tmp_path: Path) -> None:
    assert (await offline.root("-yes")).code == 0
    again = await offline.root("-yes")
    assert "records are not written over" in again.err
    twice = await offline.run(
        *("ca", "root", "-key", offline.key(), "-commonName", "x", "-yes"),
        *("-out", tmp_path / "x.pem", "-record", tmp_path / "x"),
    )
    assert 'has a key labelled "root-2026"' in twice.err
    good = await request(tmp_path / "good.csr", f"spiffe://{TRUST_DOMAIN}")
    foreign = await request(tmp_path / "foreign.csr", "spiffe://other.example")
    workload = await request(tmp_path / "workload.csr", f"spiffe://{TRUST_DOMAIN}/web")
    broken = tmp_path / "broken.csr"
    broken.write_bytes(good.read_bytes()[:-4] + b"\0\0\0\0")
    nonsense = tmp_path / "nonsense.csr"
    nonsense.write_bytes(b"nonsense")
    for csr, words in {
        foreign: "the request is for 'spiffe://other.example'",
        workload: f"the request is for 'spiffe://{TRUST_DOMAIN}/web'",
        broken: "signature of the CSR does not hold",
        nonsense: "CSR",
    }.items():
        refused = await offline.sign(csr, "-yes")
        assert refused.code != 0
        assert words in refused.err, refused.err
        assert not offline.out.exists()
    too_long = await offline.sign(good, "-yes", "-pathLength", "2")
    assert "path length 2 is not below the issuer's own, 2" in too_long.err
    wrong_pin = tmp_path / "wrong"
    wrong_pin.touch(mode=0o600)
    wrong_pin.write_text("00000000")
    other_key = await offline.run(
        *("ca", "sign", "-csr", good, "-cert", tmp_path / "root-2026.pem", "-yes"),
        *("-trustDomain", TRUST_DOMAIN, "-out", tmp_path / "no.pem", "-record", tmp_path / "no"),
        *("-key", offline.key().replace(str(offline.pin), str(wrong_pin))),
    )
    assert "PIN" in other_key.err
    assert "00000000" not in other_key.err
    assert (await offline.root("-yes", label="other")).code == 0
    (tmp_path / "other.pem").write_bytes(offline.root_file.read_bytes())
    not_its = await offline.sign(good, "-yes", label="other")
    assert "is not the certificate's" in not_its.err


async def test_an_issuer_without_room_or_time_signs_nothing(
    offline: Offline, tmp_path: Path
) -> None:
    good = await request(tmp_path / "good.csr", f"spiffe://{TRUST_DOMAIN}")
    no_room = await offline.root("-yes", "-pathLength", "0")
    assert "could not sign a CA" in no_room.err
    assert (await offline.root("-yes", label="first")).code == 0
    now = SystemClock().now()
    key = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    subject = Subject(common_name="above").encode()
    times = {"not_before": now - timedelta(days=2), "not_after": now + timedelta(days=2)}
    above = await issue_ca_certificate(
        None, trust_domain=None, signer=key, subject_der=subject, **times
    )
    (public,) = parse_pem((tmp_path / "first.pem").read_bytes())
    spki = spki_der(load_certificate(public).public_key())  # type: ignore[arg-type]
    for path_length, end, words in (
        (0, now + timedelta(days=1), "leaves no room for a CA below it"),
        (1, now - timedelta(days=1), "the issuer has ended at"),
    ):
        narrow = await issue_ca_certificate(
            ParentCa(above, key),
            trust_domain=None,
            not_before=now - timedelta(days=2),
            not_after=end,
            spki=spki,
            subject_der=Subject(common_name="narrow").encode(),
            path_length=path_length,
        )
        (tmp_path / "first.pem").write_bytes(encode_pem([narrow]))
        refused = await offline.sign(good, "-yes", label="first")
        assert refused.code != 0
        assert words in refused.err, refused.err


async def test_the_pin_of_the_root_is_asked_for_at_the_terminal(
    offline: Offline, tmp_path: Path
) -> None:
    words = ["ca", "root", "-key", offline.key().partition("&pin-source")[0]]
    words += ["-commonName", "Sim Root", "-out", str(offline.root_file)]
    words += ["-record", str(tmp_path / "root-2026")]
    with Terminal(sys.executable, command_line("spire-hw-server", *words)) as terminal:
        terminal.see('PIN of token "root": ')
        terminal.type(f"{PIN}\n")
        terminal.see("Sign this?")
        assert terminal.shows_keys
        terminal.type("y\n")
        assert terminal.end() == 0
        assert "Witnesses" in terminal.screen
        assert PIN not in terminal.screen
    (der,) = parse_pem(offline.root_file.read_bytes())
    assert load_certificate(der).subject == load_certificate(der).issuer
