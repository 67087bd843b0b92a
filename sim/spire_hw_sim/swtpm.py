"""A real swtpm process with a state directory of its own: one TPM for one test."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from spire_hw.errors import DeviceError, UnavailableError
from spire_hw_sim.tpm_command import Commands

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_STATE_FILE = "tpm2-00.permall"
_START_S, _STOP_S = 10.0, 5.0

# The kernel ends a child with PR_SET_PDEATHSIG when the *thread* that made it ends, so all
# children are made by one thread that lives as long as the process.
_spawner = ThreadPoolExecutor(1, thread_name_prefix="swtpm-spawner")


def is_available() -> bool:
    """Tell whether swtpm and swtpm_setup are installed."""
    return all(shutil.which(name) for name in ("swtpm", "swtpm_setup"))


class Swtpm:
    """A software TPM.

    Attributes:
        state_dir: holds the TPM's state; survives `stop`, so a start resumes the same TPM.
        commands: what its owner, vendor or firmware may do to it.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        banks: Sequence[str] = ("sha256",),
        persistent_ek: bool = True,
        clone_of: Swtpm | None = None,
    ) -> None:
        """Manufacture the TPM unless the directory holds one.

        Args:
            state_dir: made when missing.
            banks: PCR banks that are active.
            persistent_ek: keep an RSA-2048 EK at 0x81010001 and a P-384 one at 0x81010016.
            clone_of: take this TPM's state instead: same seeds, so the same TPM.
        """
        self.state_dir = state_dir.resolve()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket_dir: Path | None = None
        self.commands = Commands(self.transmit)
        if clone_of is not None:
            shutil.copy(clone_of.state_dir / _STATE_FILE, self.state_dir / _STATE_FILE)
        elif not (self.state_dir / _STATE_FILE).exists():
            self._manufacture(banks, persistent_ek=persistent_ek)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def tcti(self) -> str:
        """Return the TCTI string; it stays the same over restarts."""
        return f"swtpm:path={self._socket_path}"

    @property
    def control_path(self) -> Path:
        """Return the path of the control socket."""
        return _control(self._socket_path)

    @property
    def is_running(self) -> bool:
        """Tell whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Return the process id.

        Raises:
            UnavailableError: not running.
        """
        if self._process is None:
            raise UnavailableError("swtpm is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the process and send TPM2_Startup(CLEAR)."""
        if self.is_running:
            return
        path = self._socket_path
        for stale in (path, _control(path)):
            stale.unlink(missing_ok=True)
        command = [
            *("setpriv", "--pdeathsig", "KILL"),
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state_dir}"),
            *("--server", f"type=unixio,path={path}"),
            *("--ctrl", f"type=unixio,path={_control(path)}"),
            *("--flags", "not-need-init,startup-clear"),
            *("--log", f"file={self.state_dir / 'swtpm.log'}"),
        ]
        self._process = _spawner.submit(_spawn, command).result()
        self._wait_until_listening(self._process)

    def stop(self) -> None:
        """Shut down in order: TPM2_Shutdown(CLEAR), then end the process."""
        if self.is_running:
            self.resume()
            with contextlib.suppress(DeviceError, UnavailableError, OSError):
                self.commands.shutdown()
        self._end(signal.SIGTERM)
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None

    def kill(self) -> None:
        """Take the TPM away without warning; `start` brings the same one back."""
        self._end(signal.SIGKILL)

    def reset(self, *, clean: bool = True) -> None:
        """Power-cycle: PCRs go back to their start, transient objects and sessions are gone.

        Args:
            clean: with TPM2_Shutdown before; False is a power cut.
        """
        if clean:
            self.commands.shutdown()
        self._end(signal.SIGTERM if clean else signal.SIGKILL)
        self.start()

    def pause(self) -> None:
        """Make the TPM hang: it takes connections but does not answer."""
        self._require_process().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused TPM go on."""
        self._require_process().send_signal(signal.SIGCONT)

    def extend_pcr(self, index: int, data: bytes, *, banks: Sequence[str] = ("sha256",)) -> None:
        """Measure data into a PCR, as firmware or a kernel would."""
        self.commands.pcr_extend(index, {b: hashlib.new(b, data).digest() for b in banks})

    def transmit(self, command: bytes) -> bytes:
        """Send one raw TPM command and return the raw response."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(_START_S)
            s.connect(str(self._socket_path))
            s.sendall(command)
            header = _receive(s, 10)
            _, size = struct.unpack_from(">HI", header)
            return header + _receive(s, size - 10)

    @property
    def _socket_path(self) -> Path:
        # Not in the state directory: a test's directory may exceed the 107 bytes of sun_path.
        if self._socket_dir is None:
            self._socket_dir = Path(tempfile.mkdtemp(prefix="swtpm-"))
        return self._socket_dir / "tpm"

    def _manufacture(self, banks: Sequence[str], *, persistent_ek: bool) -> None:
        command = ["swtpm_setup", "--tpm2", "--tpmstate", str(self.state_dir)]
        command += ["--pcr-banks", ",".join(banks)]
        if persistent_ek:
            command.append("--createek")
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace").strip()
            raise DeviceError(
                f"swtpm_setup failed: {said}", device="swtpm", operation="manufacture"
            )

    def _wait_until_listening(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as s, contextlib.suppress(OSError):
                s.connect(str(self._socket_path))
                return
            time.sleep(0.002)
        log = self.state_dir / "swtpm.log"
        said = log.read_text(errors="replace")[-500:] if log.exists() else "no log"
        self._end(signal.SIGKILL)
        raise UnavailableError(f"swtpm does not listen: {said}")

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)

    def _require_process(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UnavailableError("swtpm is not running")
        return self._process


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _control(path: Path) -> Path:
    return path.with_name(path.name + ".ctrl")


def _receive(s: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = s.recv(size - len(data))
        if not part:
            raise UnavailableError("swtpm closed the connection")
        data += part
    return data
