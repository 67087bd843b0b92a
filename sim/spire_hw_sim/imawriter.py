"""A kernel's integrity measurements: the list in all its forms, and what PCR 10 then holds.

A list is its items; everything else is computed from them, so a test rewrites an item and has a
list that is consistent again, or renders a list that does not fit the PCR.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Self

from spire_hw.posture.evidence import AppendedSignature, ImaEntry
from spire_hw.tpm import wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw_sim.swtpm import Swtpm

PCR = 10


class _Made(NamedTuple):
    """A field in both forms."""

    data: bytes
    text: str | None = None

    @property
    def column(self) -> str:
        return self.data.hex() if self.text is None else self.text


_EVM = "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode"
_NO_INODE = {name: _Made(b"") for name in _EVM.split("|")[2:]}


@dataclass(frozen=True, slots=True)
class Inode:
    """What the fields of `evm-sig` tell of a file.

    Attributes:
        evmsig: EVM's portable signature.
        xattrs: the file's attributes by name.
        uid: owner; group and mode with it.
    """

    evmsig: bytes = b""
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    uid: int = 0
    gid: int = 0
    mode: int = 0o100755

    def fields(self) -> dict[str, _Made]:
        """Return the fields by the kernel's names."""
        names = "|".join(self.xattrs)
        lengths = b"".join(struct.pack("<I", len(value)) for value in self.xattrs.values())
        return {
            "evmsig": _Made(self.evmsig),
            "xattrnames": _Made(names.encode() + b"\0" if names else b"", names),
            "xattrlengths": _Made(lengths),
            "xattrvalues": _Made(b"".join(self.xattrs.values())),
            "iuid": _Made(struct.pack("<I", self.uid), str(self.uid)),
            "igid": _Made(struct.pack("<I", self.gid), str(self.gid)),
            "imode": _Made(struct.pack("<H", self.mode), str(self.mode)),
        }


@dataclass(frozen=True, slots=True)
class Item:
    """One entry.

    Attributes:
        path: of the file, or name of the buffer.
        digest: of its content.
        template: one of the kernel's, or a format of one's own (`d-ng|n-ng|…`), made of the fields
            of `evm-sig`, `sig` and `buf`.
        algorithm: of the digest; `verity:sha256` for fs-verity's, with the templates that tell.
        extra: signature or buffer.
        content: SHA-256 of the content without the appended signature, for `ima-modsig`.
        appended: PKCS#7 message of that signature.
        violation: the kernel could not vouch for it: listed as zeros, extended as ones.
        inode: what the kernel says of the file itself, None for a buffer.
    """

    path: bytes
    digest: bytes
    template: str = "ima-ng"
    algorithm: str = "sha256"
    extra: bytes = b""
    content: bytes = b""
    appended: bytes = b""
    violation: bool = False
    inode: Inode | None = None

    def body(self) -> bytes:
        """Return the template data."""
        if self.template == "ima":
            return self.digest + self.path.ljust(256, b"\x00")
        out = _field(f"{self._kind()}:\0".encode() + self.digest) + _field(self.path + b"\x00")
        return out + b"".join(map(_field, self._further()))

    def _kind(self) -> str:
        typed = ("v2" in self.template) and not self.algorithm.startswith("verity:")
        return f"ima:{self.algorithm}" if typed else self.algorithm

    def _further(self) -> tuple[bytes, ...]:
        if self.template in {"ima-ng", "ima-ngv2"}:
            return ()
        if self.template == "ima-modsig":
            content = b"sha256:\0" + self.content if self.content else b""
            return self.extra, content, self.appended
        if self._is_made_up():
            return tuple(field.data for field in self._made_up())
        return (self.extra,)

    def _is_made_up(self) -> bool:
        return self.template == "evm-sig" or "|" in self.template

    def _made_up(self) -> list[_Made]:
        form = _EVM if self.template == "evm-sig" else self.template
        fields = {"sig": _Made(self.extra), "buf": _Made(self.extra)}
        fields |= _NO_INODE if self.inode is None else self.inode.fields()
        return [fields[name] for name in form.split("|")[2:]]

    def template_hash(self, bank: str = "sha1") -> bytes:
        """Return the column of the list."""
        size = wire.HASHES[wire.BANKS[bank]][1]
        return bytes(size) if self.violation else hashlib.new(bank, self.body()).digest()

    def extension(self, bank: str, *, padded: bool = False) -> bytes:
        """Return what PCR 10 is extended with."""
        size = wire.HASHES[wire.BANKS[bank]][1]
        if self.violation:
            return b"\xff" * size
        if padded:
            return self.template_hash().ljust(size, b"\x00")
        return self.template_hash(bank)

    def line(self, bank: str = "sha1") -> bytes:
        """Return it as a line without its end."""
        head = b"%d %b %b " % (PCR, self.template_hash(bank).hex().encode(), self.template.encode())
        if self.template == "ima":
            return head + self.digest.hex().encode() + b" " + self.path
        named = f"{self._kind()}:{self.digest.hex()}".encode()
        columns = [field.hex() for field in self._further()]
        if self.template == "ima-modsig" and self.content:
            columns[1] = f"sha256:{self.content.hex()}"
        if self._is_made_up():
            columns = [field.column for field in self._made_up()]
        return b" ".join([head + named, self.path, *(text.encode() for text in columns)])

    def entry(self) -> ImaEntry:
        """Return what a reader makes of it."""
        has_signature = re.search(r"ima-(mod)?sig|\|sig\b", self.template)
        signature = self.extra if has_signature else b""
        appended = None
        if self.appended:
            appended = AppendedSignature("sha256", self.content, self.appended)
        name = "custom" if "|" in self.template else self.template
        named = self.path, self.algorithm, self.digest, name
        return ImaEntry(*named, signature, appended)

    def record(self) -> bytes:
        """Return it in the binary form."""
        head = struct.pack("<I20sI", PCR, self.template_hash(), len(self.template))
        head += self.template.encode()
        if self.template == "ima":
            return head + self.digest + _field(self.path)
        return head + _field(self.body())


