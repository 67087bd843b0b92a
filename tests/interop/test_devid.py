"""tpm_devid between both makes: an agent of one and a server of the other, over a TPM in software.

Upstream's agent opens a unix socket as a TPM, so it uses the very TPM ours does; provisioning is
ours in both directions, since upstream has none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import pytest

from spire_hw.tpm import devid
from spire_hw.tpm.device import TpmDevice
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.nodepki import PEM, make_root
from spire_hw_sim.parties import Agent, Make, Party, Role, install_plugins, missing
from spire_hw_sim.swtpm import Swtpm, is_available

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from spire_hw.key import KeyType

_REASON = missing(Role.SERVER, Role.AGENT)
pytestmark = pytest.mark.skipif(not is_available(), reason="swtpm or swtpm_setup is not installed")

_SERVER = """\
NodeAttestor "tpm_devid" {{
    {external}
    plugin_data {{
      devid_ca_path       = "{folder}/devid-ca.pem"
      endorsement_ca_path = "{folder}/makers.pem"
    }}
  }}
  KeyManager "disk" {{
    plugin_data {{ keys_path = "{keys}" }}
  }}"""
_AGENT = """\
NodeAttestor "tpm_devid" {{
    {external}
    plugin_data {{
      devid_cert_path = "{folder}/devid.pem"
      devid_pub_path  = "{folder}/devid.pub"
      devid_priv_path = "{folder}/devid.priv"
      {device}
    }}
  }}
  KeyManager "disk" {{
    plugin_data {{ directory = "{data}" }}
  }}"""


@dataclass(frozen=True)
class Public:
    """A key whose private half is in a TPM, as an issuer sees it."""

    key: Any

    def public_key(self) -> Any:
        return self.key


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manufacturer, Swtpm]:
    maker, tpm = Manufacturer(), Swtpm(tmp_path_factory.mktemp("devid-tpm"))
    with tpm:
        maker.equip(tpm, (EkKind.RSA_2048,))
    return maker, tpm


@pytest.fixture
def node(factory: tuple[Manufacturer, Swtpm], tmp_path: Path) -> Iterator[Swtpm]:
    with Swtpm(tmp_path / "tpm", clone_of=factory[1]) as tpm:
        yield tpm


async def provision(tpm: Swtpm, key_type: KeyType, folder: Path) -> tuple[bytes, bytes]:
    """Write the node's files; return the DER of its certificate and of the root."""
    device = TpmDevice(tpm.tcti)
    blob = await device.run(
        "make DevID", lambda c: devid.create_devid(c, key_type, b""), timeout_s=120
    )
    await device.close()
    root = make_root("DevID Root")
    holder = root.issue(Public(blob.parsed.key), common_name="rack-7")
    (folder / "devid-ca.pem").write_bytes(root.certificate.public_bytes(PEM))
    (folder / "devid.pem").write_bytes(holder.certificate.public_bytes(PEM))
    (folder / "devid.pub").write_bytes(blob.public[2:])
    (folder / "devid.priv").write_bytes(blob.private[2:])
    return holder.der, root.der


def pairs() -> list[Any]:
    made = []
    for server, agent in (
        (Make.OURS, Make.UPSTREAM),
        (Make.UPSTREAM, Make.OURS),
        (Make.OURS, Make.OURS),
    ):
        roles = [
            role
            for make, role in ((server, Role.SERVER), (agent, Role.AGENT))
            if make is Make.UPSTREAM
        ]
        reason = missing(*roles)
        marks = pytest.mark.skipif(bool(reason), reason=reason)
        made.append(pytest.param((server, agent), id=f"{server}-server-{agent}-agent", marks=marks))
    return made


def external(party: Party) -> str:
    """Return what makes the attestor of a block ours, in upstream's programs too."""
    row = install_plugins(party.directory / "plugins")["NodeAttestor", "tpm_devid"]
    memory = party.directory / "remembered"
    memory.mkdir(mode=0o700)
    return (
        f'plugin_cmd = "{row["path"]}"\n    plugin_checksum = "{row["checksum"]}"\n'
        f'    plugin_args = ["-dataDir", "{memory}"]'
    )


@dataclass
class Site:
    """A TPM with a DevID, and the files of both halves."""

    tpm: Swtpm
    folder: Path
    leaf: bytes
    root: bytes

    @classmethod
    async def make(cls, maker: Manufacturer, tpm: Swtpm, folder: Path, key_type: KeyType) -> Self:
        leaf, root = await provision(tpm, key_type, folder)
        # Upstream builds no paths to endorsement certificates: what issues them has to be there.
        (folder / "makers.pem").write_bytes(maker.intermediates_pem() + maker.roots_pem())
        return cls(tpm, folder, leaf, root)

    def attest(
        self, party: Party, makes: tuple[Make, Make], *, ours: tuple[bool, bool] = (False, False)
    ) -> None:
        """Let an agent attest to a server; `ours` puts our halves into upstream's programs."""
        server, agent = makes
        here = external(party) if any(ours) else ""
        keys = party.directory / "server-keys.json"
        party.open_server(
            server,
            plugins=_SERVER.format(folder=self.folder, keys=keys, external=here if ours[0] else ""),
        )
        path = self.tpm.tcti.removeprefix("swtpm:path=")
        native = agent is Make.OURS or ours[1]
        device = f'tcti = "{self.tpm.tcti}"' if native else f'tpm_device_path = "{path}"'
        plugins = _AGENT.format(
            folder=self.folder,
            device=device,
            data=party.directory / "agent" / "data",
            external=here if ours[1] else "",
        )
        started = Agent(party, agent, "tpm_devid", plugins=plugins)
        try:
            started.start()
        except Exception:
            print(party.logs())  # noqa: T201 - for whoever has to find out why
            raise
        record = started.record()
        assert record is not None
        digests = [
            hashlib.sha1(d, usedforsecurity=False).hexdigest() for d in (self.leaf, self.root)
        ]
        assert record["id"]["path"] == f"/spire/agent/tpm_devid/{digests[0]}"
        assert record["can_reattest"]
        assert {s["value"] for s in record["selectors"]} == {
            "subject:cn:rack-7",
            "issuer:cn:DevID Root",
            f"ca:fingerprint:{digests[1]}",
        }
        party.server.create_entry(started.id)


@pytest.mark.asyncio
@pytest.mark.parametrize("makes", pairs())
@pytest.mark.parametrize("key_type", devid.KEY_TYPES)
async def test_attestation_by_devid(
    factory: tuple[Manufacturer, Swtpm],
    node: Swtpm,
    tmp_path: Path,
    makes: tuple[Make, Make],
    key_type: KeyType,
) -> None:
    site = await Site.make(factory[0], node, tmp_path, key_type)
    with Party() as party:
        site.attest(party, makes)


@pytest.mark.asyncio
@pytest.mark.skipif(bool(_REASON), reason=_REASON)
@pytest.mark.parametrize("ours", [(True, False), (False, True)], ids=["server-half", "agent-half"])
async def test_one_half_of_ours_in_upstreams_programs(
    factory: tuple[Manufacturer, Swtpm], node: Swtpm, tmp_path: Path, ours: tuple[bool, bool]
) -> None:
    site = await Site.make(factory[0], node, tmp_path, devid.KEY_TYPES[0])
    with Party() as party:
        site.attest(party, (Make.UPSTREAM, Make.UPSTREAM), ours=ours)
