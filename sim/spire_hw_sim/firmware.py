"""Firmware and boot loaders of a machine: what they measure, and the log they keep of it.

A `Firmware` is a machine's set-up; its `boot()` is one start: a list of measurements from which come
the log, the PCR values, and the extends of a real TPM. Tests bend the list and get a log that is
consistent again, or bend the log alone.

Shapes of events follow logs of real machines: what a digest covers differs from event to event.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Self

from spire_hw.tpm import secureboot, wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from spire_hw_sim.swtpm import Swtpm

EV_POST_CODE: Final = 0x01
EV_NO_ACTION: Final = 0x03
EV_SEPARATOR: Final = 0x04
EV_EVENT_TAG: Final = 0x06
EV_S_CRTM_VERSION: Final = 0x08
EV_IPL: Final = 0x0D
EV_VARIABLE: Final = 0x80000001
EV_VARIABLE_BOOT: Final = 0x80000002
EV_APPLICATION: Final = 0x80000003
EV_DRIVER: Final = 0x80000004
EV_GPT: Final = 0x80000006
EV_ACTION: Final = 0x80000007
EV_BLOB: Final = 0x80000008
EV_AUTHORITY: Final = 0x800000E0

OWNER: Final = bytes.fromhex("bd9afa775903324dbd6028f4e78f784b")
SHIM_LOCK: Final = bytes.fromhex("50ab5d6046e00043abb63dd810dd8b23")
VENDOR_KEY: Final = b"\x30\x82\x03\xe4" + hashlib.shake_128(b"vendor certificate").digest(996)
DISTRIBUTION_KEY: Final = b"\x30\x82\x03\x20" + hashlib.shake_128(b"distribution").digest(800)
CALLING: Final = b"Calling EFI Application from Boot Option"
INVOCATION: Final = b"Exit Boot Services Invocation"
SUCCESS: Final = b"Exit Boot Services Returned with Success"
FAILURE: Final = b"Exit Boot Services Returned with Failure"
PHASES: Final = ("enter-initrd", "leave-initrd", "sysinit", "ready")

_INITRD_TAG, _OPTIONS_TAG = 0x8F3B22EC, 0x8F3B22ED


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement.

    Attributes:
        pcr: where to.
        type: of the event.
        data: of the event.
        content: what is hashed; the event's data when None.
        extends: the TPM is told.
        logged: the log is told.
    """

    pcr: int
    type: int
    data: bytes
    content: bytes | None = None
    extends: bool = True
    logged: bool = True

    def digest(self, bank: str) -> bytes:
        """Return what the log has for a bank: zeros for what was not measured."""
        if self.type == EV_NO_ACTION:
            return bytes(wire.HASHES[wire.BANKS[bank]][1])
        return hashlib.new(bank, self.data if self.content is None else self.content).digest()


@dataclass(frozen=True, slots=True)
class Boot:
    """One start of a machine.

    Attributes:
        measurements: in order.
        banks: hash names of the log and of the TPM.
        locality: where PCR 0 starts.
        legacy: the log is of the old format, SHA-1 alone.
    """

    measurements: tuple[Measurement, ...]
    banks: tuple[str, ...] = ("sha1", "sha256")
    locality: int = 0
    legacy: bool = False

    def log(self) -> bytes:
        """Return the log as the kernel shows it."""
        entries = [m for m in self.measurements if m.logged]
        if self.legacy:
            return b"".join(map(legacy_event, entries))
        return header(self.banks) + b"".join(event(m, self.banks) for m in entries)

    def values(self, bank: str) -> dict[int, bytes]:
        """Return all PCRs of a bank as they are after this boot."""
        size = wire.HASHES[wire.BANKS[bank]][1]
        values = {n: (b"\xff" if 17 <= n <= 22 else b"\x00") * size for n in range(24)}  # noqa: PLR2004
        values[0] = self.locality.to_bytes(size, "big")
        for m in self._extended():
            values[m.pcr] = hashlib.new(bank, values[m.pcr] + m.digest(bank)).digest()
        return values

    def pcrs(self, *banks: str) -> dict[tuple[str, int], bytes]:
        """Return the values of these banks, or of all, by bank and PCR."""
        chosen = banks or self.banks
        return {(bank, n): value for bank in chosen for n, value in self.values(bank).items()}

    def run(self, tpm: Swtpm, banks: Sequence[str] = ("sha256",)) -> None:
        """Measure into a TPM that was just reset.

        Args:
            tpm: running.
            banks: those it has.
        """
        for m in self._extended():
            tpm.commands.pcr_extend(m.pcr, {bank: m.digest(bank) for bank in banks})

    def with_phases(self, *names: str) -> Self:
        """Return the same boot gone on: PCR 11 moved by boot phases, which no log knows."""
        return self.then(*(Measurement(11, EV_IPL, n.encode(), logged=False) for n in names))

    def then(self, *more: Measurement) -> Self:
        """Return the same boot with more measurements at its end."""
        return replace(self, measurements=(*self.measurements, *more))

    def change(self, edit: Callable[[Measurement], Measurement | None]) -> Self:
        """Return a boot with each measurement replaced, or left out for None."""
        edited = (edit(m) for m in self.measurements)
        return replace(self, measurements=tuple(m for m in edited if m is not None))

    def _extended(self) -> Iterable[Measurement]:
        return (m for m in self.measurements if m.extends and m.type != EV_NO_ACTION)


