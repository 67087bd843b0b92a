"""`init`: a signer beside its HSM, with a policy for its first client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw.cli.checks import check_pem_file, check_secret_file
from spire_hw.cli.findings import Level
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
from spire_hw.cli.plan import PlannedFile, check_path, check_plain
from spire_hw.config.hcl import parse
from spire_hw.config.host import parse_trust_domain
from spire_hw.errors import ConfigError, InvalidInputError
from spire_hw.key import KeyType
from spire_hw_signer.config import (
    DEFAULT_ADMIN_SOCKET,
    DEFAULT_PORT,
    KEEPS_REPLACED,
    build_settings,
)
from spire_hw_signer.policyfile import parse_identity, parse_policy

if TYPE_CHECKING:
    from spire_hw.cli.plan import Answers, Plan

_SIGNER: Final = Program("signer", "SPIFFE signer (spire-hw)", "HUP", shares_runtime=True)
_CONF: Final = """\
# Written by `spire-hw-signer init`.
signer {{
  name              = "{name}"  # tells signers that share a token apart
  bind_address      = "{bind_address}"
  bind_port         = {bind_port}
  admin_socket_path = "{admin_socket}"
{client_socket}  data_dir          = "{data_dir}"
  policy_file       = "{policy}"

  log_level = "INFO"
{tls}}}

plugins {{
{key_manager}
}}

health_checks {{
  listener_enabled = true
  bind_address     = "127.0.0.1"
  bind_port        = {health_port}
}}
"""
_TLS: Final = """
  # Clients show a certificate of one of these authorities. None of them may be one whose key is
  # here: a server's own SVID is no proof of it to the keys behind it.
  tls {{
    cert_file       = "{cert_file}"
    key_file        = "{key_file}"
    client_ca_files = [{client_cas}]
  }}