@dataclass(frozen=True, slots=True)
class ImaList:
    """The list of one boot.

    Attributes:
        items: entries, the boot aggregate first.
        padded: a kernel before 5.8: SHA-1 with zeros behind goes into every bank.
    """

    items: tuple[Item, ...] = field(default=())
    padded: bool = False

    @classmethod
    def start(
        cls,
        pcrs: Mapping[int, bytes],
        *,
        algorithm: str = "sha256",
        loaders: bool = True,
        template: str = "ima-ng",
        padded: bool = False,
    ) -> Self:
        """Return the list of a kernel that has just started.

        Args:
            pcrs: values of the bank of `algorithm`.
            algorithm: of the boot aggregate.
            loaders: it covers PCR 8 and 9 (from 5.8 on, but for SHA-1).
            template: of the first entry.
            padded: see above.
        """
        covered = b"".join(pcrs[n] for n in range(10 if loaders else 8))
        digest = hashlib.new(algorithm, covered).digest()
        return cls((Item(b"boot_aggregate", digest, template, algorithm),), padded)

    def measure(self, *items: Item) -> Self:
        """Return the list after more entries."""
        return replace(self, items=(*self.items, *items))

    def files(self, count: int, template: str = "ima-ng", prefix: str = "/usr/bin/tool") -> Self:
        """Return the list after `count` files were run."""
        names = (f"{prefix}{number}".encode() for number in range(count))
        extra = b"\x03\x02\x04" + bytes(72) if template == "ima-sig" else b""
        return self.measure(
            *(Item(n, hashlib.sha256(n).digest(), template, extra=extra) for n in names)
        )

    def changed(self, index: int, digest: bytes) -> Self:
        """Return a list in which the content of one file was another."""
        items = list(self.items)
        items[index] = replace(items[index], digest=digest)
        return replace(self, items=tuple(items))

    def pcr(self, bank: str = "sha256", count: int | None = None) -> bytes:
        """Return PCR 10 after all entries, or the first `count`."""
        value = bytes(wire.HASHES[wire.BANKS[bank]][1])
        for item in self.items[:count]:
            value = hashlib.new(bank, value + item.extension(bank, padded=self.padded)).digest()
        return value

    def run(self, tpm: Swtpm, banks: Sequence[str] = ("sha256",), first: int = 0) -> None:
        """Measure entries from `first` on into a TPM."""
        for item in self.items[first:]:
            tpm.commands.pcr_extend(
                PCR, {bank: item.extension(bank, padded=self.padded) for bank in banks}
            )

    def ascii(self, first: int = 0, bank: str = "sha1") -> bytes:
        """Return `ascii_runtime_measurements` from an entry on; of newer kernels, of any bank."""
        return b"".join(item.line(bank) + b"\n" for item in self.items[first:])

    def binary(self, first: int = 0) -> bytes:
        """Return `binary_runtime_measurements` from an entry on."""
        return b"".join(item.record() for item in self.items[first:])


def _field(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data
