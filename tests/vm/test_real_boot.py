"""A machine with real firmware attests through the kernel's TPM driver to a server outside.

UEFI, shim, GRUB and a Debian kernel do the measuring; the agent inside runs from the wheel. One
machine goes through its life in one test, since a boot takes the better part of a minute.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from spire_hw_sim.machine import HOST_ADDRESS, Machine, missing_tools
from spire_hw_sim.manufacturer import EkKind
from spire_hw_sim.site import TRUST_DOMAIN, Site
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE: Final = Path(os.environ.get("SPIRE_HW_VM_IMAGE", ""))
BOOT_S: Final = 600.0

pytestmark = [
    pytest.mark.skipif(not (IMAGE / "made").is_file(), reason="no image: run `make test-vm`"),
    pytest.mark.skipif(bool(missing_tools()), reason=f"not installed: {missing_tools()}"),
    pytest.mark.timeout(3600),
]

AGENT_CONF: Final = """\
agent {{
  trust_domain      = "{td}"
  server_address    = "{host}"
  server_port       = {port}
  data_dir          = "/mnt/data"
  socket_path       = "/run/api.sock"
  trust_bundle_path = "/mnt/bundle.pem"
}}
plugins {{
  NodeAttestor "tpm" {{ plugin_data {{ tpm_device_path = "/dev/tpmrm0" }} }}
  KeyManager "tpm" {{ plugin_data {{ tpm_device_path = "/dev/tpmrm0" }} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""
# Boots again once after the agent has its SVID, in order, as `reboot` does.
RUN: Final = """\
boot=$(($(cat /mnt/boot 2>/dev/null || echo 0) + 1))
echo $boot > /mnt/boot
echo "BOOT $boot: $(cat /proc/cmdline)"
[ -c /dev/tpmrm0 ] && echo "TPM is there"
python3 /opt/spire-hw/bin/spire-hw-agent run -config /mnt/agent.conf > /run/agent.log 2>&1 &
agent=$!
busybox tail -f /run/agent.log &
while kill -0 $agent 2>/dev/null; do
  if [ -f /mnt/reboot ] && grep -q 'Agent SVID in use' /run/agent.log; then
    rm /mnt/reboot
    kill $agent; wait $agent; sync
    busybox reboot -f
  fi
  sleep 1
done
echo "AGENT ENDED"
"""


@pytest.fixture
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


def _machine(site: Site, name: str, *, secure_boot: bool = True, reboots: bool = False) -> Machine:
    tpm = Swtpm(site.directory / f"tpm-{name}", persistent_ek=False)
    with tpm:
        site.maker.equip(tpm, (EkKind.ECC_P256,))
        site.enrol(tpm)
    conf = AGENT_CONF.format(td=TRUST_DOMAIN, host=HOST_ADDRESS, port=site.port)
    files = {
        "agent.conf": conf.encode(),
        "bundle.pem": site.command("bundle", "show").encode(),
        "run.sh": RUN.encode(),
    }
    if reboots:
        files["reboot"] = b"once\n"
    return Machine(IMAGE, site.directory / name, tpm, files, secure_boot=secure_boot)


def _with_logs(text: str) -> str:
    policy = 'ek_policy = "ca_and_hash"'
    pcrs = "pcrs { sha256 = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 14] }"
    return text.replace(policy, f"{policy} boot_log = true ima = true {pcrs}")


def _selectors(site: Site, agent_id: str) -> set[str]:
    shown = json.loads(site.command("agent", "show", "-spiffeID", agent_id, "-output", "json"))
    return {f"{s['type']}:{s['value']}" for s in shown["selectors"]}


def _agent_ids(site: Site) -> list[str]:
    shown = json.loads(site.command("agent", "list", "-output", "json"))
    return [
        f"spiffe://{agent['id']['trust_domain']}{agent['id']['path']}" for agent in shown["agents"]
    ]


def test_a_machine_with_secure_boot_attests_and_comes_back_after_a_reboot(site: Site) -> None:
    site.start_server(change=_with_logs)
    site.wait_ready()
    with _machine(site, "m", reboots=True) as machine:
        machine.power_on()
        machine.wait_for("TPM is there", BOOT_S)
        machine.wait_for("Agent SVID in use", BOOT_S)
        (agent_id,) = _agent_ids(site)
        found = _selectors(site, agent_id)
        assert {"tpm:secureboot:on", "tpm:key:tpm", "tpm:tier:quote"} <= found
        machine.wait_for("BOOT 2", BOOT_S)
        machine.wait_for("(?s)BOOT 2.*Agent SVID in use", BOOT_S)
    assert _agent_ids(site) == [agent_id]


def test_a_machine_without_keys_in_its_firmware_says_so(site: Site) -> None:
    site.start_server(change=_with_logs)
    site.wait_ready()
    with _machine(site, "m", secure_boot=False) as machine:
        machine.power_on()
        machine.wait_for("Agent SVID in use", BOOT_S)
        (agent_id,) = _agent_ids(site)
        assert "tpm:secureboot:off" in _selectors(site, agent_id)


def test_a_learnt_policy_keeps_a_changed_kernel_command_line_out(site: Site) -> None:
    """Learn from a good boot, put it in force, boot otherwise, and as learnt again."""
    posture = 'posture { heartbeat_interval = "5s" }'
    site.start_server(change=lambda text: f"{_with_logs(text)}\n{posture}\n")
    site.wait_ready()
    policy = site.directory / "learnt.hcl"
    with _machine(site, "m") as machine:
        machine.power_on()
        machine.wait_for("Agent SVID in use", BOOT_S)
        (agent_id,) = _agent_ids(site)
        policy.write_text(site.command("policy", "learn", "-node", agent_id, "-name", "vm"))
        site.command("policy", "create", "-policyFile", policy)
        machine.power_off()

        machine.power_on(kernel_arguments="init=/bin/sh")
        machine.wait_for("quarantined", BOOT_S)
        assert _state(site, agent_id) == "quarantined"
        machine.power_off()

        machine.power_on()
        site.server.wait_for("state=attested state_before=quarantined", BOOT_S)
        machine.power_off()
    assert _state(site, agent_id) == "attested"


def _state(site: Site, agent_id: str) -> str:
    shown = json.loads(site.command("agent", "show", "-spiffeID", agent_id, "-output", "json"))
    return str(shown["posture"]["state"])
