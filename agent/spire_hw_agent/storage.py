"""What the agent keeps on disk between runs: its SVID, the bundle and how it was enrolled.

One file, `agent-data.json`, as upstream writes it: arrays of base64 text, each the PEM of one
certificate. Private keys are never in it; they are the KeyManager's.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import ssl
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from spire_hw.errors import InvalidInputError, NotReadyError
from spire_hw.files import NoFileError, read_bounded, replace_file
from spire_hw.hardening import check_directory
from spire_hw.x509.certificate import load_certificate

if TYPE_CHECKING:
    from pathlib import Path

_FILE = "agent-data.json"
_LOCK = ".spire-hw-agent.lock"
_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class AgentData:
    """The content of the file.

    Attributes:
        svid: DER chain of the agent's X509-SVID, leaf first; empty before enrolment.
        bundle: DER certificates of the trust bundle; empty before bootstrap.
        reattestable: whether the agent attests again instead of renewing.
        other: members of the file this version does not use, kept as they are.
    """

    svid: tuple[bytes, ...] = ()
    bundle: tuple[bytes, ...] = ()
    reattestable: bool = False
    other: dict[str, Any] = field(default_factory=dict)


class Storage:
    """The agent's data directory, held by one process at a time; its methods may run in threads.

    Raises:
        NotReadyError: the directory cannot be used or another agent holds it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            check_directory(directory)
            self._lock_fd = os.open(
                directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
        except OSError as e:
            raise NotReadyError(f"data directory {directory} cannot be used: {e.strerror}") from e
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(self._lock_fd)
            raise NotReadyError(
                f"data directory {directory} is in use by another agent; stop it or set data_dir"
            ) from e
        self._data: AgentData | None = None
        self._mutex = threading.RLock()

    def close(self) -> None:
        """Let another process have the directory."""
        os.close(self._lock_fd)

    def load(self) -> AgentData:
        """Return what is stored; an absent file is an empty one.

        Raises:
            NotReadyError: the file is damaged or cannot be read; the message names it.
        """
        with self._mutex:
            if self._data is None:
                self._data = self._read()
            return self._data

    def _read(self) -> AgentData:
        return peek(self.directory)

    def store_bundle(self, bundle: tuple[bytes, ...]) -> None:
        """Replace the bundle."""
        with self._mutex:
            self._write(replace(self.load(), bundle=bundle))

    def store_svid(self, svid: tuple[bytes, ...], *, reattestable: bool) -> None:
        """Replace the agent's SVID."""
        with self._mutex:
            self._write(replace(self.load(), svid=svid, reattestable=reattestable))

    def drop_svid(self) -> None:
        """Forget the agent's SVID."""
        with self._mutex:
            if self.load().svid:
                self._write(replace(self.load(), svid=(), reattestable=False))

    def _write(self, data: AgentData) -> None:
        if data == self._data:
            return
        document = {
            **data.other,
            "svid": _lines(data.svid),
            "bundle": _lines(data.bundle),
            "reattestable": data.reattestable,
        }
        # Its draft has one name: the directory is locked.
        replace_file(self.directory / _FILE, json.dumps(document, indent=2).encode() + b"\n")
        self._data = data


def peek(directory: Path) -> AgentData:
    """Return what is stored in a directory that another agent may hold; see `Storage.load`."""
    path = directory / _FILE
    try:
        document = _document(read_bounded(path, _MAX_BYTES, links=False))
        return AgentData(
            svid=_chain(document.pop("svid", None)),
            bundle=_usable(_chain(document.pop("bundle", None))),
            reattestable=document.pop("reattestable", False) is True,
            other=document,
        )
    except NoFileError:
        return AgentData()
    except (ValueError, TypeError, RecursionError) as e:
        raise NotReadyError(
            f"{path} is damaged: {e}; remove the file to make the agent enrol again"
        ) from e


def _document(raw: bytes) -> dict[str, Any]:
    document = json.loads(raw)
    if not isinstance(document, dict):
        raise TypeError("not a JSON object")
    return document


def _lines(chain: tuple[bytes, ...]) -> list[str]:
    return [base64.b64encode(ssl.DER_cert_to_PEM_cert(der).encode()).decode() for der in chain]


def _chain(value: object) -> tuple[bytes, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise TypeError("certificates are not a list of texts")
    try:
        pems = [base64.b64decode(v, validate=True).decode("ascii") for v in value]
        return tuple(ssl.PEM_cert_to_DER_cert(pem.strip()) for pem in pems)
    except (binascii.Error, UnicodeDecodeError) as e:
        raise ValueError("a certificate is not base64 of PEM text") from e


def _usable(chain: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return certificates that parse; a bundle with others would lock the agent out."""
    for der in chain:
        try:
            load_certificate(der)
        except InvalidInputError as e:
            raise ValueError(f"a certificate does not parse: {e.message}") from e
    return chain
