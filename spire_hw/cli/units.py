"""systemd units for the programs, as text: what each may touch, and nothing else (pure)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PIN_CREDENTIAL: Final = "hsm-pin"

# What no program of ours needs. Memory that is both written and run is left alone: foreign function
# interfaces, by which device libraries are called, make it.
_NEVER: Final = """\
LimitCORE=0
NoNewPrivileges=yes
ProtectSystem=strict
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
"""
# A server and a signer look at nothing but their own; an agent looks at its workloads.
_ALONE: Final = """\
UMask=0077
ProtectHome=yes
ProtectProc=invisible
PrivateTmp=yes
PrivateMounts=yes
PrivateIPC=yes
RemoveIPC=yes
KeyringMode=private
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
CapabilityBoundingSet=
"""
_AMONG_WORKLOADS: Final = """\
ProtectHome=read-only
PrivateTmp=no
CapabilityBoundingSet=CAP_SYS_PTRACE CAP_DAC_READ_SEARCH CAP_CHOWN CAP_FOWNER
"""


@dataclass(frozen=True, slots=True)
class Service:
    """One program as a service.

    Attributes:
        name: `server`, `agent` or `signer`.
        title: one line for people.
        program: path of the program.
        config: path of its configuration file.
        user: whose rights it has, "" for root's.
        groups: further groups, such as one that may use a device.
        devices: device files it may read and write; all others are hidden unless `all_devices`.
        all_devices: it may use every device its user may: those of an HSM on the bus are unknown.
        writable: paths it may write besides its own state, each may be missing.
        pin_file: file with a PIN that systemd hands to it as a credential, "" for none.
        reload_signal: what `systemctl reload` sends.
        shares_runtime: its sockets are in /run/spire-hw itself.
        after: units to be started before it.
    """

    name: str
    title: str
    program: str
    config: str
    user: str = ""
    groups: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    all_devices: bool = False
    writable: tuple[str, ...] = ()
    pin_file: str = ""
    reload_signal: str = "USR2"
    shares_runtime: bool = False
    after: tuple[str, ...] = ()

    @property
    def unit_name(self) -> str:
        """Return the file name of the unit."""
        return f"spire-hw-{self.name}.service"

    @property
    def credential_path(self) -> str:
        """Return where the service finds its PIN."""
        return f"/run/credentials/{self.unit_name}/{PIN_CREDENTIAL}"

    def text(self) -> str:
        """Return the unit."""
        after = " ".join(("network-online.target", *self.after))
        lines = [
            "[Unit]",
            f"Description={self.title}",
            f"After={after}",
            "Wants=network-online.target",
            "",
            "[Service]",
            "Type=exec",
        ]
        if self.user:
            lines += [f"User={self.user}", f"Group={self.user}"]
        if self.groups:
            lines.append(f"SupplementaryGroups={' '.join(self.groups)}")
        runtime = [f"RuntimeDirectory=spire-hw/{self.name}", "RuntimeDirectoryMode=0755"]
        if self.shares_runtime:
            # Others have their sockets below the same directory.
            runtime[0] = "RuntimeDirectory=spire-hw"
            runtime.append("RuntimeDirectoryPreserve=yes")
        lines += [
            f"ExecStartPre={self.program} validate -config {self.config}",
            f"ExecStart={self.program} run -config {self.config}",
            f"ExecReload=/bin/kill -{self.reload_signal} $MAINPID",
            "Restart=on-failure" if self.user else "Restart=always",
            "RestartSec=5s",
            "TimeoutStopSec=30s",
            *runtime,
            f"StateDirectory=spire-hw/{self.name}",
            "StateDirectoryMode=0700",
            "LimitNOFILE=65536",
        ]
        if self.pin_file:
            lines.append(f"LoadCredential={PIN_CREDENTIAL}:{self.pin_file}")
        if self.writable:
            lines.append(f"ReadWritePaths={' '.join(f'-{path}' for path in self.writable)}")
        lines += self._device_lines()
        rest = _NEVER + (_ALONE if self.user else _AMONG_WORKLOADS)
        return "\n".join(lines) + "\n" + rest + "\n[Install]\nWantedBy=multi-user.target\n"

    def _device_lines(self) -> list[str]:
        if self.all_devices:
            return []
        if self.devices:
            allowed = [f"DeviceAllow={path} rw" for path in self.devices]
            return ["DevicePolicy=closed", *allowed]
        return ["PrivateDevices=yes"]
