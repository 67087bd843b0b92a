"""The worker process: one token, one operation at a time, told what to do over its standard input.

Started as `python -P -m spire_hw.pkcs11.worker <parent pid>`. It is kept apart from its host so
that a vendor library that crashes or hangs takes nothing else with it, and it never outlives the
host: the kernel kills it when the host dies. Other users cannot attach to it and it leaves no core.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, ErrorKind, InvalidInputError
from spire_hw.pkcs11.checker import Checker, groups
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.keys import check_request, sign_scheme
from spire_hw.pkcs11.known import KnownKeys, Refused, Signed
from spire_hw.pkcs11.profile import PROFILES, ProfileChoice
from spire_hw.pkcs11.wire import (
    HEADER,
    Kind,
    SignRun,
    decode_header,
    decode_items,
    decode_json,
    encode_frame,
    encode_json,
    unpack_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4


def harden(parent: int) -> None:
    """Tie this process to its parent and close it to debuggers.

    Raises:
        SystemExit: the parent is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            raise SystemExit(f"prctl {option} failed: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        raise SystemExit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Channel:
    """The worker's end of the socket pair."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def receive(self) -> tuple[Kind, int, bytes] | None:
        """Return the next request, None when the host has gone."""
        header = self._exactly(HEADER.size)
        if header is None:
            return None
        length, kind, number = decode_header(header)
        body = self._exactly(length)
        return None if body is None else (kind, number, body)

    def _exactly(self, length: int) -> bytes | None:
        if length == 0:
            return b""
        piece = self._link.recv(length, socket.MSG_WAITALL)
        if len(piece) == length or not piece:
            return piece or None
        rest = self._exactly(length - len(piece))
        return None if rest is None else piece + rest

    def send(self, kind: Kind, number: int, body: bytes) -> None:
        """Answer a request."""
        self._link.sendall(encode_frame(kind, number, body))


class Service:
    """Answers requests; the first one has to be OPEN."""

    def __init__(self) -> None:
        self._token: Any = None
        self._objects: Any = None
        self._profile = PROFILES["generic"]
        self._keys = KnownKeys()

    def answer(self, kind: Kind, body: bytes) -> bytes:
        """Do what is asked and return the body of the answer.

        Raises:
            TokenError: it could not be done.
        """
        if kind is Kind.OPEN:
            return encode_json(self._open(decode_json(body)))
        if self._objects is None:
            raise TokenError("no token is open", reason="hsm.not_open", operation=kind.name.lower())
        return encode_json(self._control(kind, decode_json(body)))

    def sign(self, run: SignRun) -> Iterator[Signed | Refused]:
        """Have the token sign one run; nothing of it is verified yet."""
        if self._objects is None:
            not_open = TokenError("no token is open", reason="hsm.not_open", operation="sign")
            yield Refused(not_open, len(run.digests))
            return
        try:
            key = self._keys.get(run.key.spki)
            for digest in run.digests:
                check_request(key.key_type, digest, run.options)
        except InvalidInputError as e:
            odd = TokenError(e.message, reason="hsm.odd", operation="sign", kind=e.kind)
            yield Refused(odd, len(run.digests))
            return
        scheme = sign_scheme(key.key_type, run.options)
        raws = self._objects.sign(run.key.cka_id, scheme, run.digests)
        yield from groups(key, run.options, run.digests, raws)

    def _control(self, kind: Kind, fields: dict[str, Any]) -> dict[str, Any]:
        objects = self._objects
        if kind is Kind.LIST:
            listing: dict[str, Any] = objects.listing(str(fields["prefix"]))
            return listing
        if kind is Kind.GENERATE:
            key_type = dict(fields["type"])
            if "ec_params" in key_type:
                key_type["ec_params"] = unpack_bytes(key_type["ec_params"])
            made: dict[str, Any] = objects.generate(
                key_type, unpack_bytes(fields["id"]), str(fields["label"])
            )
            return made
        if kind is Kind.DESTROY:
            return {"gone": objects.destroy(unpack_bytes(fields["id"]), str(fields["label"]))}
        if kind is Kind.PUT_DATA:
            objects.put_data(
                str(fields["label"]), str(fields["application"]), unpack_bytes(fields["value"])
            )
            return {}
        if kind is Kind.PING:
            self._token.check_logged_in()
            if self._profile.keepalive:
                self._token.touch()
            return {}
        raise EncodingError("worker frame", f"{kind.name} is no request")

    def _open(self, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            from spire_hw.pkcs11.objects import TokenObjects  # noqa: PLC0415 - its absence is answered in words
            from spire_hw.pkcs11.token import TokenChoice, TokenSession, serial_of  # noqa: PLC0415 - its absence is answered in words
        except ImportError as e:
            raise TokenError(
                f"python-pkcs11 cannot be loaded ({e.name or 'shared library'}); "
                "install it with: pip install python-pkcs11",
                reason="hsm.library",
                operation="load library",
                cure=Cure.OPERATOR,
                kind=ErrorKind.FAILED_PRECONDITION,
            ) from e
        choice = TokenChoice(
            module=str(fields["module"]),
            label=fields["label"],
            serial=fields["serial"],
            uri_attributes=dict(fields["uri"]),
            slot_id=fields["slot_id"],
        )
        wanted = ProfileChoice.from_dict(fields["profile"])
        try:
            token = TokenSession(choice)
            profile = wanted.resolve(token.words())
            mechanisms = token.mechanisms()
            token.log_in(fields.pop("pin"), read_write_only=profile.read_write_only)
        except TokenError:
            raise
        except Exception as e:
            raise TokenError.of(e, "open token") from e
        self._token = token
        self._profile = profile
        self._objects = TokenObjects(token, profile)
        return {
            "label": token.token.label,
            "serial": serial_of(token.token),
            "model": token.token.model,
            "can_write": token.can_write,
            "mechanisms": mechanisms,
            "profile": profile.name,
        }


def serve(channel: Channel, service: Service) -> None:
    """Answer requests until the host goes or a request does not decode."""
    checker = Checker(channel.send)
    try:
        while (request := channel.receive()) is not None:
            kind, number, body = request
            if kind is Kind.SIGN:
                for run in decode_items(body):
                    for some in service.sign(run):
                        checker.check(some)
                checker.answer_signed(number)
            else:
                checker.answer(*_answer(service, kind, number, body))
    finally:
        checker.close()


def _answer(service: Service, kind: Kind, number: int, body: bytes) -> tuple[Kind, int, bytes]:
    try:
        return Kind.OK, number, service.answer(kind, body)
    except TokenError as e:
        return Kind.FAILED, number, encode_json(dict(e.to_dict()))
    except (EncodingError, KeyError, TypeError, ValueError):
        # An odd token or a host that talks nonsense: answered, so that the host can decide.
        failure = TokenError(
            f"{kind.name.lower()} met something it does not understand",
            reason="hsm.odd",
            operation=kind.name.lower(),
        )
        return Kind.FAILED, number, encode_json(dict(failure.to_dict()))


def main() -> None:
    """Run the worker; standard input is its end of the socket pair."""
    harden(int(sys.argv[1]))
    with socket.socket(fileno=os.dup(0)) as link:
        try:
            serve(Channel(link), Service())
        except (ConnectionError, EncodingError):
            return


if __name__ == "__main__":
    main()
