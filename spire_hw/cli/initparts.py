"""What `init` of server and signer have in common: where keys are kept, the service, flags, the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.flags import F, flag, snake_case
from spire_hw.cli.hsmchoice import HsmChoice, HsmFlags, choose_hsm, hsm_flags
from spire_hw.cli.output import Printer, output_flags
from spire_hw.cli.plan import Answers, Plan, PlannedFile, check_path, check_user, program_path
from spire_hw.cli.units import Service
from spire_hw.config.host import parse_ip
from spire_hw.errors import SpireHwError
from spire_hw.key import KeyType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_TPM_DEVICE: Final = "/dev/tpmrm0"
_OPTIONS: Final = (
    ("pkcs11", "an HSM or any PKCS#11 token: keys never leave it"),
    ("tpm", "this machine's TPM: keys stay on this machine"),
    ("disk", "a file, for trials"),
)
_CHECKS: Final[Mapping[str, Callable[[str], object]]] = {
    "bindAddress": parse_ip,
    "dataDir": check_path,
    "configDir": check_path,
    "unitDir": check_path,
    "user": check_user,
}
_TPM_KEYS: Final = f"""\
  # Keys are in this machine's TPM: they cannot be copied, nor moved to another machine.
  KeyManager "tpm" {{
    plugin_data {{
      tpm_device_path = "{_TPM_DEVICE}"
    }}
  }}"""
_DISK_KEYS: Final = """\
  # Keys in a file: whoever reads it has them. For trials.
  KeyManager "disk" {{
    plugin_data {{{keys_path}}}
  }}"""


@dataclass(frozen=True, slots=True)
class Program:
    """Which program is set up.

    Attributes:
        name: `server` or `signer`.
        title: one line for people.
        reload_signal: what makes it read its files again.
        shares_runtime: its sockets are in /run/spire-hw itself.
    """

    name: str
    title: str
    reload_signal: str
    shares_runtime: bool = False

    @property
    def command(self) -> str:
        """Return the name of the program's file."""
        return f"spire-hw-{self.name}"


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """Where keys are kept.

    Attributes:
        kind: `pkcs11`, `tpm` or `disk`.
        hsm: the token, None without one.
    """

    kind: str
    hsm: HsmChoice | None

    def plugin(self, unit: Service | None, keys_path: str = "") -> str:
        """Return the KeyManager block; keys_path is for keys on disk, where it may be set."""
        if self.hsm is not None:
            by_unit = unit is not None and unit.pin_file
            return self.hsm.plugin(unit.credential_path if unit and by_unit else self.hsm.pin_file)
        if self.kind == "tpm":
            return _TPM_KEYS
        inner = f'\n      keys_path = "{keys_path}"\n    ' if keys_path else ""
        return _DISK_KEYS.format(keys_path=inner)


def init_flags(program: Program) -> Callable[[F], F]:
    """Add the flags of every `init`; the command gets their values, and `output` and `field`."""

    def add(command: F) -> F:
        made = hsm_flags(output_flags(command))
        text = "Ask nothing; take defaults where no flag answers."
        made = flag("yes", text, type=bool, default=False)(made)
        made = flag("force", "Replace files that are there.", type=bool, default=False)(made)
        text = "Show what would be written."
        made = flag("dryRun", text, type=bool, default=False, alias="dry-run")(made)
        made = flag("program", "Path of this program for the unit.", default="")(made)
        text = f"User the {program.name} runs as."
        made = flag("user", text, default=f"spire-{program.name}")(made)
        made = flag("unit", "Write a systemd unit.", type=bool, default=True)(made)
        text = "Where the systemd unit is written to."
        made = flag("unitDir", text, default="/etc/systemd/system")(made)
        text = "Where the configuration is written to."
        made = flag("configDir", text, default="/etc/spire-hw")(made)
        text = f"Directory for the {program.name}'s data."
        made = flag("dataDir", text, default=f"/var/lib/spire-hw/{program.name}")(made)
        default = KeyType.EC_P256.config_name
        made = flag("keyType", "Type of the CA's keys.", default=default)(made)
        text = "Where keys are: pkcs11, tpm or disk."
        return flag("keyManager", text, default="")(made)

    return add


def carry_out(
    decide: Callable[[Plan, Answers, dict[str, Any]], None], given: dict[str, Any]
) -> None:
    """Make a plan of what flags and answers say, and carry it out."""
    answers = Answers(may_ask=not given["yes"] and sys.stdin.isatty())
    plan = Plan()
    decide(plan, answers, given)
    printer = Printer(as_json=given["output"] == "json", field=given["field"])
    plan.carry_out(printer, dry_run=given["dry_run"], force=given["force"])