@dataclass(frozen=True, slots=True)
class Firmware:
    """A machine's set-up.

    Attributes:
        version: of the firmware.
        secure_boot: the switch.
        db: certificates in db; the first one signed the boot loader.
        dbx: SHA-256 image digests in dbx.
        loader: `grub` (shim, GRUB, kernel) or `uki` (one unified kernel image).
        sbat: revocation level shim measures, "" for a shim that does not.
        kernel: the kernel, as bytes.
        initrd: its initial file system.
        command_line: given to the kernel.
        commands: lines GRUB's configuration has.
        command_bytes: length of each.
        roms: option ROMs.
        logs_exit: it logs that boot services ended, which it measures in any case.
        shim_adds_byte: an old shim that measures five zeros more than there is, and logs one byte
            more than that.
        debug_mode: booted with a debugger.
        dma_protection: the IOMMU was on before memory was.
        banks: hash names.
        locality: where PCR 0 starts; other than 0 there is an event that says so.
        legacy: SHA-1 log of the old format.
    """

    version: str = "Sim 1.2.3"
    secure_boot: bool = True
    db: tuple[bytes, ...] = (VENDOR_KEY,)
    dbx: tuple[bytes, ...] = field(
        default_factory=lambda: tuple(hashlib.sha256(b"revoked%d" % i).digest() for i in range(20))
    )
    loader: str = "grub"
    sbat: str = "sbat,1,2023012900"
    kernel: bytes = b"kernel 6.1.0-28"
    initrd: bytes = b"initrd of 6.1.0-28"
    command_line: str = "/boot/vmlinuz root=/dev/sda1 ro quiet"
    commands: int = 30
    command_bytes: int = 24
    roms: int = 1
    logs_exit: bool = True
    shim_adds_byte: bool = False
    debug_mode: bool = False
    dma_protection: bool = True
    banks: tuple[str, ...] = ("sha1", "sha256")
    locality: int = 0
    legacy: bool = False

    def boot(self) -> Boot:
        """Start the machine once."""
        parts = [*self._platform(), *self._secure_boot(), *self._separators(), *self._load()]
        banks = ("sha1",) if self.legacy else self.banks
        return Boot(tuple(parts), banks, self.locality, self.legacy)

    def _platform(self) -> Iterable[Measurement]:
        if self.locality:
            data = b"StartupLocality\x00" + bytes((self.locality,))
            yield Measurement(0, EV_NO_ACTION, data)
        yield Measurement(0, EV_S_CRTM_VERSION, f"{self.version}\0".encode("utf-16-le"))
        yield Measurement(0, EV_BLOB, struct.pack("<QQ", 0xFF000000, 0x800000), b"volume")
        yield Measurement(0, EV_POST_CODE, b"ACPI DATA", b"tables")
        yield Measurement(1, EV_VARIABLE_BOOT, variable(secureboot.GLOBAL, "BootOrder", b"\1\0"))
        order = variable(secureboot.GLOBAL, "Boot0001", b"disk")
        yield Measurement(1, EV_VARIABLE_BOOT, order, b"disk")
        for number in range(self.roms):
            path = struct.pack("<QQQQ", 0x7A000000, 0x20000, 0, 0)
            yield Measurement(2, EV_DRIVER, path, b"option ROM %d" % number)

    def _secure_boot(self) -> Iterable[Measurement]:
        keys = self.secure_boot
        contents = {
            "SecureBoot": bytes((self.secure_boot,)),
            "PK": signature_list(secureboot.CERT_X509, [b"platform key"]) if keys else b"",
            "KEK": signature_list(secureboot.CERT_X509, [b"exchange key"]) if keys else b"",
            "db": b"".join(signature_list(secureboot.CERT_X509, [c]) for c in self.db),
            "dbx": signature_list(secureboot.CERT_SHA256, self.dbx) if self.dbx else b"",
        }
        if self.debug_mode:
            yield Measurement(7, EV_ACTION, secureboot.DEBUG_MODE)
        for name, value in contents.items():
            owner = secureboot.IMAGE_SECURITY if name in {"db", "dbx"} else secureboot.GLOBAL
            yield Measurement(7, EV_VARIABLE, variable(owner, name, value))
        if not self.dma_protection:
            yield Measurement(7, EV_ACTION, secureboot.DMA_DISABLED)

    def _separators(self) -> Iterable[Measurement]:
        yield Measurement(4, EV_ACTION, CALLING)
        for pcr in range(8):
            yield Measurement(pcr, EV_SEPARATOR, bytes(4))
        # A table's header, how many partitions, and one.
        yield Measurement(5, EV_GPT, b"EFI PART" + bytes(84) + struct.pack("<Q", 1) + bytes(128))

    def _load(self) -> Iterable[Measurement]:
        if self.secure_boot:
            signer = secureboot.IMAGE_SECURITY, "db", OWNER + self.db[0]
            yield self._authority(*signer)
        yield from self._unified() if self.loader == "uki" else self._grub()
        yield Measurement(5, EV_ACTION, INVOCATION, logged=self.logs_exit)
        yield Measurement(5, EV_ACTION, SUCCESS, logged=self.logs_exit)

    def _grub(self) -> Iterable[Measurement]:
        yield Measurement(4, EV_APPLICATION, _IMAGE_PATH, b"shim 15.7")
        for name in (b"MokList\x00", b"MokListX\x00"):
            yield Measurement(14, EV_IPL, name, b"content of " + name)
        if self.sbat:
            level = f"{self.sbat}\nshim,2\ngrub,3\n".encode()
            yield self._authority(SHIM_LOCK, "SbatLevel", level)
        yield Measurement(14, EV_IPL, b"MokListTrusted\x00", b"\1")
        if self.secure_boot:
            yield self._authority(SHIM_LOCK, "Shim", DISTRIBUTION_KEY)
        yield Measurement(4, EV_APPLICATION, _IMAGE_PATH, b"GRUB 2.12")
        for number in range(self.commands):
            text = f"set variable{number}={'x' * self.command_bytes}".encode()
            yield Measurement(8, EV_IPL, b"grub_cmd: " + text + b"\x00", text)
        yield Measurement(9, EV_IPL, b"(hd0,gpt1)/boot/vmlinuz\x00", self.kernel)
        yield Measurement(4, EV_APPLICATION, _IMAGE_PATH, self.kernel)
        line = self.command_line.encode()
        yield Measurement(8, EV_IPL, b"kernel_cmdline: " + line + b"\x00", line)
        yield Measurement(9, EV_IPL, b"(hd0,gpt1)/boot/initrd.img\x00", self.initrd)
        yield from self._stub()

    def _unified(self) -> Iterable[Measurement]:
        sections = {".linux": self.kernel, ".cmdline": self.command_line.encode()}
        sections[".initrd"] = self.initrd
        yield Measurement(4, EV_APPLICATION, _IMAGE_PATH, b"stub" + self.kernel)
        for name, content in sections.items():
            label = f"{name}\0".encode()
            yield Measurement(11, EV_IPL, f"{name}\0".encode("utf-16-le"), label)
            yield Measurement(11, EV_IPL, f"{name}\0".encode("utf-16-le"), content)
        yield Measurement(12, EV_IPL, f"{self.command_line}\0".encode("utf-16-le"))
        yield from self._stub()

    def _stub(self) -> Iterable[Measurement]:
        yield Measurement(9, EV_EVENT_TAG, tagged(_INITRD_TAG, b"Linux initrd\x00"), self.initrd)
        options = self.command_line.encode("utf-16-le")
        named = tagged(_OPTIONS_TAG, b"LOADED_IMAGE::LoadOptions\x00")
        yield Measurement(9, EV_EVENT_TAG, named, options)

    def _authority(self, owner: bytes, name: str, value: bytes) -> Measurement:
        data = variable(owner, name, value)
        if self.shim_adds_byte and owner == SHIM_LOCK:
            return Measurement(7, EV_AUTHORITY, data + bytes(5) + b"\xaf", data + bytes(5))
        return Measurement(7, EV_AUTHORITY, data)