"""
_POLICY: Final = """\
# Written by `spire-hw-signer init`: who may do what with which key. Read at start and on SIGHUP; its
# hash goes into the audit log.
client "{client}" {{
  # Whose keys they are. A client cannot choose it.
  trust_domain = "{trust_domain}"
  server       = "{server}"

  keys  = ["x509-CA-A", "x509-CA-B", "JWT-Signer-A", "JWT-Signer-B"]
  types = {{ "*" = ["{key_type}"] }}

  # A server signs for its agents: raise this for more than some ten thousand of them.
  sign_rate = {{ "x509-CA-*" = "200/s burst 400", "JWT-Signer-*" = "500/s" }}
  generate  = {{ per_key_min_interval = "1h", per_day = 12 }}

  # A key that signed a short while ago is not replaced: an honest server never asks for that.
  replace         = "not-last-signer"
  active_window   = "10m"
  delete          = "never"
  retain_replaced = "{retained}"

  # The server sends what is to be signed; bare digests are refused.
  raw  = false
  x509 = {{ max_ca_ttl = "{ca_ttl}", max_svid_ttl = "{svid_ttl}" }}
  jwt  = {{ max_ttl = "1h" }}
}}
"""


def _check_name(text: str) -> None:
    check_plain(text)
    if not text or " " in text:
        raise InvalidInputError("a name without spaces is expected")


def _check_identity(text: str) -> None:
    check_plain(text)
    parse_identity(text)


@click.command(
    "init",
    cls=GoCommand,
    examples="""
    spire-hw-signer init
    spire-hw-signer init -trustDomain example.org -client spiffe://infra.example/spire-server-1 -dryRun
    spire-hw-signer init -trustDomain example.org -client unix:root -clientSocket /run/spire-hw/signer.sock -yes
    """,
)
@flag("trustDomain", "Trust domain of the server that is served.", default="")
@flag("client", "The server: spiffe://ID, sha256:CERTIFICATE or unix:USER.", default="")
@flag("server", "Name under which the server's keys are kept.", default="server-1")
@flag("name", "Name of this signer.", default="signer-1")
@flag("bindAddress", "IP address clients connect to.", default="0.0.0.0")  # noqa: S104 - they are elsewhere
@flag("bindPort", "Port of clients.", type=click.IntRange(1, 65535), default=DEFAULT_PORT)
@flag("healthPort", "Port of the probes.", type=click.IntRange(1, 65535), default=8082)
@flag("adminSocket", "Socket of operators.", default=str(DEFAULT_ADMIN_SOCKET))
@flag("clientSocket", "Socket for a server on this host; TLS is left out then.", default="")
@flag("certFile", "The signer's certificate, PEM.", default="")
@flag("keyFile", "Its private key, PEM.", default="")
@flag("clientCA", "Authority of clients, PEM.", repeated=True, dest="client_cas")
@flag("maxCATTL", "The longest life of a CA certificate.", default="169h", dest="ca_ttl")
@flag("maxSVIDTTL", "The longest life of an X.509-SVID.", default="25h", dest="svid_ttl")
@init_flags(_SIGNER)
def init(**given: Any) -> None:
    """Write configuration, policy and a systemd unit for a new signer, after a few questions."""
    carry_out(_decide, given)


def _decide(plan: Plan, answers: Answers, given: dict[str, Any]) -> None:
    trust_domain = answers.text(
        "trustDomain", given["trust_domain"], "Trust domain", check=parse_trust_domain
    )
    client = answers.text(
        "client",
        given["client"],
        "Who may use the keys: spiffe://ID, sha256:CERTIFICATE or unix:USER",
        check=_check_identity,
    )
    check_flags(given, {"adminSocket": check_path, "name": _check_name, "server": _check_name})
    key_type = checked("keyType", given["key_type"], KeyType.parse)
    folder = Path(given["config_dir"])
    config, policy = folder / "signer.conf", folder / "signer-policy.conf"
    place = choose_place(given, answers, plan, key_type)
    tls = "" if given["client_socket"] else _tls(plan, answers, given, folder)
    text = _CONF.format(
        policy=policy,
        tls=tls,
        client_socket=_client_socket(given),
        key_manager="{key_manager}",
        **{k: given[k] for k in ("name", "bind_address", "bind_port", "admin_socket")},
        **{k: given[k] for k in ("data_dir", "health_port")},
    )
    sockets = [Path(p).parent for p in (given["admin_socket"], given["client_socket"]) if p]
    unit = service_of(_SIGNER, place, given, config, (Path(given["data_dir"]), *sockets))
    text = text.replace("{key_manager}", place.plugin(unit))
    rules = _POLICY.format(
        client=client,
        trust_domain=parse_trust_domain(trust_domain).name,
        key_type=key_type.config_name,
        retained="26h" if place.kind in KEEPS_REPLACED else "0s",
        **{k: given[k] for k in ("server", "ca_ttl", "svid_ttl")},
    )
    try:
        build_settings(parse(text, str(config)))
        parse_policy(rules, str(policy))
    except ConfigError as e:
        raise click.UsageError(f"these answers do not fit together: {e.message}") from e
    plan.files.append(PlannedFile(config, text, 0o644, "the signer's configuration, no secret"))
    plan.files.append(PlannedFile(policy, rules, 0o644, "what its client may do"))
    _explain(plan, given, client, is_kept=place.kind in KEEPS_REPLACED)
    add_service(plan, _SIGNER, unit, given, config)


def _client_socket(given: dict[str, Any]) -> str:
    path = given["client_socket"]
    if not path:
        return ""
    checked("clientSocket", path, check_path)
    return f'  socket_path       = "{path}"  # for a server on this host\n'


def _tls(plan: Plan, answers: Answers, given: dict[str, Any], folder: Path) -> str:
    cert = answers.text(
        "certFile",
        given["cert_file"],
        "The signer's certificate",
        default=str(folder / "signer.pem"),
        check=check_path,
    )
    key = answers.text(
        "keyFile",
        given["key_file"],
        "Its private key",
        default=str(folder / "signer.key"),
        check=check_path,
    )
    authorities = given["client_cas"] or (
        answers.text(
            "clientCA",
            "",
            "Authority of clients",
            default=str(folder / "infra-ca.pem"),
            check=check_path,
        ),
    )
    for path in authorities:
        checked("clientCA", path, check_path)
    findings = check_pem_file("certificate", Path(cert))
    findings += check_secret_file(Path(key), "private key")
    for path in authorities:
        findings += check_pem_file("authority of clients", Path(path))
    plan.doubts += [f"{f.message}: {f.remedy}" for f in findings if f.level is not Level.OK]
    quoted = ", ".join(f'"{path}"' for path in authorities)
    return _TLS.format(cert_file=cert, key_file=key, client_cas=quoted)


def _explain(plan: Plan, given: dict[str, Any], client: str, *, is_kept: bool) -> None:
    plan.choices.append(
        f"{client} may have certificates and tokens signed, and no bare digests: what it sends is read"
    )
    if is_kept:
        plan.choices.append(
            "replaced keys are kept for 26 hours, so that a server that was taken over cannot destroy them"
        )
    else:
        plan.doubts.append("replaced keys are not kept: keep them in a token or a TPM")
    plan.steps.append(f"look through the policy: {given['config_dir']}/signer-policy.conf")
    if given["admin_socket"] != str(DEFAULT_ADMIN_SOCKET):
        plan.steps.append(f"export SPIRE_HW_SOCKET_PATH={given['admin_socket']}, for operators")
