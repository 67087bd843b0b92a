"""What composers amend survives the wire, and what the wire brings never breaks the reader."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from spire_hw._pb import plugin_server_credentialcomposer_pb2 as pb
from spire_hw.errors import InvalidInputError
from spire_hw.goplugin.facade import attributes
from spire_hw.plugin.credentialcomposer import (
    DistinguishedName,
    JwtSvidAttributes,
    X509CaAttributes,
    X509SvidAttributes,
)
from spire_hw.x509.extension import WRITTEN, Extension

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
TEXTS = st.lists(TEXT, max_size=3).map(tuple)
OIDS = st.lists(st.integers(0, 10**17), min_size=1, max_size=6).map(
    lambda arcs: ".".join(["1", *map(str, arcs)])
)
NAMES = st.builds(
    DistinguishedName,
    country=TEXTS,
    organization=TEXTS,
    organizational_unit=TEXTS,
    locality=TEXTS,
    province=TEXTS,
    street_address=TEXTS,
    postal_code=TEXTS,
    serial_number=TEXT,
    common_name=TEXT,
    extra_names=st.lists(st.tuples(OIDS, TEXT), max_size=3).map(tuple),
)
EXTENSIONS = st.lists(
    st.builds(
        Extension, OIDS.filter(lambda o: o not in WRITTEN), st.binary(max_size=9), st.booleans()
    ),
    max_size=3,
    unique_by=lambda e: e.oid,
).map(tuple)
DNS_NAMES = st.lists(
    st.from_regex(r"[a-z]{1,9}(\.[a-z]{1,9}){0,2}", fullmatch=True), unique=True
).map(tuple)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda f: not f.is_integer())
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)


@given(NAMES, st.lists(OIDS, max_size=3).map(tuple), EXTENSIONS)
def test_ca_attributes_survive(
    subject: DistinguishedName, policies: tuple[str, ...], extensions: tuple[Extension, ...]
) -> None:
    given_ = X509CaAttributes(subject, policies, extensions)
    message = pb.X509CAAttributes()
    attributes.write_ca(given_, message)
    assert attributes.read_ca(pb.X509CAAttributes.FromString(message.SerializeToString())) == given_


@given(NAMES, DNS_NAMES, EXTENSIONS)
def test_svid_attributes_survive(
    subject: DistinguishedName, names: tuple[str, ...], extensions: tuple[Extension, ...]
) -> None:
    given_ = X509SvidAttributes(subject, names, extensions)
    message = pb.X509SVIDAttributes()
    attributes.write_svid(given_, message)
    assert attributes.read_svid(message) == given_


@given(st.dictionaries(TEXT, VALUES, max_size=6))
def test_claims_survive(claims: dict[str, Any]) -> None:
    message = pb.JWTSVIDAttributes()
    attributes.write_jwt(JwtSvidAttributes(claims), message)
    assert attributes.read_jwt(message).claims == claims


@given(st.binary(max_size=200))
def test_reading_is_total(data: bytes) -> None:
    for kind, read in (
        (pb.X509CAAttributes, attributes.read_ca),
        (pb.X509SVIDAttributes, attributes.read_svid),
        (pb.JWTSVIDAttributes, attributes.read_jwt),
    ):
        try:
            read(kind.FromString(data))  # type: ignore[operator]
        except (DecodeError, InvalidInputError):
            continue
