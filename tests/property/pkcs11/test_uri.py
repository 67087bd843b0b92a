"""RFC 7512 URIs: what we write we read, and nothing else than InvalidInputError comes out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import InvalidInputError
from spire_hw.pkcs11.uri import Pkcs11Uri, encode, parse

_text = st.text(max_size=32).filter(lambda t: "\0" not in t and _is_utf8(t))
_names = st.sampled_from(["token", "serial", "model", "manufacturer", "object", "slot-description"])


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


_absolute = _text.map(lambda t: "/" + t.lstrip("/"))
_uris = st.builds(
    Pkcs11Uri,
    attributes=st.dictionaries(_names, _text, max_size=4),
    id=st.none() | st.binary(min_size=1, max_size=20),
    slot_id=st.none() | st.integers(min_value=0, max_value=2**63),
    type=st.none() | st.sampled_from(["private", "public", "cert", "secret-key", "data"]),
    pin_source=st.none() | _absolute,
    module_path=st.none() | _absolute,
    module_name=st.none() | _text.filter(lambda t: bool(t) and "/" not in t),
)


@given(_uris)
def test_what_is_encoded_parses_to_the_same(uri: Pkcs11Uri) -> None:
    assert parse(encode(uri)) == uri


@given(st.text(max_size=60) | st.text(alphabet="pkcs1:token=;&?%4id-/\n|", max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    for candidate in (text, "pkcs11:" + text, "pkcs11:token=a?" + text):
        try:
            uri = parse(candidate)
        except InvalidInputError:
            continue
        assert parse(encode(uri)) == Pkcs11Uri(
            uri.attributes,
            uri.id,
            uri.slot_id,
            uri.type,
            uri.pin_source,
            uri.module_path,
            uri.module_name,
        )
