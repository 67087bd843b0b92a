from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.bundle.bundle import Bundle, JwtAuthority
from spire_hw.errors import ErrorKind, InvalidInputError, SvidError
from spire_hw.jose.jws import sign_compact
from spire_hw.key import PrivateKey, SoftwareSigner, spki_der
from spire_hw.spiffeid import TrustDomain
from spire_hw.svid.jwtsvid import JwtSvid, issue_jwt_svid, parse_issued_jwt_svid, verify_jwt_svid

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
DOMAIN, FOREIGN = TrustDomain("example.org"), TrustDomain("example.com")
ID = DOMAIN.member("workload")
KEY = ec.generate_private_key(ec.SECP256R1())
SIGNER = SoftwareSigner(KEY)


def _bundle(domain: TrustDomain, key: PrivateKey = KEY, kid: str = "k") -> Bundle:
    return Bundle(domain, jwt_authorities=(JwtAuthority(kid, spki_der(key.public_key())),))


BUNDLES = {DOMAIN: _bundle(DOMAIN)}
CLAIMS: dict[str, Any] = {
    "sub": str(ID),
    "aud": ["a"],
    "exp": int(NOW.timestamp()) + 300,
    "iat": int(NOW.timestamp()),
}


def _verify(token: str, *, audience: str = "a", at: datetime = NOW, **options: Any) -> JwtSvid:
    return verify_jwt_svid(
        token, audience=audience, at=at, bundles=options.pop("bundles", BUNDLES), **options
    )


async def _issue(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "spiffe_id": ID,
        "audience": ["a", "b"],
        "issued_at": NOW,
        "expires_at": NOW + timedelta(minutes=5),
    }
    return await issue_jwt_svid(SIGNER, "k", **(arguments | changes))


async def _sign(claims: Any) -> str:
    payload = claims if isinstance(claims, bytes) else json.dumps(claims).encode()
    return await sign_compact(payload, SIGNER, "k")


def _claims(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims


@pytest.mark.asyncio
async def test_what_is_issued_verifies() -> None:
    svid = _verify(await _issue(), audience="b")
    assert svid.spiffe_id == ID
    assert svid.audience == ("a", "b")
    assert (svid.issued_at, svid.expires_at) == (NOW, NOW + timedelta(minutes=5))
    assert svid.claims == CLAIMS | {"aud": ["a", "b"]}


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 2048),
    ],
)
@pytest.mark.asyncio
async def test_other_keys_sign_too(key: PrivateKey) -> None:
    token = await issue_jwt_svid(
        SoftwareSigner(key),
        "k",
        spiffe_id=ID,
        audience=["a"],
        issued_at=NOW,
        expires_at=NOW + timedelta(minutes=5),
    )
    assert _verify(token, bundles={DOMAIN: _bundle(DOMAIN, key)}).spiffe_id == ID


@pytest.mark.asyncio
async def test_claims_of_an_issued_token() -> None:
    assert set(_claims(await _issue())) == {"sub", "aud", "exp", "iat"}
    assert _claims(await _issue(audience=["", "x", ""]))["aud"] == ["x"]
    full = _claims(await _issue(issuer="https://x", with_jti=True, extra_claims={"team": "pay"}))
    assert full["iss"] == "https://x"
    assert full["team"] == "pay"
    assert len(full["jti"]) == 22
    assert full["jti"] != _claims(await _issue(with_jti=True))["jti"]


