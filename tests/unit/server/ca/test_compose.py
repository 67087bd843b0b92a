"""Subjects in words and in DER, and what composers may not do."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import (
    EncodingError,
    ErrorKind,
    InvalidInputError,
    PluginError,
    UnavailableError,
)
from spire_hw.plugin.credentialcomposer import CredentialComposer, DistinguishedName
from spire_hw.spiffeid import SpiffeId
from spire_hw.svid.jwtsvid import build_claims
from spire_hw.x509 import der
from spire_hw.x509.extension import Extension
from spire_hw.x509.name import CA_SUBJECT, decode_name, encode_name
from spire_hw_server.ca.compose import Composers, read_subject, write_subject

if TYPE_CHECKING:
    from collections.abc import Callable

WEB = SpiffeId.parse("spiffe://example.org/web")
NOW = datetime(2026, 11, 1, tzinfo=UTC)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40)


class Scripted(CredentialComposer):
    def __init__(self, amend: Callable[[Any], Any]) -> None:
        self._amend = amend

    async def compose_server_x509_ca(self, attributes: Any) -> Any:
        return self._amend(attributes)

    async def compose_workload_jwt_svid(self, spiffe_id: SpiffeId, attributes: Any) -> Any:
        return self._amend(attributes)


def claims() -> dict[str, Any]:
    return build_claims(
        spiffe_id=WEB, audience=["a", "b"], issued_at=NOW, expires_at=NOW + timedelta(minutes=5)
    )


@given(st.lists(st.tuples(st.sampled_from(["2.5.4.3", "2.5.4.10", "1.2.840.113549.1.9.1"]), WORDS)))
def test_names_survive_both_ways(attributes: list[tuple[str, str]]) -> None:
    name = encode_name(attributes)
    assert decode_name(name) == attributes
    assert decode_name(write_subject(read_subject(name))) is not None


@given(
    st.lists(st.integers(0, 2**40), min_size=1, max_size=8), st.integers(0, 2), st.integers(0, 39)
)
def test_object_identifiers_survive_both_ways(rest: list[int], first: int, second: int) -> None:
    dotted = ".".join(map(str, (first, second, *rest)))
    reader = der.Reader(der.oid(dotted), "oid")
    assert der.dotted(reader.content(der.OBJECT_IDENTIFIER)) == dotted


@pytest.mark.parametrize("content", [b"", b"\x80\x01", b"\x2a\x86", b"\x55\x80\x01"])
def test_object_identifiers_that_are_none(content: bytes) -> None:
    with pytest.raises(EncodingError):
        der.dotted(content)


def test_a_subject_in_words_is_what_the_library_reads() -> None:
    text = "CN=web,2.5.4.5=7,OU=b,OU=a,O=SPIRE,L=Oslo,C=NO,1.2.840.113549.1.9.1=x@example.org"
    given_name = x509.Name.from_rfc4514_string(text)
    found = read_subject(given_name.public_bytes())
    assert found == DistinguishedName(
        country=("NO",),
        organization=("SPIRE",),
        organizational_unit=("a", "b"),
        locality=("Oslo",),
        serial_number="7",
        common_name="web",
        extra_names=(("1.2.840.113549.1.9.1", "x@example.org"),),
    )
    assert read_subject(write_subject(found)) == found


@pytest.mark.asyncio
async def test_composers_run_in_order_and_none_keeps_things_as_they_are() -> None:
    def unit(name: str) -> Scripted:
        def amend(attributes: Any) -> Any:
            units = (*attributes.subject.organizational_unit, name)
            return replace(
                attributes, subject=replace(attributes.subject, organizational_unit=units)
            )

        return Scripted(amend)

    silent = Scripted(lambda _: None)
    both = Composers([("a", unit("a")), ("s", silent), ("b", unit("b"))])
    made = await both.ca(CA_SUBJECT)
    assert read_subject(made.subject).organizational_unit == ("a", "b")
    assert (await Composers([("s", silent)]).ca(CA_SUBJECT)).subject is CA_SUBJECT
    assert not Composers()


@pytest.mark.asyncio
async def test_policies_become_an_extension() -> None:
    one = Scripted(lambda a: replace(a, policy_identifiers=("1.3.6.1.4.1.99999.2",)))
    (extension,) = (await Composers([("p", one)]).ca(CA_SUBJECT)).extensions
    assert extension.oid == "2.5.29.32"
    assert extension.value == bytes.fromhex("300d300b06092b06010401868d1f02")


@pytest.mark.asyncio
@pytest.mark.parametrize("oid", ["2.5.29.17", "2.5.29.19", "2.5.29.15"])
async def test_no_extension_of_ours_is_given_twice(oid: str) -> None:
    one = Scripted(lambda a: replace(a, extra_extensions=(Extension(oid, b"\x05\x00"),)))
    with pytest.raises(InvalidInputError, match="one that the server writes"):
        await Composers([("x", one)]).ca(CA_SUBJECT)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sub", "spiffe://example.org/other"),
        ("aud", ["c"]),
        ("iat", 5),
        ("exp", int(NOW.timestamp()) + 301),
        ("exp", int(NOW.timestamp())),
        ("exp", "soon"),
        ("exp", None),
    ],
)
async def test_claims_that_are_not_theirs(name: str, value: object) -> None:
    one = Scripted(lambda a: replace(a, claims={**a.claims, name: value}))
    with pytest.raises(InvalidInputError, match=name):
        await Composers([("x", one)]).jwt_svid(WEB, claims())


@pytest.mark.asyncio
async def test_a_shorter_life_and_more_claims_are_theirs() -> None:
    end = int(NOW.timestamp()) + 60
    one = Scripted(lambda a: replace(a, claims={**a.claims, "exp": end, "tier": "gold"}))
    made = await Composers([("x", one)]).jwt_svid(WEB, claims())
    assert (made["exp"], made["tier"], made["sub"]) == (end, "gold", str(WEB))


@pytest.mark.asyncio
async def test_a_composer_that_fails_is_named() -> None:
    def fail(_: Any) -> Any:
        raise UnavailableError("away")

    with pytest.raises(PluginError, match=r"^credentialcomposer\(muse\): away$") as caught:
        await Composers([("muse", Scripted(fail))]).ca(CA_SUBJECT)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
