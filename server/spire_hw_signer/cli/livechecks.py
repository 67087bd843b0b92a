"""What `doctor` sees of the signer alone: policy, files that decide who is believed, witnesses."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_signer_admin_pb2 as pb
from spire_hw.cli.admin import Admin
from spire_hw.cli.checks import check_room
from spire_hw.cli.findings import Finding, ok, problem, warning
from spire_hw.cli.output import Printer
from spire_hw.clock import SystemClock
from spire_hw.errors import SpireHwError
from spire_hw_signer.policyfile import describe, load_policy
from spire_hw_signer.tlsfiles import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spire_hw_signer.config import SignerSettings
    from spire_hw_signer.operators import WitnessSettings
    from spire_hw_signer.tlsfiles import TlsPaths

_PROGRAM: Final = "spire-hw-signer"
_ADMIN: Final = pb.DESCRIPTOR.services_by_name["SignerAdmin"]


def check_policy(settings: SignerSettings, *, is_running: bool) -> Iterator[Finding]:
    """Yield what is odd about the policy, and whether it is the one in force."""
    try:
        policy = load_policy(settings.policy_file)
    except SpireHwError:
        return  # told by the check of the configuration
    for text in describe(policy):
        yield warning("policy.notice", text, "change the policy, or leave it if it is meant")
    if not is_running:
        return
    try:
        admin = Admin(settings.admin_socket_path, Printer(), _PROGRAM)
        status = admin.call(_ADMIN, "GetStatus", pb.GetStatusRequest())
    except SpireHwError as e:
        text = f"the signer does not say which policy is in force: {e.message}"
        yield warning("policy.unknown", text, "run doctor as root or as the program's user")
        return
    if status.policy == policy.hash:
        yield ok("policy", f"{settings.policy_file} is in force")
    else:
        text = f"{settings.policy_file} is not in force: it was changed since, or was refused"
        remedy = f"`{_PROGRAM} policy reload`, with an order where operators have to agree"
        yield warning("policy.not_in_force", text, remedy)


def check_deciding_files(settings: SignerSettings) -> Iterator[Finding]:
    """Yield which files that decide who may do what can be changed by others."""
    named = [Path(settings.file), settings.policy_file, *settings.operators.files.values()]
    if settings.tls is not None:
        named += [*settings.tls.client_ca_files, settings.tls.cert_file]
    found = [finding for path in dict.fromkeys(named) for finding in _check_kept(path)]
    yield from found or [
        ok("deciding", "files that decide who may do what are kept to their owner")
    ]


def _check_kept(path: Path) -> Iterator[Finding]:
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whether it is there is another check's question
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        text = f"{path} has mode {stat.S_IMODE(mode):04o}: others may change who is let in"
        remedy = f"chmod go-w {path}, and look through what is in it"
        yield problem("deciding.mode", text, remedy)


def check_revocation_lists(tls: TlsPaths) -> Iterator[Finding]:
    """Yield whether revocation lists are those of now."""
    if not tls.crl_files:
        return
    files = TlsFiles(tls)
    try:
        files.load()
    except SpireHwError:
        return  # told by the check of the configuration
    now = SystemClock().now()
    if files.crls_are_old(now):
        text = "a revocation list of crl_files has run out: who was revoked since is let in"
        yield problem("crl.expired", text, "fetch a new one and send SIGHUP")
    else:
        yield ok("crl", "revocation lists are those of now")


def check_witness(witness: WitnessSettings) -> Iterator[Finding]:
    """Yield whether checkpoints of the audit log have another place, and can be written there."""
    path = witness.file
    if path is None:
        if witness.syslog is None:
            text = "checkpoints of the audit log go nowhere else: root here can write another log"
            remedy = "set checkpoint_file in audit, on a mount of another host, or syslog"
            yield warning("witness.none", text, remedy)
        return
    directory = path.parent
    if not directory.is_dir():
        text = f"checkpoint_file: there is no directory {directory}"
        yield problem("witness.missing", text, "mount it, or make it")
    elif not os.access(path if path.exists() else directory, os.W_OK):
        text = f"checkpoint_file {path} cannot be written"
        yield problem("witness.not_writable", text, "give it to the signer's user")
    elif full := check_room(directory, "witness"):
        yield from full
    else:
        yield ok("witness", f"checkpoints go to {path}")
