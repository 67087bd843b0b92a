"""The worker's second thread: verifies what the token signed and sends all answers, in order.

Signing and verifying are both C code that lets go of the interpreter, so the token is asked for the
next signature while the last one is verified. This thread never calls the PKCS#11 module.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from spire_hw.errors import SpireHwError
from spire_hw.key import KeyType, PublicKey, key_type_of, parse_spki, verify_digest
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.keys import signature_of
from spire_hw.pkcs11.wire import Kind, SignItem, encode_results

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_KEYS: Final = 256


class KnownKeys:
    """Public keys parsed once."""

    def __init__(self) -> None:
        self._keys: dict[bytes, tuple[PublicKey, KeyType]] = {}

    def get(self, spki: bytes) -> tuple[PublicKey, KeyType]:
        """Return the key and its type.

        Raises:
            InvalidInputError: it is none of ours.
        """
        known = self._keys.get(spki)
        if known is None:
            public_key = parse_spki(spki)
            known = (public_key, key_type_of(public_key))
            if len(self._keys) >= _MAX_KEYS:
                self._keys.clear()
            self._keys[spki] = known
        return known


@dataclass(slots=True)
class Batch:
    """The answer to one SIGN frame in the making."""

    number: int
    results: list[bytes | TokenError] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Raw:
    batch: Batch
    item: SignItem
    result: bytes | TokenError


@dataclass(frozen=True, slots=True)
class _Answer:
    kind: Kind
    number: int
    body: bytes


class Checker:
    """Verifies and answers; closed by `close`."""

    def __init__(self, send: Callable[[Kind, int, bytes], None]) -> None:
        self._send = send
        self._keys = KnownKeys()
        self._queue: queue.SimpleQueue[_Raw | Batch | _Answer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="checker", daemon=True)
        self._thread.start()

    def answer(self, kind: Kind, number: int, body: bytes) -> None:
        """Send an answer after those before it."""
        self._queue.put(_Answer(kind, number, body))

    def add(self, batch: Batch, item: SignItem, result: bytes | TokenError) -> None:
        """Verify one result of a batch."""
        self._queue.put(_Raw(batch, item, result))

    def end(self, batch: Batch) -> None:
        """Send the batch once its results are verified."""
        self._queue.put(batch)

    def close(self) -> None:
        """Send what is left and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while (task := self._queue.get()) is not None:
                if isinstance(task, _Raw):
                    task.batch.results.append(self._verified(task.item, task.result))
                elif isinstance(task, Batch):
                    self._send(Kind.OK, task.number, encode_results(task.results))
                else:
                    self._send(task.kind, task.number, task.body)
        except OSError:
            # The host has gone; the main thread learns it from the same socket.
            return

    def _verified(self, item: SignItem, result: bytes | TokenError) -> bytes | TokenError:
        if isinstance(result, TokenError):
            return result
        try:
            public_key, key_type = self._keys.get(item.key.spki)
            signature = signature_of(key_type, result)
            verify_digest(public_key, item.digest, signature, item.options)
        except SpireHwError as e:
            return TokenError(e.message, reason="hsm.bad_signature", operation="sign")
        return signature
