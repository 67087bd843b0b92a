"""`doctor` of the signer: configuration, policy, data, TLS files, token, sockets, audit log."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.cli.checks import (
    check_clock_against,
    check_config,
    check_data_dir,
    check_pem_file,
    check_port,
    check_room,
    check_secret_file,
    check_socket_serves,
    check_tpm_device,
    is_answering,
)
from spire_hw.cli.doctor import doctor_command
from spire_hw.cli.findings import Finding, ok, problem, warning
from spire_hw.cli.hsmchecks import check_hsm
from spire_hw.clock import SystemClock
from spire_hw.errors import SpireHwError
from spire_hw_signer.cli.livechecks import (
    check_deciding_files,
    check_policy,
    check_revocation_lists,
    check_witness,
)
from spire_hw_signer.cli.run import find_faults
from spire_hw_signer.config import DEFAULT_CONFIG, SignerSettings, load_settings
from spire_hw_signer.devicelog.standing import find_alarm, find_standing

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROGRAM: Final = "spire-hw-signer"
_ALARM_AGE: Final = timedelta(days=7)


def _examine(settings: SignerSettings, *, login: bool) -> Iterator[Finding]:
    valid = f"{settings.file} and {settings.policy_file} are valid"
    yield from check_config(settings.file, find_faults(settings), settings.notices, valid)
    yield from _check_data(settings)
    yield from _check_device_log(settings)
    yield from _check_keys(settings, login=login)
    yield from _check_tls(settings)
    found = check_socket_serves(settings.admin_socket_path, _PROGRAM)
    yield from found
    is_running = is_answering(found)
    yield from check_policy(settings, is_running=is_running)
    yield from check_deciding_files(settings)
    yield from check_witness(settings.witness)
    if settings.tls is not None and settings.bind_port:
        yield from check_port(settings.bind_address, settings.bind_port, is_running=is_running)


def _check_data(settings: SignerSettings) -> Iterator[Finding]:
    yield from check_data_dir(settings.data_dir)
    directory = settings.audit.directory
    try:
        files = sorted(directory.iterdir())
    except FileNotFoundError:
        text = f"there is no audit log in {directory}"
        yield warning(
            "audit.missing", text, "the first start begins one; else look for the old one"
        )
        return
    except OSError as e:
        yield problem("audit.unreadable", f"{directory}: {e.strerror}", "run doctor as root")
        return
    yield from check_clock_against(files, SystemClock().now())
    if not os.access(directory, os.W_OK | os.X_OK):
        text = f"the audit log in {directory} cannot be written: nothing would be signed"
        yield problem("audit.not_writable", text, "give the directory to the signer's user")
    elif full := check_room(directory, "audit"):
        yield from full
    else:
        yield ok(
            "audit", f"the audit log is in {directory}; `spire-hw-signer log verify` checks it"
        )


def _check_device_log(settings: SignerSettings) -> Iterator[Finding]:
    """Tell of the last alarm about the device's log, for some days: health forgets it."""
    if settings.device_log is None:
        return
    directory = settings.audit.directory
    try:
        standing = find_standing(directory)
        alarm = find_alarm(directory, SystemClock().now() - _ALARM_AGE)
    except SpireHwError as e:
        yield warning("device_log.unreadable", e.message, "run doctor as root")
        return
    if alarm is not None:
        text = f"the device's log: {alarm.text} (at {alarm.time})"
        remedy = (
            f"`spire-hw-signer log show {directory} -kind note` shows what came before and after"
        )
        yield warning("device_log.alarm", text, remedy)
    if not standing.known:
        text = "the device's log was not read yet"
        yield warning("device_log.unread", text, "look at the signer's log, or start it")
    elif alarm is None:
        last = "nothing yet" if standing.mark is None else f"entry {standing.mark.number}"
        yield ok("device_log", f"the audit log has the device's log up to {last}")


def _check_keys(settings: SignerSettings, *, login: bool) -> Iterator[Finding]:
    keys = settings.keys
    if keys.name == "pkcs11":
        try:
            user = settings.data_dir.stat().st_uid
        except OSError:
            user = None
        yield from check_hsm(keys.prefix, keys.data, user=user, login=login)
    elif keys.name == "tpm":
        yield from check_tpm_device(keys.prefix, keys.data)
    else:
        text = f"{keys.prefix}: keys are in a file; whoever reads it needs no signer"
        yield warning("keys.software", text, "use KeyManager pkcs11 or tpm")


def _check_tls(settings: SignerSettings) -> Iterator[Finding]:
    tls = settings.tls
    if tls is None:
        return
    yield from check_pem_file("certificate", tls.cert_file)
    yield from check_secret_file(tls.key_file, "private key")
    for path in tls.client_ca_files:
        yield from check_pem_file("authority of clients", path)
    yield from check_revocation_lists(tls)


doctor = doctor_command("signer", Path(DEFAULT_CONFIG), load_settings, _examine)
