"""`init`: asks a few questions, or reads their answers from flags, and writes a working set-up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.flags import GoCommand, flag, snake_case
from spire_hw.cli.hsmchoice import HsmFlags, choose_hsm, hsm_flags
from spire_hw.cli.output import Printer, output_flags
from spire_hw.cli.plan import (
    Answers,
    Plan,
    PlannedFile,
    check_path,
    check_user,
    program_path,
)
from spire_hw.cli.units import Service
from spire_hw.config.hcl import parse
from spire_hw.config.host import parse_ip, parse_trust_domain
from spire_hw.errors import ConfigError, SpireHwError
from spire_hw.key import KeyType
from spire_hw_server.config import build_settings

if TYPE_CHECKING:
    from spire_hw.cli.hsmchoice import HsmChoice

_PROGRAM: Final = "spire-hw-server"
_KEY_MANAGERS: Final = ("pkcs11", "tpm", "disk")
_USUAL: Final = ("/var/lib/spire-hw/server", "/run/spire-hw/server")
_CONF: Final = """\
# Written by `spire-hw-server init`. Keys and defaults are upstream SPIRE's.
server {{
  trust_domain = "{trust_domain}"
  bind_address = "{bind_address}"
  bind_port    = {bind_port}
  socket_path  = "{socket_path}"
  data_dir     = "{data_dir}"

  log_level         = "INFO"
  audit_log_enabled = true

  # A certificate lives no longer than its CA: a week of CA allows SVIDs of up to a day.
  ca_key_type           = "{key_type}"
  ca_ttl                = "168h"
  default_x509_svid_ttl = "1h"
  default_jwt_svid_ttl  = "5m"
  agent_ttl             = "12h"
}}

plugins {{
  DataStore "sql" {{
    plugin_data {{
      database_type     = "sqlite3"
      connection_string = "{data_dir}/datastore.sqlite3"
    }}
  }}

{key_manager}

  # Nodes are let in by the hash of their TPM's endorsement key: `spire-hw-server tpm allow HASH`.
  NodeAttestor "tpm" {{
    plugin_data {{
      ek_policy = "hash"
    }}
  }}
{join_token}}}

health_checks {{
  listener_enabled = true
  bind_address     = "127.0.0.1"
  bind_port        = {health_port}
}}
"""
_TOKENS: Final = """
  # Nodes without a TPM: a token for each, `spire-hw-server token generate`.
  NodeAttestor "join_token" {
    plugin_data {}
  }
