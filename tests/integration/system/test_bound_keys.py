"""Agents whose key is bound to the state of their machine, and what a change does to them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization

from spire_hw.key import KeyType, generate_private_key
from spire_hw.tpm.attest import read_pcrs
from spire_hw.tpm.device import TpmDevice
from spire_hw.tpm.pcrpolicy import approve, pcr_policy
from spire_hw.tpm.wire import PcrSelection
from tests.integration.tpm.leaks import loaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from spire_hw_sim.site import Node, Site
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
PCR = 14
_NUMBERS = itertools.count()


def with_settings(more: str) -> Callable[[str], str]:
    """Return what puts settings into the KeyManager's plugin_data."""
    head = 'KeyManager "tpm" {'

    def change(text: str) -> str:
        place = text.index("tcti", text.index(head))
        return f"{text[:place]}{more}\n      {text[place:]}"

    return change


@pytest.fixture
def bound(site: Site) -> Iterator[Node]:
    name = f"bound{next(_NUMBERS)}"
    tpm = site.power_on(name)
    site.enrol(tpm)
    made = site.node(name, tpm=tpm)
    yield made
    made.agent.kill()
    tpm.stop()


async def present(tpm: Swtpm) -> bytes:
    device = TpmDevice(tpm.tcti)
    selection = PcrSelection("sha256", (0, PCR))
    values = await device.run("read", lambda c: read_pcrs(c, selection))
    await device.close()
    return pcr_policy({"sha256": values})


@pytest.mark.parametrize("session", ["plain", "salted"])
async def test_a_key_lost_by_an_update_is_made_anew_and_the_agent_attests_again_by_itself(
    site: Site, bound: Node, session: str
) -> None:
    settings = f'session = "{session}"\n      policy_pcrs = {{ sha256 = [0, {PCR}] }}'
    bound.start(change=with_settings(settings))
    before = bound.wait_in_use()
    keys, after = bound.key_files(), len(bound.agent.log())
    bound.tpm.extend_pcr(PCR, b"another shim")
    site.server.kill()
    site.start_server()
    site.wait_ready()
    line = bound.wait_in_use(60, after=after)
    assert bound.id in before
    assert bound.id in line
    log = bound.agent.log()[after:]
    assert "PCRs changed since the key was made" in log
    assert "Traceback" not in log
    assert bound.key_files() != keys
    assert bound.agent.stop() == 0
    assert loaded(bound.tpm) == []


async def test_a_key_of_an_authority_waits_for_its_approval(
    site: Site, bound: Node, tmp_path: Path
) -> None:
    key = generate_private_key(KeyType.EC_P256)
    public, approvals = tmp_path / "authority.pem", tmp_path / "approvals"
    approvals.mkdir()
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    (approvals / "first.json").write_bytes(approve(key, await present(bound.tpm)).encode())
    settings = (
        f"policy_pcrs = {{ sha256 = [0, {PCR}] }}\n"
        f'      policy_authority_path = "{public}"\n      approvals_path = "{approvals}"'
    )
    bound.start(change=with_settings(settings))
    bound.wait_in_use()
    site.register(bound)
    keys = bound.key_files()
    bound.agent.kill()
    bound.tpm.extend_pcr(PCR, b"another shim")
    bound.start(change=with_settings(settings))
    bound.agent.wait_for("is not approved", 60)
    assert bound.key_files() == keys
    (approvals / "second.json").write_bytes(approve(key, await present(bound.tpm)).encode())
    await bound.fetch_soon(90)
    assert bound.key_files() == keys
    assert "Traceback" not in bound.agent.log()
    assert bound.agent.stop() == 0
    assert loaded(bound.tpm) == []


async def test_a_cleared_tpm_with_persistent_keys_recovers_by_itself(
    site: Site, bound: Node
) -> None:
    settings = 'session = "salted"\n      persistent_handles = "0x81008100"'
    bound.start(change=with_settings(settings))
    bound.wait_in_use()
    after = len(bound.agent.log())
    bound.tpm.commands.clear()
    site.server.kill()
    site.start_server()
    site.wait_ready()
    line = bound.wait_in_use(60, after=after)
    assert bound.id in line
    log = bound.agent.log()[after:]
    assert "TPM was cleared or replaced" in log
    assert "Traceback" not in log
    assert bound.agent.stop() == 0
    assert loaded(bound.tpm) == []