_IMAGE_PATH: Final = struct.pack("<QQQQ", 0x7B000000, 0x100000, 0, 4) + b"\x7f\xff\x04\x00"

PROFILES: Final = {
    "clean": Firmware(),
    "secure_boot_off": Firmware(secure_boot=False),
    "evil_kernel": Firmware(kernel=b"kernel with a door"),
    "dbx_update": Firmware(
        dbx=tuple(hashlib.sha256(b"revoked%d" % i).digest() for i in range(30)),
        sbat="sbat,1,2024040900",
    ),
    "uki": Firmware(loader="uki"),
    "grub": Firmware(
        commands=500,
        command_bytes=240,
        dbx=tuple(hashlib.sha256(b"revoked%d" % i).digest() for i in range(371)),
    ),
    "option_roms": Firmware(roms=220, commands=300, command_bytes=60),
    "forgets_exit": Firmware(logs_exit=False),
    "old_shim": Firmware(shim_adds_byte=True),
    "locality": Firmware(locality=3),
    "legacy": Firmware(legacy=True),
}


def header(banks: Sequence[str], vendor: bytes = b"") -> bytes:
    """Return the Spec ID event."""
    table = b"".join(
        struct.pack("<HH", wire.BANKS[b], wire.HASHES[wire.BANKS[b]][1]) for b in banks
    )
    data = b"Spec ID Event03\x00" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, len(banks)) + table
    data += bytes((len(vendor),)) + vendor
    return struct.pack("<II20sI", 0, EV_NO_ACTION, bytes(20), len(data)) + data


