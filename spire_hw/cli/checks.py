"""Small checks of a live set-up that fit any of the programs; each returns what it found.

Nothing is changed. A check that cannot be made says so as a warning instead of passing.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import shutil
import socket
import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw import __version__
from spire_hw.cli.findings import Finding, ok, problem, warning
from spire_hw.cli.output import count_of, relative
from spire_hw.cli.socket import check_socket
from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body, Item
from spire_hw.errors import ConfigError, DeniedError, SpireHwError, UnavailableError
from spire_hw.files import parse_file
from spire_hw.hardening import check_directory
from spire_hw.rpc.client import connect_unix
from spire_hw.x509.certificate import load_pem

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cryptography import x509

    from spire_hw.errors import ConfigFault

_HEALTH: Final = "/grpc.health.v1.Health/Check"
_ANSWER_S: Final = 5.0
_TIME_ERROR: Final = 5  # adjtimex(2): the clock is not synchronised
_TIMEX_BYTES: Final = 512  # struct timex is 208 bytes
_AHEAD: Final = timedelta(minutes=1)
_LEAST_FREE: Final = 256 << 20
_MAX_PEM: Final = 4 << 20
_TPM: Final = Path("/dev/tpmrm0")
_SOON: Final = 0.15  # of a certificate's life that is left


def check_config(
    file: str, faults: Sequence[ConfigFault], notices: Sequence[str], valid: str
) -> list[Finding]:
    """Return what is found about a configuration that could be read.

    Args:
        file: where it is.
        faults: what is wrong all the same.
        notices: what is odd.
        valid: what to say when nothing is wrong.
    """
    found = faults_found(ConfigError(file, list(faults)), "correct the file")
    found += [
        warning("config.notice", notice, "change it, or leave it if it is meant")
        for notice in notices
    ]
    return found if faults else [*found, ok("config", valid)]


def faults_found(error: ConfigError, remedy: str) -> list[Finding]:
    """Return each fault of a configuration with its file and line."""
    return [
        problem("config.invalid", ConfigError(error.file, [fault]).message, remedy)
        for fault in error.faults
    ]


def check_versions() -> list[Finding]:
    """Return what runs here."""
    running = (
        f"spire-hw {__version__}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, "
        f"{platform.system()} {platform.release()}"
    )
    if sys.platform != "linux":
        return [problem("versions", running, "run it on Linux")]
    return [ok("versions", running)]


def check_time() -> list[Finding]:
    """Return whether the kernel's clock is kept right by somebody."""
    libc = ctypes.CDLL(None, use_errno=True)
    state = libc.adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state == _TIME_ERROR:
        remedy = "run an NTP client (systemd-timesyncd, chrony): certificates live by the clock"
        return [warning("time.unsynchronised", "the clock is not synchronised", remedy)]
    if state < 0:
        return []
    return [ok("time.synchronised", "the clock is synchronised")]


def check_clock_against(paths: Iterable[Path], now: datetime) -> list[Finding]:
    """Return whether the clock is behind what was already written by it."""
    for path in paths:
        try:
            written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except OSError:
            continue  # whether the file is there is another check's question
        if written > now + _AHEAD:
            return [
                problem(
                    "time.behind",
                    f"{path} was written {relative(written, now)}, says the clock",
                    "set the clock: it is behind, or was ahead when this was written",
                )
            ]
    return []


def check_room(directory: Path, name: str) -> list[Finding]:
    """Return what is wrong with the room below a directory, under `<name>.full`."""
    free = shutil.disk_usage(directory).free
    if free >= _LEAST_FREE:
        return []
    text = f"{free >> 20} MiB are free below {directory}"
    return [problem(f"{name}.full", text, "make room on that file system")]


