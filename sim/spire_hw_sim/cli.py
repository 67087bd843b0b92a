"""The `spire-hw-sim` program: the demo, and simulated devices by hand."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import click

from spire_hw_sim import demo as demo_module
from spire_hw_sim.firmware import PROFILES
from spire_hw_sim.fleet.command import fleet
from spire_hw_sim.imawriter import ImaList
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

# A TPM starts PCR 0 where the command came from, and ours always from there; its bank is SHA-256.
BOOTS = sorted(PROFILES.keys() - {"locality", "legacy"})
_PROGRAMS = 20
_TOOLS = ("swtpm", "swtpm_setup", "softhsm2-util", "pkcs11-tool", "openssl", "setpriv")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def root() -> None:
    """Simulators for development: a TPM, a PKCS#11 token, and the demo that uses both."""


root.add_command(fleet)


@root.command()
@click.option("--keep", is_flag=True, help="Leave everything running at the end, until Ctrl-C.")
def demo(*, keep: bool) -> None:
    """From a bare machine to a workload's SVID, narrated."""
    missing = [name for name in _TOOLS if shutil.which(name) is None]
    if missing:
        raise click.ClickException(f"not installed: {', '.join(missing)}; run `make setup`")
    sys.exit(demo_module.play(keep=keep))


@root.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--measure", is_flag=True, help="Extend PCRs 0 to 7 as a boot would.")
@click.option(
    "--boot",
    type=click.Choice(BOOTS),
    help="Boot a machine: PCRs, boot-log and ima-log in DIRECTORY fit together.",
)
def tpm(directory: Path, *, measure: bool, boot: str | None) -> None:
    """Run a TPM 2.0 whose state is in DIRECTORY until Ctrl-C; the same directory is the same TPM.

    On its first start a throw-away vendor certifies its endorsement key; the vendor's roots are in
    DIRECTORY/tpm-makers.pem.
    """
    if measure and boot:
        raise click.UsageError("--boot measures already; leave --measure out")
    roots = directory / "tpm-makers.pem"
    is_off = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has them ignored
        signal.signal(number, lambda *_: is_off.set())
    with Swtpm(directory) as device:
        if not roots.exists():
            maker = Manufacturer()
            maker.equip(device, (EkKind.ECC_P256,))
            maker.write_roots(roots)
        if measure:
            for pcr in range(8):
                device.extend_pcr(pcr, b"boot")
        lines = [f"tcti   {device.tcti}", f"roots  {roots}"]
        if boot:
            lines += [f"{name} {path}" for name, path in _boot(device, directory, boot).items()]
        click.echo("\n".join([*lines, "Ctrl-C switches it off."]))
        is_off.wait()


def _boot(device: Swtpm, directory: Path, name: str) -> dict[str, Path]:
    """Start a machine on a TPM and run some programs on it; return its logs by agent.conf's keys."""
    start = replace(PROFILES[name], banks=("sha256",)).boot()
    listed = ImaList.start(start.values("sha256")).files(_PROGRAMS)
    start.run(device)
    listed.run(device)
    paths = {"boot_log_path": directory / "boot-log", "ima_log_path": directory / "ima-log"}
    for path, content in zip(paths.values(), (start.log(), listed.ascii()), strict=True):
        path.write_bytes(content)
    return paths


@root.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--label", default="spire-ca", show_default=True, help="Label of the token.")
@click.option("--pin-file", type=click.Path(path_type=Path, exists=True), required=True)
def token(directory: Path, label: str, pin_file: Path) -> None:
    """Initialise a SoftHSM token whose state is in DIRECTORY; the PIN comes from a file."""
    hsm = SoftHsm(directory)
    hsm.init_token(label, pin_file.read_text().rstrip("\n"))
    click.echo(f"module {hsm.module}")
    for name, value in hsm.environment.items():
        click.echo(f"export {name}={value}")


def main() -> None:
    """Run the program."""
    root(prog_name="spire-hw-sim")
