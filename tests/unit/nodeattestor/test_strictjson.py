import pytest

from spire_hw.errors import LimitError
from spire_hw_plugins.nodeattestor import strictjson


def test_bytes_are_sent_in_base64() -> None:
    message = {"a": b"\xff\0", "b": [b"", b"xyz"], "c": {"d": None, "e": 1, "f": "\u00e9"}}
    assert strictjson.dump(message) == (
        b'{"a":"/wA=","b":["","eHl6"],"c":{"d":null,"e":1,"f":"\\u00e9"}}'
    )


def test_what_was_sent_is_read() -> None:
    read = strictjson.load(strictjson.dump({"a": bytes(range(256)), "b": b""}), 4096)
    assert read.blob("a") == bytes(range(256))
    assert read.blob("b", empty=True) == b""


@pytest.mark.parametrize("value", [object(), {1, 2}, bytearray(b"x")])
def test_other_things_have_no_form(value: object) -> None:
    with pytest.raises(TypeError, match="has no form in JSON"):
        strictjson.dump({"a": value})


def test_more_values_than_any_message_has_are_not_read() -> None:
    text = '{"a":[' + "1," * 16_385 + "1]}"
    with pytest.raises(LimitError, match="envelope: more than 16384 values"):
        strictjson.load(text.encode(), 1 << 20)
    assert strictjson.load(text.replace("1,", "", 2).encode(), 1 << 20).has("a")
