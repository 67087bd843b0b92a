"""The worker process: one token, one operation at a time, told what to do over its standard input.

It is kept apart from its host so that a vendor library that crashes or hangs takes nothing else with
it. It has one thread, and what the token signed is verified elsewhere.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import Any

from spire_hw.errors import EncodingError, ErrorKind, InvalidInputError
from spire_hw.pkcs11 import channel
from spire_hw.pkcs11.errors import Cure, TokenError
from spire_hw.pkcs11.keys import check_request, sign_scheme
from spire_hw.pkcs11.known import KnownKeys
from spire_hw.pkcs11.profile import PROFILES, USER, Profile, ProfileChoice
from spire_hw.pkcs11.wire import (
    Kind,
    SignRun,
    decode_items,
    decode_json,
    encode_json,
    encode_results,
    unpack_bytes,
)


class Service:
    """Answers requests; the first ones have to be OPEN and LOGIN."""

    def __init__(self) -> None:
        self._token: Any = None
        self._objects: Any = None
        self._strokes: Any = None
        self._profile = PROFILES["generic"]
        self._crypto_user: int | None = None
        self._keys = KnownKeys()

    def answer(self, kind: Kind, body: bytes) -> bytes:
        """Do what is asked and return the body of the answer.

        Raises:
            TokenError: it could not be done.
        """
        if kind is Kind.OPEN:
            return encode_json(self._open(decode_json(body)))
        if kind is Kind.LOGIN:
            return encode_json(self._log_in(decode_json(body)))
        if self._objects is None:
            raise TokenError("no token is open", reason="hsm.not_open", operation=kind.name.lower())
        if kind is Kind.SIGN:
            runs = decode_items(body)
            return encode_results(list(chain.from_iterable(map(self._sign, runs))))
        return encode_json(self._control(kind, decode_json(body)))

    def _sign(self, run: SignRun) -> list[bytes | TokenError]:
        """Have the token sign one run; nothing of it is verified yet."""
        try:
            key = self._keys.get(run.key.spki)
            for digest in run.digests[:1]:
                check_request(key.key_type, digest, run.options)  # all are of one length
        except InvalidInputError as e:
            odd = TokenError(e.message, reason="hsm.odd", operation="sign", kind=e.kind)
            return [odd] * len(run.digests)
        scheme = sign_scheme(key.key_type, run.options)
        raws: list[bytes | TokenError] = self._strokes.sign(run.key.cka_id, scheme, run.digests)
        return raws

    def _control(self, kind: Kind, fields: dict[str, Any]) -> dict[str, Any]:
        objects = self._objects
        if kind is Kind.LIST:
            listing: dict[str, Any] = objects.listing(
                str(fields["prefix"]), data_only=fields.get("data_only") is True
            )
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
            cka_id, label = unpack_bytes(fields["id"]), str(fields["label"])
            # Key pairs have an id; data objects have none.
            gone = objects.destroy(cka_id, label) if cka_id else objects.destroy_data(label)
            return {"gone": gone}
        if kind is Kind.PUT_DATA:
            objects.put_data(
                str(fields["label"]), str(fields["application"]), unpack_bytes(fields["value"])
            )
            return {}
        if kind is Kind.PING:
            self._token.check_logged_in()
            if self._profile.keepalive:
                self._token.touch()
            return {"reopened": self._token.take_reopened()}
        raise EncodingError("worker frame", f"{kind.name} is no request")

    def _open(self, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            from spire_hw.pkcs11.device.slots import TokenChoice  # noqa: PLC0415 - its absence is answered in words
            from spire_hw.pkcs11.device.token import TokenSession  # noqa: PLC0415 - likewise
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
            self._profile = wanted.resolve(token.words())
        except TokenError:
            raise
        except Exception as e:
            raise TokenError.of(e, "open token") from e
        name = token.name
        if fields["login_as"] != USER:
            self._crypto_user = _crypto_user(self._profile)
            # Another PIN than the user's: what is known of the one says nothing of the other.
            name += f"\0{fields['login_as']}"
        self._token = token
        return {"token": name}

    def _log_in(self, fields: dict[str, Any]) -> dict[str, Any]:
        from spire_hw.pkcs11.device.objects import TokenObjects  # noqa: PLC0415 - after `_open` has found the library
        from spire_hw.pkcs11.device.slots import serial_of  # noqa: PLC0415 - likewise
        from spire_hw.pkcs11.device.strokes import Strokes  # noqa: PLC0415 - likewise

        token, profile = self._token, self._profile
        if token is None:
            raise TokenError("no token is open", reason="hsm.not_open", operation="login")
        try:
            mechanisms, longest = token.mechanisms()
            token.log_in(
                fields.pop("pin"),
                read_write_only=profile.read_write_only,
                crypto_user=self._crypto_user,
            )
        except TokenError:
            raise
        except Exception as e:
            raise TokenError.of(e, "open token") from e
        self._objects = TokenObjects(token, profile)
        self._strokes = Strokes(token)
        return {
            "label": token.token.label,
            "serial": serial_of(token.token),
            "model": token.token.model,
            "can_write": token.can_write,
            "pin_count_low": token.is_pin_count_low,
            "mechanisms": mechanisms,
            "longest": sorted(longest.items()),
            "profile": profile.name,
        }


def _crypto_user(profile: Profile) -> int:
    if profile.crypto_user is None:
        raise TokenError(
            f"token (profile {profile.name}) knows no crypto-user; leave login_as out, or set profile",
            reason="hsm.no_crypto_user",
            operation="login",
            cure=Cure.OPERATOR,
            kind=ErrorKind.FAILED_PRECONDITION,
        )
    return profile.crypto_user


def _answer(service: Service, kind: Kind, body: bytes) -> tuple[Kind, bytes]:
    try:
        return Kind.OK, service.answer(kind, body)
    except TokenError as e:
        return Kind.FAILED, encode_json(dict(e.to_dict()))
    except (EncodingError, KeyError, TypeError, ValueError):
        # An odd token or a host that talks nonsense: answered, so that the host can decide.
        failure = TokenError(
            f"{kind.name.lower()} met something it does not understand",
            reason="hsm.odd",
            operation=kind.name.lower(),
        )
        return Kind.FAILED, encode_json(dict(failure.to_dict()))


def main() -> None:
    """Run the worker."""
    channel.run(partial(_answer, Service()))


if __name__ == "__main__":
    main()
