"""A kernel's integrity measurements: the list in all its forms, and what PCR 10 then holds.

A list is its items; everything else is computed from them, so a test rewrites an item and has a
list that is consistent again, or renders a list that does not fit the PCR.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from spire_hw.posture.evidence import AppendedSignature, ImaEntry
from spire_hw.tpm import wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spire_hw_sim.swtpm import Swtpm

PCR = 10


@dataclass(frozen=True, slots=True)
class Item:
    """One entry.

    Attributes:
        path: of the file, or name of the buffer.
        digest: of its content.
        template: one of the kernel's, without those of EVM.
        algorithm: of the digest; `verity:sha256` for fs-verity's, with the templates that tell.
        extra: signature or buffer.
        content: SHA-256 of the content without the appended signature, for `ima-modsig`.
        appended: PKCS#7 message of that signature.
        violation: the kernel could not vouch for it: listed as zeros, extended as ones.
    """

    path: bytes
    digest: bytes
    template: str = "ima-ng"
    algorithm: str = "sha256"
    extra: bytes = b""
    content: bytes = b""
    appended: bytes = b""
    violation: bool = False

    def body(self) -> bytes:
        """Return the template data."""
        if self.template == "ima":
            return self.digest + self.path.ljust(256, b"\x00")
        out = _field(f"{self._kind()}:\0".encode() + self.digest) + _field(self.path + b"\x00")
        return out + b"".join(map(_field, self._further()))

    def _kind(self) -> str:
        typed = self.template.endswith("v2") and not self.algorithm.startswith("verity:")
        return f"ima:{self.algorithm}" if typed else self.algorithm

    def _further(self) -> tuple[bytes, ...]:
        if self.template in {"ima-ng", "ima-ngv2"}:
            return ()
        if self.template == "ima-modsig":
            content = b"sha256:\0" + self.content if self.content else b""
            return self.extra, content, self.appended
        return (self.extra,)

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
        return b" ".join([head + named, self.path, *(text.encode() for text in columns)])

    def entry(self) -> ImaEntry:
        """Return what a reader makes of it."""
        signature = self.extra if "sig" in self.template else b""
        appended = None
        if self.appended:
            appended = AppendedSignature("sha256", self.content, self.appended)
        named = self.path, self.algorithm, self.digest, self.template
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
