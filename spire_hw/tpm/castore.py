"""Manufacturers' CA certificates on disk: read for use, and collected from where they come from.

A directory with the folders `roots` and `intermediates` says itself what is trusted. Any other
directory, or a file, is sorted by what the certificates say: self-issued ones are roots.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.files import parse_file, read_bounded
from spire_hw.tpm import cabinet, certificate, der
from spire_hw.tpm.caimport import Blob
from spire_hw.tpm.certificate import Certificate, parse_certificate
from spire_hw.tpm.ekcert import EkRoots
from spire_hw.tpm.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

ROOTS: Final = "roots"
INTERMEDIATES: Final = "intermediates"
SUFFIXES: Final = frozenset({".pem", ".crt", ".cer", ".der"})
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_TOTAL_BYTES: Final = 64 << 20
_MAX_FILES: Final = 20_000
_MODE: Final = 0o644


@dataclass(frozen=True, slots=True)
class Source:
    """What an operator gave as a source of certificates.

    Attributes:
        kind: `directory`, `cabinet`, `PEM` or `DER`.
        sha256: lower-case hex digest of a file, "" for a directory.
        found: certificates; nothing about them was checked.
        faults: name and reason of files that hold something else.
        ignored: names of files that are no certificates by their suffix.
    """

    kind: str
    sha256: str
    found: tuple[Blob, ...]
    faults: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]


def load_roots(path: Path, pinned: Iterable[str] = ()) -> EkRoots:
    """Read roots and intermediates for use.

    Args:
        path: a PEM or DER file; a directory of files named .pem, .crt, .cer or .der; or a
            directory with the folders `roots` and `intermediates`.
        pinned: fingerprints of certificates that may be signed with SHA-1.

    Raises:
        NotReadyError: nothing there, unreadable, or without any root.
        InvalidInputError: a file holds something other than certificates, or `roots` one that is
            not self-issued.
    """
    try:
        if (path / ROOTS).is_dir():
            roots = EkRoots(
                anchors=_distinct(_read_roots(path / ROOTS)),
                intermediates=_distinct(_read_folder(path / INTERMEDIATES)),
                pinned=frozenset(pinned),
            )
        else:
            roots = EkRoots.of(_read_folder(path), pinned)
    except OSError as e:
        raise NotReadyError(f"cannot read endorsement CAs at {path}: {e.strerror}") from e
    if not roots.anchors:
        raise NotReadyError(f"no self-issued endorsement CA certificate at {path}")
    return roots


def watch_roots(path: Path, pinned: Iterable[str] = ()) -> Watched[EkRoots]:
    """Return the same, read again when its files change; arguments and errors as above."""
    fixed = frozenset(pinned)
    what = f"endorsement CAs at {path}"
    return Watched(what, lambda: files_of(path), lambda: load_roots(path, fixed))


def files_of(path: Path) -> list[Path]:
    """Return the files that certificates are read from.

    Raises:
        OSError: a directory cannot be read.
    """
    if (path / ROOTS).is_dir():
        return _files_of(path / ROOTS) + _files_of(path / INTERMEDIATES)
    return _files_of(path)


def _distinct(found: Iterable[Certificate]) -> tuple[Certificate, ...]:
    return tuple({c.der: c for c in found}.values())


def _read_roots(path: Path) -> Iterator[Certificate]:
    for file in _files_of(path):
        for found in _read_file(file):
            if not found.is_self_issued:
                text = "is not self-issued; an intermediate belongs into the folder intermediates"
                raise InvalidInputError(f"{file}: {text}")
            yield found


def _read_folder(path: Path) -> Iterator[Certificate]:
    for file in _files_of(path):
        yield from _read_file(file)


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [] if path.name == INTERMEDIATES and not path.exists() else [path]
    return [name for name in sorted(path.iterdir()) if name.suffix.lower() in SUFFIXES]


def _read_file(path: Path) -> list[Certificate]:
    def parse(blob: bytes) -> list[Certificate]:
        return [parse_certificate(one, "certificate") for one in split(blob)]

    return parse_file(path, _MAX_FILE_BYTES, parse, "endorsement CAs at")


def split(blob: bytes) -> list[bytes]:
    """Return the DER of the certificates of a file: PEM blocks, or one in DER.

    What follows one in DER is dropped: one manufacturer's root has trailing bytes.

    Raises:
        InvalidInputError: neither, or a PEM block of another kind.
    """
    if b"-----BEGIN" in blob:
        return certificate.split_pem(blob)
    return [der.read(blob, "certificate").raw]


def read_source(path: Path) -> Source:
    """Collect certificates from a directory with all below it, a PEM or DER file, or a cabinet.

    Raises:
        NotReadyError: cannot be read.
        InvalidInputError: a cabinet that is malformed, or more than can be sensible.
    """
    try:
        if path.is_dir():
            return _sort("directory", "", _walk(path))
    except OSError as e:
        raise NotReadyError(f"{path} cannot be read: {e.strerror}") from e
    blob = read_bounded(path, cabinet.MAX_CABINET_BYTES, pipes=True)
    digest = hashlib.sha256(blob).hexdigest()
    if blob.startswith(cabinet.MAGIC):
        return _sort("cabinet", digest, iter(cabinet.read_cabinet(blob)))
    kind = "PEM" if b"-----BEGIN" in blob else "DER"
    return _sort(kind, digest, iter([(f"{path.name}.pem", blob)]), whole=path.name)


def _walk(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files below a directory; links are not followed."""
    count = total = 0
    for folder, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            file = path.__class__(folder, name)
            if file.is_symlink() or not file.is_file():
                continue
            count, total = count + 1, total + file.stat().st_size
            if count > _MAX_FILES or total > _MAX_TOTAL_BYTES:
                limit = f"{_MAX_FILES} files of {_MAX_TOTAL_BYTES >> 20} MiB"
                raise InvalidInputError(f"{path}: more than {limit}")
            is_certificate = file.suffix.lower() in SUFFIXES
            yield str(file.relative_to(path)), file.read_bytes() if is_certificate else b""


