"""A tpm2-pkcs11 token of its own: a software TPM, a broker in front of it, a store.

tpm2-pkcs11 needs a resource manager. There is none in the kernel for a software TPM, so tpm2-abrmd
runs on a message bus of its own. Debian packages: libtpm2-pkcs11-1, libtpm2-pkcs11-tools,
tpm2-abrmd, libtss2-tcti-tabrmd0, dbus.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from spire_hw.errors import UnavailableError
from spire_hw_sim import swtpm
from spire_hw_sim.swtpm import Swtpm

if TYPE_CHECKING:
    from types import TracebackType

_MODULES: Final = (
    "/usr/lib/x86_64-linux-gnu/pkcs11/libtpm2_pkcs11.so",
    "/usr/lib/aarch64-linux-gnu/pkcs11/libtpm2_pkcs11.so",
    "/usr/lib64/pkcs11/libtpm2_pkcs11.so",
)
_PROGRAMS: Final = ("dbus-daemon", "gdbus", "tpm2-abrmd", "tpm2_ptool", "tpm2_dictionarylockout")
_BUS: Final = "org.freedesktop.DBus"
_BROKER: Final = "com.intel.tss2.Tabrmd"
_START_S: Final = 30.0
_STOP_S: Final = 5.0
_BUS_CONFIG: Final = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow eavesdrop="true"/>
<allow own="*"/></policy></busconfig>
"""


def missing() -> str:
    """Return what is not installed, "" when a token can be made."""
    found = [name for name in _PROGRAMS if shutil.which(name) is None]
    found += [] if swtpm.is_available() else ["swtpm"]
    found += [] if _module() else ["libtpm2_pkcs11.so"]
    return ", ".join(found)


def _module() -> str | None:
    return next((path for path in _MODULES if Path(path).exists()), None)


class Tpm2Token:
    """One token named `spire` in a TPM.

    Attributes:
        tpm: the TPM.
        module: path of the module.
        pin: its user PIN.
    """

    def __init__(self, folder: Path, pin: str) -> None:
        self.tpm = Swtpm(folder / "tpm")
        self.pin = pin
        self._store = folder / "store"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._bus_dir = Path(tempfile.mkdtemp(prefix="bus-"))
        found = _module()
        if found is None:
            raise FileNotFoundError("tpm2-pkcs11 is not installed")
        self.module = found

    def __enter__(self) -> Self:
        """Start it; the token is made the first time."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything."""
        self.stop()
        shutil.rmtree(self._bus_dir, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Return what the loader of the module needs in its environment."""
        return {
            "TPM2_PKCS11_STORE": str(self._store),
            "TPM2_PKCS11_TCTI": "tabrmd:bus_type=session",
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self._bus_dir / 'bus'}",
        }

    def start(self) -> None:
        """Start TPM, bus and broker, and make the token unless there is one."""
        self.tpm.start()
        config = self._bus_dir / "bus.conf"
        config.write_text(_BUS_CONFIG.format(path=self._bus_dir / "bus"))
        self._spawn("dbus-daemon", "--nofork", f"--config-file={config}")
        # The broker ends at once when there is no bus yet.
        self._until("dbus-daemon", "gdbus", "wait", "--session", "--timeout=5", _BUS)
        self._spawn("tpm2-abrmd", "--session", "--allow-root", f"--tcti={self.tpm.tcti}")
        self._until("tpm2-abrmd", "gdbus", "wait", "--session", "--timeout=5", _BROKER)
        if not self._store.exists():
            self._make()

    def _until(self, what: str, *command: str) -> None:
        deadline = time.monotonic() + _START_S
        while self._run(*command) != 0:
            if time.monotonic() > deadline:
                raise UnavailableError(f"{what} does not start")
            time.sleep(0.02)

    def reset_lockout(self) -> None:
        """Have the TPM's owner forgive wrong PINs, as an operator does after a lockout."""
        self._checked("tpm2_dictionarylockout", "-c")

    def reboot(self) -> None:
        """Power-cycle the TPM, broker and bus included; the store stays."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """End broker, bus and TPM."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_S)
        self._processes.clear()
        self.tpm.stop()

    def _make(self) -> None:
        self._store.mkdir(mode=0o700)
        where = ("--path", str(self._store))
        self._checked("tpm2_ptool", "init", *where)
        token = ("--pid", "1", "--label", "spire", "--sopin", "12345678", "--userpin", self.pin)
        self._checked("tpm2_ptool", "addtoken", *token, *where)

    @property
    def _environment(self) -> dict[str, str]:
        tools = {"TPM2TOOLS_TCTI": "tabrmd:bus_type=session"}
        return {**os.environ, **self.environment, **tools}

    def _spawn(self, *command: str) -> None:
        self._processes.append(
            subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def _run(self, *command: str) -> int:
        done = subprocess.run(command, env=self._environment, check=False, capture_output=True)
        return done.returncode

    def _checked(self, *command: str) -> None:
        subprocess.run(command, env=self._environment, check=True, capture_output=True)