def check_data_dir(directory: Path) -> list[Finding]:
    """Return whether a data directory exists, is kept to its owner and has room."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        remedy = "the first start makes it; make it yourself if the program may not"
        return [warning("data_dir.missing", f"{directory} does not exist", remedy)]
    except OSError as e:
        return [problem("data_dir.unreadable", f"{directory}: {e.strerror}", "run as root")]
    if not stat.S_ISDIR(status.st_mode):
        return [problem("data_dir.missing", f"{directory} is not a directory", "set data_dir")]
    findings = []
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(status.st_mode)
        findings.append(
            problem(
                "data_dir.mode",
                f"{directory} has mode {mode:04o}: others may look into it",
                f"chmod 0700 {directory}",
            )
        )
    if not os.access(directory, os.W_OK | os.X_OK):
        remedy = "run doctor as the program's user, or give it the directory"
        findings.append(problem("data_dir.not_writable", f"{directory} is not writable", remedy))
    findings += _somebody_elses(directory)
    findings += check_room(directory, "data_dir")
    return findings or [ok("data_dir", f"{directory} is private and writable")]


def _somebody_elses(directory: Path) -> list[Finding]:
    try:
        text = check_directory(directory)
    except UnavailableError as e:
        return [problem("data_dir.owner", e.message, "use a directory of your own")]
    if text is None or os.geteuid() == 0:
        # Root looks at the directory of the program's own user.
        return []
    return [warning("data_dir.owner", text, "give it to the program's user alone")]


def check_socket_serves(path: Path, program: str) -> list[Finding]:
    """Return whether somebody answers at a socket and says that all is well."""
    try:
        check_socket(path, program)
        status = asyncio.run(_ask_health(path))
    except DeniedError as e:
        return [warning("socket.denied", e.message, "run doctor as root or as the program's user")]
    except UnavailableError as e:
        if path.exists():
            text = f"nobody answers at {path} ({e.message})"
            remedy = f"start {program}; it takes the place of a socket that was left behind"
            return [problem("socket.dead", text, remedy)]
        text = f"{program} does not run: there is no socket at {path}"
        return [warning("socket.missing", text, f"start {program}, or correct the socket's path")]
    except SpireHwError as e:
        remedy = "look into the program's log"
        return [problem("socket.broken", f"{path}: {e.message}", remedy)]
    if status != health_pb2.HealthCheckResponse.SERVING:
        word = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
        remedy = f"the log says why, and `{program} healthcheck` when it is over"
        return [problem("socket.not_serving", f"{program} runs and says {word}", remedy)]
    return [ok("socket", f"{program} answers at {path} and is well")]


async def _ask_health(path: Path) -> int:
    async with asyncio.timeout(2 * _ANSWER_S), connect_unix(path) as channel:
        answer = await channel.unary(
            _HEALTH,
            health_pb2.HealthCheckRequest(),
            health_pb2.HealthCheckResponse,
            timeout_s=_ANSWER_S,
        )
        status: int = answer.status
        return status


def is_answering(found: Sequence[Finding]) -> bool:
    """Tell from what `check_socket_serves` found whether the program runs, well or not."""
    return any(finding.check in {"socket", "socket.not_serving"} for finding in found)


def check_port(address: str, port: int, *, is_running: bool) -> list[Finding]:
    """Return whether a port can be had, or is held by the program that runs."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as e:
            if is_running:
                return [ok("port", f"port {port} is in use, the program runs")]
            text = f"{address} port {port} cannot be had: {e.strerror}"
            return [problem("port.taken", text, "free it, or set another address and port")]
    if is_running:
        text = f"the program runs but nobody listens on port {port}"
        return [problem("port.silent", text, "restart it if the configuration was changed")]
    return [ok("port", f"port {port} is free")]


def check_reachable(what: str, host: str, port: int) -> list[Finding]:
    """Return whether a TCP connection can be made to a `server` or `signer`."""
    try:
        with socket.create_connection((host, port), timeout=_ANSWER_S):
            return [ok(f"{what}.reachable", f"{host} port {port} takes connections")]
    except (OSError, ValueError, OverflowError) as e:
        # A name or a port that is none raises what is not an OSError.
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        text = f"{host} port {port} cannot be reached: {why}"
        remedy = f"look at name, port and firewall, and whether the {what} runs"
        return [problem(f"{what}.unreachable", text, remedy)]


