from __future__ import annotations

import pytest

from spire_hw.errors import EncodingError
from spire_hw.jose.text import (
    decode_base64,
    decode_base64url,
    encode_base64url,
    encode_json,
    parse_json_object,
)


def test_base64url_round_trip() -> None:
    for size in range(8):
        data = bytes(range(250, 250 + size % 6)) + b"\xff" * size
        assert decode_base64url(encode_base64url(data), "x") == data


@pytest.mark.parametrize("text", ["QQ==", "QR", "Q", "a+b/", "QQ\n", " QQ", "QÅ", "QQ.", "QUJDRA="])
def test_base64url_has_one_form_only(text: str) -> None:
    with pytest.raises(EncodingError):
        decode_base64url(text, "x")


@pytest.mark.parametrize("text", ["QQ", "QR==", "Q===", "a-b_", "QQ==\n", "Q Q=", "QÅ=="])
def test_base64_has_one_form_only(text: str) -> None:
    with pytest.raises(EncodingError):
        decode_base64(text, "x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b"null",
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"a":1}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 401 + b"}",
        b'{"a":"\\ud800"}',
        b'{"\\udc00":1}',
        b'{"a":"\xff"}',
        b'\xef\xbb\xbf{"a":1}',
        b'{"a":1}x',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":' + b"[" * 40 + b"]" * 40 + b"}",
        b'{"a":' + b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        '{"a":1}'.encode("utf-16"),
    ],
)
def test_json_without_surprises(data: bytes) -> None:
    with pytest.raises(EncodingError):
        parse_json_object(data, "x")


def test_json_objects_are_read() -> None:
    data = '{"a":[1,2.5,"é","\\ud83d\\ude00",{"b":null}],"c":true}'.encode()
    assert parse_json_object(data, "x") == {"a": [1, 2.5, "é", "😀", {"b": None}], "c": True}


@pytest.mark.parametrize("value", [float("nan"), {1: b""}, object(), {"a": float("inf")}])
def test_what_json_cannot_say_is_an_error(value: object) -> None:
    with pytest.raises(EncodingError):
        encode_json(value)


def test_json_that_holds_itself_is_an_error() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(EncodingError):
        encode_json(loop)