@pytest.mark.parametrize(
    "changes",
    [
        {"audience": []},
        {"audience": [""]},
        {"spiffe_id": DOMAIN.id},
        {"expires_at": NOW},
        {"extra_claims": {"sub": "x"}},
        {"extra_claims": {"exp": 1}},
        {"extra_claims": {"x": float("nan")}},
        {"audience": ["x" * 20_000]},
    ],
)
@pytest.mark.asyncio
async def test_what_is_not_issued(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        await _issue(**changes)


@pytest.mark.asyncio
async def test_the_audience_matches_exactly() -> None:
    token = await _issue()
    for audience in ("A", "a ", "ab", "c"):
        with pytest.raises(SvidError):
            _verify(token, audience=audience)
    with pytest.raises(InvalidInputError):
        _verify(token, audience="")
    single = await _sign(CLAIMS | {"aud": "a"})
    assert _verify(single).audience == ("a",)


@pytest.mark.asyncio
async def test_time_with_leeway_of_a_minute_at_most() -> None:
    token = await _issue()
    end = NOW + timedelta(minutes=5)
    _verify(token, at=end + timedelta(seconds=59))
    for at, leeway in (
        (end + timedelta(seconds=60), timedelta(hours=1)),
        (end, timedelta(0)),
        (end + timedelta(seconds=30), timedelta(seconds=30)),
        (end, timedelta(seconds=-9)),
    ):
        with pytest.raises(SvidError, match="expired"):
            _verify(token, at=at, leeway=leeway)
    _verify(token, at=NOW - timedelta(seconds=60))
    with pytest.raises(SvidError, match="future"):
        _verify(token, at=NOW - timedelta(seconds=61))
    late = await _sign(CLAIMS | {"nbf": CLAIMS["iat"] + 100})
    _verify(late, at=NOW + timedelta(seconds=40))
    with pytest.raises(SvidError, match="not valid yet"):
        _verify(late, at=NOW + timedelta(seconds=39))


@pytest.mark.parametrize(
    "change",
    [
        {"exp": None},
        {"exp": "1"},
        {"exp": True},
        {"exp": [1]},
        {"exp": -1},
        {"exp": 10**18},
        {"exp": 10**300},
        {"iat": "x"},
        {"iat": None},
        {"nbf": "x"},
        {"nbf": {}},
        {"aud": None},
        {"aud": 1},
        {"aud": []},
        {"aud": ["a", 1]},
        {"aud": {"a": 1}},
        {"sub": None},
        {"sub": 1},
        {"sub": ""},
        {"sub": "spiffe://example.org"},
        {"sub": "spiffe://example.org/"},
        {"sub": "workload"},
        {"sub": ["spiffe://example.org/workload"]},
    ],
)
@pytest.mark.asyncio
async def test_malformed_claims_are_refused(change: dict[str, Any]) -> None:
    token = await _sign(CLAIMS | change)
    with pytest.raises(SvidError) as caught:
        _verify(token)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["sub", "aud", "exp"])
@pytest.mark.asyncio
async def test_missing_claims_are_refused(name: str) -> None:
    token = await _sign({k: v for k, v in CLAIMS.items() if k != name})
    with pytest.raises(SvidError):
        _verify(token)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"sub":"spiffe://example.org/a","sub":"spiffe://example.org/b"}',
        b'{"exp":NaN}',
        b'{"exp":1e999}',
    ],
)
@pytest.mark.asyncio
async def test_payloads_are_strict_json_objects(payload: bytes) -> None:
    token = await _sign(payload)
    with pytest.raises(SvidError):
        _verify(token)


@pytest.mark.asyncio
async def test_iat_may_be_missing() -> None:
    token = await _sign({k: v for k, v in CLAIMS.items() if k != "iat"})
    assert _verify(token).issued_at is None


@pytest.mark.asyncio
async def test_the_key_is_that_of_the_subjects_own_trust_domain() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    token = await _issue()
    for bundles in (
        {},
        {FOREIGN: _bundle(FOREIGN)},
        {DOMAIN: Bundle(DOMAIN)},
        {DOMAIN: _bundle(DOMAIN, kid="other")},
        {DOMAIN: _bundle(DOMAIN, other)},
        {DOMAIN: Bundle(DOMAIN, jwt_authorities=(JwtAuthority("k", b"junk"),))},
    ):
        with pytest.raises(SvidError):
            _verify(token, bundles=bundles)


@pytest.mark.asyncio
async def test_neither_errors_nor_repr_show_the_token() -> None:
    token = await _issue()
    with pytest.raises(SvidError) as caught:
        _verify(token[:-8] + "AAAAAAAA")
    assert token[:20] not in str(caught.value)
    assert token.split(".")[2] not in repr(_verify(token))


@pytest.mark.asyncio
async def test_an_issued_token_is_read_without_a_bundle() -> None:
    svid = parse_issued_jwt_svid(await _issue())
    assert (svid.spiffe_id, svid.expires_at) == (ID, NOW + timedelta(minutes=5))
    with pytest.raises(SvidError):
        parse_issued_jwt_svid("x.y.z")
