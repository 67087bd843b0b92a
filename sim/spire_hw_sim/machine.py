"""A virtual machine with real firmware: UEFI, shim, GRUB and a Debian kernel over a swtpm.

What it measures into the TPM is what machines measure, and the guest sees the TPM through the
kernel's driver as `/dev/tpmrm0`. It runs without hardware virtualisation (`-accel tcg`), so a boot
takes the better part of a minute. `scripts/vm-image.sh` makes the image.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from spire_hw.errors import DeviceError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw_sim.swtpm import Swtpm

# Where the guest reaches this machine's loopback.
HOST_ADDRESS = "10.0.2.2"
_TOOLS = ("qemu-system-x86_64", "mke2fs", "debugfs", "mformat", "mcopy", "swtpm")
_STOP_S = 10.0
_SEED_SIZE, _ESP_SECTORS = "32M", 131072
_COMMAND_LINE = "console=ttyS0 panic=-1 quiet"


def missing_tools() -> list[str]:
    """Return the programs this needs that are not installed."""
    return [name for name in _TOOLS if shutil.which(name) is None]


class Machine:
    """One machine: its TPM, firmware variables and disk survive from boot to boot.

    Attributes:
        folder: holds the machine's files.
    """

    def __init__(
        self,
        image: Path,
        folder: Path,
        tpm: Swtpm,
        files: Mapping[str, bytes],
        *,
        secure_boot: bool = True,
    ) -> None:
        """Assemble it.

        Args:
            image: folder that `scripts/vm-image.sh` made.
            folder: made when missing.
            tpm: not running; the machine drives it.
            files: of the machine's own disk by name. `run.sh` is what it does after booting.
            secure_boot: with vendor keys in the firmware, else with none.
        """
        self.folder = folder
        self._image = image
        self._tpm = tpm
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: Path | None = None
        seed = folder / "seed"
        seed.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (seed / name).write_bytes(data)
        variables = "OVMF_VARS_4M.ms.fd" if secure_boot else "OVMF_VARS_4M.fd"
        shutil.copy(image / variables, self._variables)
        _run("mke2fs", "-q", "-t", "ext4", "-d", seed, self._disk, _SEED_SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.power_off()

    @property
    def is_running(self) -> bool:
        """Tell whether the machine is on."""
        return bool(self._processes) and self._processes[-1].poll() is None

    @property
    def console(self) -> str:
        """Return what its serial console said since it was switched on."""
        path = self.folder / "console.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def power_on(self, *, kernel_arguments: str = "") -> None:
        """Switch it on.

        Args:
            kernel_arguments: added to the kernel's command line.
        """
        if self.is_running:
            raise UnavailableError("the machine is on")
        self.power_off()
        self._write_boot_disk(f"{_COMMAND_LINE} {kernel_arguments}".strip())
        (self.folder / "console.log").unlink(missing_ok=True)
        # Not in the folder: sun_path holds 107 bytes.
        self._sockets = Path(tempfile.mkdtemp(prefix="machine-"))
        control = self._sockets / "tpm"
        self._start(
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._tpm.state_dir}"),
            *("--ctrl", f"type=unixio,path={control}", "--terminate"),
            *("--log", f"file={self.folder / 'swtpm.log'}"),
        )
        _wait_for_socket(control)
        self._start(*self._qemu(control, self._sockets / "qmp"))

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Return what the console said that matches.

        Raises:
            UnavailableError: it did not say so in time, or the machine went off.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            is_running = self.is_running
            if found := re.search(pattern, self.console):
                return found
            if not is_running or time.monotonic() > deadline:
                state = "did not say so in time" if is_running else "went off"
                tail = self.console[-2000:]
                raise UnavailableError(f"{pattern!r}: the machine {state}; its console:\n{tail}")
            time.sleep(0.2)

    def reset(self) -> None:
        """Press the reset button: no program gets to end in order."""
        if self._sockets is None:
            raise UnavailableError("the machine is off")
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(_STOP_S)
            s.connect(str(self._sockets / "qmp"))
            reader = s.makefile("rb")
            reader.readline()  # the greeting
            for command in ("qmp_capabilities", "system_reset"):
                s.sendall(json.dumps({"execute": command}).encode())
                while "return" not in json.loads(reader.readline() or b'{"return": 0}'):
                    pass

    def power_off(self) -> None:
        """Pull the plug; the same machine can be switched on again."""
        processes, self._processes = self._processes, []
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_S)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
            self._sockets = None

    def read(self, name: str) -> bytes:
        """Return a file of the machine's own disk; the machine must be off.

        Raises:
            DeviceError: there is none.
        """
        with tempfile.TemporaryDirectory() as place:
            copy = Path(place) / "file"
            _run("debugfs", "-R", f"dump /{name} {copy}", self._disk)
            if not copy.exists():
                raise DeviceError(f"{name}: not there", device="machine", operation="read")
            return copy.read_bytes()

    @property
    def _variables(self) -> Path:
        return self.folder / "variables.fd"

    @property
    def _disk(self) -> Path:
        return self.folder / "disk.img"

    def _write_boot_disk(self, command_line: str) -> None:
        path = self.folder / "esp.img"
        path.unlink(missing_ok=True)
        menu = self.folder / "grub.cfg"
        menu.write_text(
            f"set timeout=0\nlinuxefi /vmlinuz {command_line}\ninitrdefi /initrd\nboot\n"
        )
        image = ("-i", path)
        _run("mformat", *image, "-C", "-T", str(_ESP_SECTORS), "-h", "64", "-s", "32", "::")
        _run("mmd", *image, "::/EFI", "::/EFI/BOOT", "::/EFI/debian")
        for source, place in {
            self._image / "shim.efi": "EFI/BOOT/BOOTX64.EFI",
            self._image / "grub.efi": "EFI/BOOT/grubx64.efi",
            menu: "EFI/debian/grub.cfg",
            self._image / "vmlinuz": "vmlinuz",
            self._image / "initrd.gz": "initrd",
        }.items():
            _run("mcopy", *image, source, f"::/{place}")

    def _qemu(self, tpm: Path, monitor: Path) -> list[str]:
        code = self._image / "OVMF_CODE_4M.secboot.fd"
        command = [
            *(
                "qemu-system-x86_64",
                "-accel",
                "tcg",
                "-cpu",
                "max",
                "-m",
                "1024",
                "-no-user-config",
            ),
            *("-machine", "q35,smm=on"),
            *("-display", "none", "-monitor", "none", "-qmp", f"unix:{monitor},server=on,wait=off"),
            *("-serial", f"file:{self.folder / 'console.log'}"),
            *("-chardev", f"socket,id=tpm,path={tpm}", "-tpmdev", "emulator,id=t,chardev=tpm"),
            *("-device", "tpm-crb,tpmdev=t"),
            *("-drive", f"if=pflash,format=raw,readonly=on,file={code}"),
            *("-drive", f"if=pflash,format=raw,file={self._variables}"),
            # Only firmware in system management mode may write its variables.
            *("-global", "driver=cfi.pflash01,property=secure,value=on"),
            *("-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="),
        ]
        disks = (
            ("esp", self.folder / "esp.img", "on", ",bootindex=0"),
            ("root", self._image / "root.img", "on", ""),
            ("own", self._disk, "off", ""),
        )
        for name, path, fixed, place in disks:
            command += ["-drive", f"if=none,id={name},format=raw,file={path},readonly={fixed}"]
            command += ["-device", f"virtio-blk-pci,drive={name}{place}"]
        return command

    def _start(self, *command: str) -> None:
        with (self.folder / "programs.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise DeviceError(f"{command[0]}: {said}", device="machine", operation="assemble")


def _wait_for_socket(path: Path) -> None:
    deadline = time.monotonic() + _STOP_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise UnavailableError("swtpm does not start")
        time.sleep(0.01)
