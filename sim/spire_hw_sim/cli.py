"""The `spire-hw-sim` program: the demo, and simulated devices by hand."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import click

from spire_hw_sim import demo as demo_module
from spire_hw_sim.fleet.command import fleet
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.swtpm import Swtpm

_TOOLS = ("swtpm", "swtpm_setup", "softhsm2-util", "pkcs11-tool", "openssl", "setpriv")


@click.group()
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
def tpm(directory: Path, *, measure: bool) -> None:
    """Run a TPM 2.0 whose state is in DIRECTORY until Ctrl-C; the same directory is the same TPM.

    On its first start a throw-away vendor certifies its endorsement key; the vendor's roots are in
    DIRECTORY/tpm-makers.pem.
    """
    roots = directory / "tpm-makers.pem"
    with Swtpm(directory) as device:
        if not roots.exists():
            maker = Manufacturer()
            maker.equip(device, (EkKind.ECC_P256,))
            maker.write_roots(roots)
        if measure:
            for pcr in range(8):
                device.extend_pcr(pcr, b"boot")
        click.echo(f"tcti   {device.tcti}\nroots  {roots}\nCtrl-C switches it off.")
        signal.sigwait({signal.SIGINT, signal.SIGTERM})


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
