"""`init`: asks a few questions, or reads their answers from flags, and writes a working set-up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.flags import GoCommand, flag
from spire_hw.cli.initparts import (
    Program,
    add_service,
    carry_out,
    check_flags,
    checked,
    choose_place,
    init_flags,
    service_of,
)
from spire_hw.cli.plan import PlannedFile, check_path
from spire_hw.config.hcl import parse
from spire_hw.config.host import parse_trust_domain
from spire_hw.errors import ConfigError
from spire_hw.key import KeyType
from spire_hw_server.config import build_settings

if TYPE_CHECKING:
    from spire_hw.cli.plan import Answers, Plan

_SERVER: Final = Program("server", "SPIFFE server (spire-hw)", "USR2")
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
@flag("bindAddress", "IP address the API listens on.", default="0.0.0.0")  # noqa: S104 - upstream's default
@flag("serverPort", "Port the API listens on.", type=click.IntRange(1, 65535), default=8081)
@flag("healthPort", "Port of the probes.", type=click.IntRange(1, 65535), default=8080)
@flag("socketPath", "Admin socket.", default="/run/spire-hw/server/private/api.sock")
@flag("joinToken", "Let nodes in by join token too.", type=bool, default=True)
@init_flags(_SERVER)
def init(**given: Any) -> None:
    """Write a configuration and a systemd unit for a new server, after a few questions."""
    carry_out(_decide, given)


def _decide(plan: Plan, answers: Answers, given: dict[str, Any]) -> None:
    trust_domain = answers.text(
        "trustDomain", given["trust_domain"], "Trust domain", check=parse_trust_domain
    )
    check_flags(given, {"socketPath": check_path})
    key_type = checked("keyType", given["key_type"], KeyType.parse)
    config = Path(given["config_dir"]) / "server.conf"
    place = choose_place(given, answers, plan, key_type)
    writable = (Path(given["data_dir"]), Path(given["socket_path"]).parent)
    unit = service_of(_SERVER, place, given, config, writable)
    text = _CONF.format(
        trust_domain=parse_trust_domain(trust_domain).name,
        key_type=key_type.config_name,
        key_manager=place.plugin(unit, f"{given['data_dir']}/keys.json"),
        join_token=_TOKENS if given["join_token"] else "",
        **{k: given[k] for k in ("bind_address", "socket_path", "data_dir", "health_port")},
        bind_port=given["server_port"],
    )
    try:
        build_settings(parse(text, str(config)))
    except ConfigError as e:
        raise click.UsageError(f"these answers do not fit together: {e.message}") from e
    plan.files.append(PlannedFile(config, text, 0o644, "the server's configuration, no secret"))
    plan.choices.append(
        "CA certificates live 7 days and are replaced in time; X.509-SVIDs 1 hour, agents 12 hours"
    )
    plan.choices.append(
        "entries and nodes are in a SQLite file; for several servers set DataStore to PostgreSQL"
    )
    add_service(plan, _SERVER, unit, given, config)
    plan.steps.append(
        f"spire-hw-server bundle show -socketPath {given['socket_path']} > bootstrap.pem, for agents"
    )