def check_certificates(
    what: str, certificates: Sequence[x509.Certificate], remedy: str, *, now: datetime | None = None
) -> list[Finding]:
    """Return whether certificates are valid now and for a while.

    Args:
        what: whose they are, for messages.
        certificates: at least one has to be valid; of several, expired ones are a warning.
        remedy: what to do when they are not.
        now: the time; the clock's without it.
    """
    moment = now or SystemClock().now()
    if not certificates:
        return [problem("certificate.missing", f"{what} holds no certificate", remedy)]
    valid = [c for c in certificates if c.not_valid_before_utc <= moment <= c.not_valid_after_utc]
    if not valid:
        last = max(certificates, key=lambda c: c.not_valid_after_utc)
        if last.not_valid_before_utc > moment:
            text = f"{what} is valid from {relative(last.not_valid_before_utc, moment)}"
            return [problem("certificate.not_yet_valid", text, f"look at the clock, or {remedy}")]
        text = f"{what} expired {relative(last.not_valid_after_utc, moment)}"
        return [problem("certificate.expired", text, remedy)]
    findings = []
    if len(valid) < len(certificates):
        count = count_of(len(certificates) - len(valid), "certificate is", "certificates are")
        findings.append(warning("certificate.expired", f"{what}: {count} not valid", remedy))
    longest = max(valid, key=lambda c: c.not_valid_after_utc)
    end = longest.not_valid_after_utc
    if end - moment < _SOON * (end - longest.not_valid_before_utc):
        text = f"{what} expires {relative(end, moment)}"
        findings.append(warning("certificate.expires_soon", text, remedy))
    return findings or [ok("certificate", f"{what} is valid, it expires {relative(end, moment)}")]


def check_secret_file(path: Path, what: str) -> list[Finding]:
    """Return whether a file with a secret is there and kept to its owner."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return [problem("secret.missing", f"{what} {path} does not exist", "put it there")]
    except OSError as e:
        return [warning("secret.unreadable", f"{what} {path}: {e.strerror}", "run as root")]
    if not stat.S_ISREG(status.st_mode):
        text = f"{what} {path} is not a regular file"
        return [problem("secret.kind", text, "put a file there, not a link")]
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        text = f"{what} {path} has mode {stat.S_IMODE(status.st_mode):04o}: others may read it"
        return [problem("secret.mode", text, f"chmod 0600 {path}, and replace what was readable")]
    return [ok("secret", f"{what} {path} is kept to its owner")]


def check_pem_file(what: str, path: Path) -> list[Finding]:
    """Return whether a file holds certificates that are valid; messages call it `what` and path."""
    remedy = f"put current certificates into {path}"
    try:
        certificates = parse_file(path, _MAX_PEM, load_pem, what)
    except SpireHwError as e:
        return [problem("certificate.unreadable", e.message, remedy)]
    return check_certificates(f"{what} {path}", certificates, remedy)


def check_tpm_device(title: str, data: Body) -> list[Finding]:
    """Return whether the TPM of a plugin's block is there and may be used.

    Args:
        title: how messages name the block.
        data: its plugin_data, with `tpm_device_path` or `tcti`.
    """
    given = {item.key: item.value for item in data.items if isinstance(item, Item)}
    if given.get("tcti"):
        return []  # a broker or a simulator: opening it is the only test
    chosen = given.get("tpm_device_path")
    path = Path(chosen) if isinstance(chosen, str) and chosen else _TPM
    if not path.exists():
        text = f"{title}: there is no TPM at {path}"
        remedy = "switch it on in the firmware, load its driver, or correct tpm_device_path"
        return [problem("tpm.missing", text, remedy)]
    if not os.access(path, os.R_OK | os.W_OK):
        text = f"{title}: this user may not use {path}"
        return [
            problem("tpm.denied", text, "run as root, or put the program's user into group tss")
        ]
    if path.name == "tpm0":
        text = f"{title}: {path} serves one program at a time"
        return [warning("tpm.exclusive", text, f"use {_TPM}, which is managed by the kernel")]
    return [ok("tpm", f"{title}: {path} is there")]