def event(measurement: Measurement, banks: Sequence[str]) -> bytes:
    """Return one crypto-agile event."""
    out = struct.pack("<III", measurement.pcr, measurement.type, len(banks))
    for bank in banks:
        out += struct.pack("<H", wire.BANKS[bank]) + measurement.digest(bank)
    return out + struct.pack("<I", len(measurement.data)) + measurement.data


def legacy_event(measurement: Measurement) -> bytes:
    """Return one event of the old format."""
    head = struct.pack("<II", measurement.pcr, measurement.type) + measurement.digest("sha1")
    return head + struct.pack("<I", len(measurement.data)) + measurement.data


def variable(owner: bytes, name: str, value: bytes) -> bytes:
    """Return a UEFI_VARIABLE_DATA."""
    encoded = name.encode("utf-16-le")
    return owner + struct.pack("<QQ", len(name), len(value)) + encoded + value


def signature_list(kind: bytes, entries: Sequence[bytes]) -> bytes:
    """Return an EFI_SIGNATURE_LIST of entries of one size."""
    body = b"".join(OWNER + entry for entry in entries)
    return kind + struct.pack("<III", 28 + len(body), 0, 16 + len(entries[0])) + body


def tagged(tag: int, data: bytes) -> bytes:
    """Return a TCG_PCClientTaggedEvent."""
    return struct.pack("<II", tag, len(data)) + data
