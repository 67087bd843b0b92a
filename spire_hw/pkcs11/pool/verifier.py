"""The verifying process: does what a token signed hold? Knows neither token nor PIN.

A busy token's signatures are verified here, beside its host, whose loop they would hold up, and
apart from the process that holds the token's library and could say anything.
"""

from __future__ import annotations

from functools import partial

from spire_hw.errors import EncodingError, InvalidInputError
from spire_hw.pkcs11 import channel
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.known import KnownKeys, verified
from spire_hw.pkcs11.wire import Kind, decode_verify, encode_json, encode_results


def verified_body(keys: KnownKeys, body: bytes) -> bytes:
    """Return the body of the answer to a VERIFY frame.

    Raises:
        EncodingError: it does not decode.
        InvalidInputError: a key is none of ours.
    """
    return encode_results(verified(keys, *decode_verify(body)))


def _answer(keys: KnownKeys, kind: Kind, body: bytes) -> tuple[Kind, bytes]:
    message = f"{kind.name} is no request"
    if kind is Kind.VERIFY:
        try:
            return Kind.OK, verified_body(keys, body)
        except (EncodingError, InvalidInputError) as e:
            message = e.message
    odd = TokenError(message, reason="hsm.odd", operation="verify")
    return Kind.FAILED, encode_json(dict(odd.to_dict()))


def main() -> None:
    """Run the verifier."""
    channel.run(partial(_answer, KnownKeys()))


if __name__ == "__main__":
    main()