"""
_TPM_KEYS: Final = """\
  # The CA's keys are in this machine's TPM: they cannot be copied, nor moved to another machine.
  KeyManager "tpm" {
    plugin_data {
      tpm_device_path = "/dev/tpmrm0"
    }
  }"""
_DISK_KEYS: Final = """\
  # Keys in a file: whoever reads it is the CA. For trials.
  KeyManager "disk" {{
    plugin_data {{
      keys_path = "{data_dir}/keys.json"
    }}
  }}"""


@click.command(
    "init",
    cls=GoCommand,
    examples="""
    spire-hw-server init
    spire-hw-server init -trustDomain example.org -tokenLabel spire-ca -pinFile /etc/spire-hw/pin -dryRun
    spire-hw-server init -trustDomain example.org -keyManager tpm -yes
    """,
)
@flag("trustDomain", "The trust domain, such as example.org.", default="")
@flag("keyManager", "Where the CA's keys are: pkcs11, tpm or disk.", default="")
@flag("keyType", "Type of the CA's keys.", default=KeyType.EC_P256.config_name)
@flag("bindAddress", "IP address the API listens on.", default="0.0.0.0")  # noqa: S104 - upstream's default
@flag("serverPort", "Port the API listens on.", type=click.IntRange(1, 65535), default=8081)
@flag("healthPort", "Port of the probes.", type=click.IntRange(1, 65535), default=8080)
@flag("socketPath", "Admin socket.", default="/run/spire-hw/server/private/api.sock")
@flag("dataDir", "Directory for the server's data.", default="/var/lib/spire-hw/server")
@flag("joinToken", "Let nodes in by join token too.", type=bool, default=True)
@flag("configDir", "Where the configuration is written to.", default="/etc/spire-hw")
@flag("unitDir", "Where the systemd unit is written to.", default="/etc/systemd/system")
@flag("unit", "Write a systemd unit.", type=bool, default=True)
@flag("user", "User the server runs as.", default="spire-server")
@flag("program", "Path of this program for the unit.", default="")
@flag("dryRun", "Show what would be written.", type=bool, default=False, alias="dry-run")
@flag("force", "Replace files that are there.", type=bool, default=False)
@flag("yes", "Ask nothing; take defaults where no flag answers.", type=bool, default=False)
@hsm_flags
@output_flags
def init(*, output: str, field: str, dry_run: bool, force: bool, yes: bool, **given: Any) -> None:
    """Write a configuration and a systemd unit for a new server, after a few questions."""
    answers = Answers(may_ask=not yes and sys.stdin.isatty())
    plan = Plan()
    _decide(plan, answers, given)
    plan.carry_out(Printer(as_json=output == "json", field=field), dry_run=dry_run, force=force)


def _decide(plan: Plan, answers: Answers, given: dict[str, Any]) -> None:
    trust_domain = answers.text(
        "trustDomain", given["trust_domain"], "Trust domain", check=parse_trust_domain
    )
    key_type = _checked("keyType", given["key_type"], KeyType.parse)
    options = [
        ("pkcs11", "an HSM or any PKCS#11 token: keys never leave it"),
        ("tpm", "this machine's TPM: keys stay on this machine"),
        ("disk", "a file, for trials"),
    ]
    where = given["key_manager"] or _default_manager(answers, given, options)
    if where not in _KEY_MANAGERS:
        raise click.UsageError(f"-keyManager is one of {', '.join(_KEY_MANAGERS)}")
    for name, check in _CHECKS.items():
        _checked(name, given[snake_case(name)], check)
    config_dir = Path(given["config_dir"])
    config = config_dir / "server.conf"
    hsm = None
    if where == "pkcs11":
        flags = HsmFlags(**{name: given[name] for name in HsmFlags.__slots__})
        hsm = choose_hsm(flags, answers, plan, key_type=key_type, default_pin=config_dir / "pin")
    unit = _unit(given, where, hsm, config)
    text = _CONF.format(
        trust_domain=parse_trust_domain(trust_domain).name,
        key_type=key_type.config_name,
        key_manager=_key_manager(given, where, hsm, unit),
        join_token=_TOKENS if given["join_token"] else "",
        **{k: given[k] for k in ("bind_address", "socket_path", "data_dir", "health_port")},
        bind_port=given["server_port"],
    )
    _prove(text, str(config))
    plan.files.append(PlannedFile(config, text, 0o644, "the server's configuration, no secret"))
    if unit is not None:
        path = Path(given["unit_dir"]) / unit.unit_name
        plan.files.append(PlannedFile(path, unit.text(), 0o644, "runs the server under systemd"))
    _explain(plan, given, where, unit, config)


def _default_manager(
    answers: Answers, given: dict[str, Any], options: list[tuple[str, str]]
) -> str:
    if any(given[name] for name in ("module", "token_label", "token_serial", "pin_file")):
        return "pkcs11"
    return answers.choice("keyManager", "", "Where are the CA's keys to be kept", options)


def _key_manager(
    given: dict[str, Any], where: str, hsm: HsmChoice | None, unit: Service | None
) -> str:
    if hsm is not None:
        return hsm.plugin(
            hsm.pin_file if unit is None or not unit.pin_file else unit.credential_path
        )
    return _TPM_KEYS if where == "tpm" else _DISK_KEYS.format(data_dir=given["data_dir"])


def _unit(given: dict[str, Any], where: str, hsm: HsmChoice | None, config: Path) -> Service | None:
    if not given["unit"]:
        return None
    by_credential = hsm is not None and given["pin_credential"]
    tpm = where == "tpm"
    return Service(
        name="server",
        title="SPIFFE server (spire-hw)",
        program=given["program"] or program_path(_PROGRAM),
        config=str(config),
        user=given["user"],
        groups=("tss",) if tpm else () if hsm is None else hsm.groups,
        devices=("/dev/tpmrm0",) if tpm else () if hsm is None else hsm.devices,
        all_devices=hsm is not None and hsm.is_on_the_bus,
        writable=(*(() if hsm is None else hsm.writable), *_own_places(given)),
        pin_file=hsm.pin_file if hsm is not None and by_credential else "",
        after=() if hsm is None else hsm.after,
    )


def _own_places(given: dict[str, Any]) -> list[str]:
    """Return what the unit does not make for the service: places other than the usual ones."""
    places = (Path(given["data_dir"]), Path(given["socket_path"]).parent)
    return [str(place) for place in places if not _is_usual(place)]


def _is_usual(place: Path) -> bool:
    return any(place.is_relative_to(usual) for usual in _USUAL)


def _explain(
    plan: Plan, given: dict[str, Any], where: str, unit: Service | None, config: Path
) -> None:
    if where == "disk":
        plan.doubts.append("the CA's keys will be in a file: anyone who reads it is the CA")
    if where == "tpm":
        plan.choices.append("keys of a TPM are lost with the machine: plan for a new CA then")
    plan.choices.append(
        "CA certificates live 7 days and are replaced in time; X.509-SVIDs 1 hour, agents 12 hours"
    )
    plan.choices.append(
        "entries and nodes are in a SQLite file; for several servers set DataStore to PostgreSQL"
    )
    if unit is not None:
        user = given["user"]
        plan.steps.append(f"useradd --system --no-create-home --shell /usr/sbin/nologin {user}")
        if unit.pin_file:
            plan.choices.append(
                f"systemd reads {unit.pin_file} as root and hands the PIN to the service alone; "
                "the file needs no other reader"
            )
        plan.steps.append(f"systemctl daemon-reload && systemctl enable --now {unit.unit_name}")
    else:
        plan.steps.append(f"spire-hw-server run -config {config}")
    plan.steps.append(f"spire-hw-server doctor -config {config}")
    plan.steps.append(
        f"spire-hw-server bundle show -socketPath {given['socket_path']} > bootstrap.pem, for agents"
    )


_CHECKS: Final = {
    "bindAddress": parse_ip,
    "socketPath": check_path,
    "dataDir": check_path,
    "configDir": check_path,
    "unitDir": check_path,
    "user": check_user,
}


def _checked(name: str, value: str, check: Any) -> Any:
    try:
        return check(value)
    except SpireHwError as e:
        raise click.UsageError(f"-{name}: {e.message}") from e


def _prove(text: str, file: str) -> None:
    """Read what was made as the server will; the plugins' own data are read by `validate`."""
    try:
        build_settings(parse(text, file))
    except ConfigError as e:
        raise click.UsageError(f"these answers do not fit together: {e.message}") from e