def check_flags(given: Mapping[str, Any], more: Mapping[str, Callable[[str], object]]) -> None:
    """Refuse flags whose values will not do.

    Raises:
        UsageError: naming the flag.
    """
    for name, check in {**_CHECKS, **more}.items():
        checked(name, given[snake_case(name)], check)


def checked(name: str, value: str, check: Callable[[str], Any]) -> Any:
    """Return what a check makes of a flag's value.

    Raises:
        UsageError: it will not do.
    """
    try:
        return check(value)
    except SpireHwError as e:
        raise click.UsageError(f"-{name}: {e.message}") from e


def choose_place(
    given: Mapping[str, Any], answers: Answers, plan: Plan, key_type: KeyType
) -> KeyPlace:
    """Return where keys are to be kept.

    Raises:
        UsageError: it is not clear.
    """
    kind = given["key_manager"] or _asked(given, answers)
    known = [name for name, _ in _OPTIONS]
    if kind not in known:
        raise click.UsageError(f"-keyManager is one of {', '.join(known)}")
    if kind == "disk":
        plan.doubts.append("keys will be in a file: anyone who reads it has them")
    if kind == "tpm":
        plan.choices.append("keys of a TPM are lost with the machine: plan for a new CA then")
    if kind != "pkcs11":
        return KeyPlace(kind, None)
    flags = HsmFlags(**{name: given[name] for name in HsmFlags.__slots__})
    pin = Path(given["config_dir"]) / "pin"
    hsm = choose_hsm(
        flags, answers, plan, key_type=key_type, default_pin=pin, is_service=given["unit"]
    )
    return KeyPlace(kind, hsm)


def _asked(given: Mapping[str, Any], answers: Answers) -> str:
    if any(
        given[name] for name in ("module", "token_label", "token_serial", "pin_from", "pin_file")
    ):
        return "pkcs11"
    return answers.choice("keyManager", "", "Where are keys to be kept", list(_OPTIONS))


def service_of(
    program: Program,
    place: KeyPlace,
    given: Mapping[str, Any],
    config: Path,
    writable: tuple[Path, ...],
) -> Service | None:
    """Return the service, None when no unit is wanted.

    Args:
        program: which.
        place: where its keys are.
        given: the flags.
        config: its configuration file.
        writable: places it writes to; the usual ones are made by the unit.
    """
    if not given["unit"]:
        return None
    hsm, is_tpm = place.hsm, place.kind == "tpm"
    runtime = "/run/spire-hw" if program.shares_runtime else f"/run/spire-hw/{program.name}"
    usual = (f"/var/lib/spire-hw/{program.name}", runtime)
    own = [str(p) for p in writable if not any(p.is_relative_to(one) for one in usual)]
    return Service(
        name=program.name,
        title=program.title,
        program=given["program"] or program_path(program.command),
        config=str(config),
        user=given["user"],
        groups=("tss",) if is_tpm else () if hsm is None else hsm.groups,
        devices=(_TPM_DEVICE,) if is_tpm else () if hsm is None else hsm.devices,
        all_devices=hsm is not None and hsm.is_on_the_bus,
        writable=(*(() if hsm is None else hsm.writable), *own),
        pin_file=hsm.pin_file if hsm is not None and given["pin_credential"] else "",
        reload_signal=program.reload_signal,
        shares_runtime=program.shares_runtime,
        after=() if hsm is None else hsm.after,
    )


def add_service(
    plan: Plan, program: Program, unit: Service | None, given: Mapping[str, Any], config: Path
) -> None:
    """Put the unit into a plan, and what is left to do until the program runs."""
    if unit is None:
        plan.steps.append(f"{program.command} run -config {config}")
    else:
        path = Path(given["unit_dir"]) / unit.unit_name
        why = f"runs the {program.name} under systemd"
        plan.files.append(PlannedFile(path, unit.text(), 0o644, why))
        user = given["user"]
        plan.steps.append(f"useradd --system --no-create-home --shell /usr/sbin/nologin {user}")
        if unit.pin_file:
            plan.choices.append(
                f"systemd reads {unit.pin_file} as root and hands the PIN to the service alone; "
                "the file needs no other reader"
            )
        plan.steps.append(f"systemctl daemon-reload && systemctl enable --now {unit.unit_name}")
    plan.steps.append(f"{program.command} doctor -config {config}")