def _sort(kind: str, digest: str, files: Iterator[tuple[str, bytes]], *, whole: str = "") -> Source:
    """Take files apart; `whole` is the name to report for a source that is one file."""
    found: list[Blob] = []
    faults: list[tuple[str, str]] = []
    ignored: list[str] = []
    for name, blob in files:
        if not any(name.lower().endswith(suffix) for suffix in SUFFIXES):
            ignored.append(name)
            continue
        shown = whole or name
        try:
            ders = split(blob)
        except InvalidInputError as e:
            faults.append((shown, e.message))
            continue
        if not ders:
            faults.append((shown, "holds no certificate"))
        for number, one in enumerate(ders, start=1):
            found.append(Blob(shown if len(ders) == 1 else f"{shown}#{number}", one))
    return Source(kind, digest, tuple(found), tuple(faults), tuple(ignored))


def write_certificate(folder: Path, name: str, raw: bytes, comment: str) -> bool:
    """Write one certificate as PEM, whole or not at all.

    Args:
        folder: made when it is not there.
        name: file name; the caller makes sure that it is nothing else.
        raw: DER.
        comment: one line of text above it.

    Returns:
        False when the same was there already.

    Raises:
        NotReadyError: cannot be written.
    """
    text = f"# {comment}\n".encode() + certificate.encode_pem(raw)
    target = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.is_file() and target.read_bytes() == text:
            return False
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text)
                os.fchmod(file.fileno(), _MODE)
            target.parent.joinpath(temporary).replace(target)
        except OSError:
            target.parent.joinpath(temporary).unlink(missing_ok=True)
            raise
    except OSError as e:
        raise NotReadyError(f"cannot write {target}: {e.strerror}") from e
    return True
