from __future__ import annotations

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.pkcs11.uri import parse


def test_reads_token_serial_module_and_pin_source() -> None:
    uri = parse(
        "pkcs11:token=My%20token;serial=00ff;slot-id=7;id=%01%FF"
        "?pin-source=file:/etc/spire-hw/pin&module-path=/usr/lib/p11.so&x-other=1"
    )
    assert (uri.token, uri.serial, uri.slot_id, uri.id) == ("My token", "00ff", 7, b"\x01\xff")
    assert uri.pin_file == "/etc/spire-hw/pin"
    assert uri.module_path == "/usr/lib/p11.so"
    assert uri.ignored == ("x-other",)


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("/etc/pin", "/etc/pin"),
        ("file:/etc/pin", "/etc/pin"),
        ("file:///etc/pin", "/etc/pin"),
        ("file://localhost/etc/pin", "/etc/pin"),
    ],
)
def test_pin_source_may_be_a_path_or_a_file_uri(source: str, path: str) -> None:
    assert parse(f"pkcs11:token=a?pin-source={source}").pin_file == path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("pkcs:token=a", "pkcs11:"),
        ("pkcs11:token=a;token=b", "token is given twice"),
        ("pkcs11:tokn=a", "tokn is unknown"),
        ("pkcs11:x-vendor=a", "x-vendor is unknown"),
        ("pkcs11:token=a;max-sessions=1", "max-sessions is unknown"),
        ("pkcs11:token", "name=value"),
        ("pkcs11:token=%4", "token"),
        ("pkcs11:token=%zz", "token"),
        ("pkcs11:token=%ff", "not UTF-8"),
        ("pkcs11:token=a%00", "NUL"),
        ("pkcs11:token=a\n", "token"),
        ("pkcs11:token=a/b", "token"),
        ("pkcs11:id=7331", "percent-encoded"),
        ("pkcs11:id=", "percent-encoded"),
        ("pkcs11:type=key", "type"),
        ("pkcs11:slot-id=0x1", "slot-id"),
        ("pkcs11:token=a?pin-value=1234", "pin-value"),
        ("pkcs11:token=a?pin-value=1234&pin-source=/x", "both"),
        ("pkcs11:token=a?pin-source=|cat%20/etc/pin", "command"),
        ("pkcs11:token=a?pin-source=%7Ccat", "command"),
        ("pkcs11:token=a?pin-source=pin", "absolute"),
        ("pkcs11:token=a?pin-source=file://host/pin", "absolute"),
        ("pkcs11:token=a?module-path=p11.so", "module-path"),
        ("pkcs11:token=a?module-name=/x/p11", "module-name"),
        ("pkcs11:token=" + "a" * 5000, "too long"),
    ],
)
def test_fault_8_names_the_attribute_and_shows_no_value(text: str, names: str) -> None:
    with pytest.raises(InvalidInputError, match=names.replace("|", r"\|")) as caught:
        parse(text)
    assert "1234" not in str(caught.value)
