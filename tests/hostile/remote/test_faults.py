"""Faults of a signer and of the way to it; numbers are those of the fault list."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.clock import SystemClock
from spire_hw.errors import DeniedError, ErrorKind, NotFoundError, NotReadyError, SpireHwError
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    SignOptions,
    generate_private_key,
    spki_der,
    verify_digest,
)
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw.transport.tls import TlsIdentity
from spire_hw_plugins.keymanager.remote.state import StateFile
from spire_hw_sim.liarsigner import SERVER_ID, LiarSigner, Shelf, write_client
from spire_hw_sim.pki import Authority, now
from spire_hw_sim.remoterig import RemoteRig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from spire_hw_plugins.keymanager.remote.manager import RemoteKeyManager

SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)
P256 = KeyType.EC_P256


@pytest_asyncio.fixture
async def rig(tmp_path: Path) -> AsyncIterator[RemoteRig]:
    async with RemoteRig(tmp_path) as made:
        yield made


async def signs(manager: RemoteKeyManager, key_id: str = "id") -> None:
    """Sign and verify with the key that is on note."""
    info = await manager.get_public_key(key_id)
    made = await manager.sign_data(key_id, DIGEST, SHA256)
    assert made.fingerprint == info.fingerprint
    verify_digest(info.public_key, DIGEST, made.signature, SHA256)


async def healed(manager: RemoteKeyManager) -> None:
    """Wait until the key manager is well."""
    async with asyncio.timeout(30):
        while manager.key_health().health is not KeyHealth.GOOD:  # noqa: ASYNC110 - no event of it
            await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_fault_88_signer_down_at_start_is_unavailable_never_empty(rig: RemoteRig) -> None:
    signer = await rig.signer()
    first = await rig.manager(signer.address)
    made = await first.generate_key("id", P256)
    await first.close()
    await signer.stop()
    late = rig.build()
    with pytest.raises(SpireHwError) as caught:
        await late.configure(rig.config(signer.address, start_timeout="500ms"))
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert signer.address in caught.value.message
    with pytest.raises(NotReadyError):
        await late.get_public_keys()
    async with asyncio.TaskGroup() as group:
        group.create_task(late.configure(rig.config(signer.address)))
        await asyncio.sleep(0)
        await signer.start()
    assert [k.fingerprint for k in await late.get_public_keys()] == [made.fingerprint]


@pytest.mark.asyncio
async def test_fault_88_signer_gone_later_fails_the_listing(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address, timeout="300ms")
    await manager.generate_key("id", P256)
    await signer.stop()
    for call in (manager.get_public_keys(), manager.sign_data("id", DIGEST, SHA256)):
        with pytest.raises(SpireHwError) as caught:
            await call
        assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert manager.key_health().health is KeyHealth.DOWN
    await signer.start()
    await healed(manager)
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_89_signer_restarts_in_mid_call_and_gets_the_same_request(
    rig: RemoteRig,
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    before = len(signer.request_ids)
    signer.lies.lost_signatures = 1
    await signs(manager)
    first, again = signer.request_ids[before:]
    assert first == again
    # Many at once: each is answered once, under the id it was asked with.
    signer.lies.lost_signatures = 1
    before = len(signer.request_ids)
    await asyncio.gather(*(signs(manager) for _ in range(40)))
    assert len(set(signer.request_ids[before:])) == 40


@pytest.mark.asyncio
async def test_fault_90_lost_answer_of_a_generation_is_asked_for_again(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    signer.lies.lost_generations = 1
    made = await manager.generate_key("id", P256)
    assert signer.shelf.generations == 1
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]


@pytest.mark.asyncio
@pytest.mark.parametrize("after", ["a while", "a restart"])
async def test_fault_90_asked_again_later_it_is_the_same_key(rig: RemoteRig, after: str) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address, generate_timeout="300ms")
    old = await manager.generate_key("id", P256)
    signer.dies_after_generation = True
    with pytest.raises(SpireHwError) as caught:
        await manager.generate_key("id", P256)
    assert caught.value.kind in {ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED}
    assert signer.shelf.generations == 2
    signer.dies_after_generation = False
    await signer.start()
    if after == "a restart":
        await manager.close()
        manager = await rig.manager(signer.address)
        (listed,) = await manager.get_public_keys()
        assert listed.fingerprint != old.fingerprint  # it was asked for: no change behind our back
    else:
        await healed(manager)
        made = await manager.sign_data("id", DIGEST, SHA256)
        assert made.fingerprint != old.fingerprint  # whoever holds the old key is told so
    new = await manager.generate_key("id", P256)
    assert new.fingerprint != old.fingerprint
    assert signer.shelf.generations == 2
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_91_wrong_authority_name_or_time_is_unauthenticated(rig: RemoteRig) -> None:
    signer = await rig.signer()
    stranger = Authority("infra.example")
    other_id = rig.authority.identity("spiffe://infra.example/other")
    expired = rig.authority.identity(
        "spiffe://infra.example/signer", start=now() - timedelta(hours=1), end=now()
    )
    wrong_ca = stranger.identity("spiffe://infra.example/signer")
    for identity, word in ((wrong_ca, "signer_ca"), (other_id, "other"), (expired, "expired")):
        signer.identity = identity
        manager = rig.build(word)
        with pytest.raises(SpireHwError) as caught:
            await manager.configure(rig.config(signer.address, start_timeout="1s"))
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED, word
        assert word in caught.value.message, caught.value.message
        await manager.close()
    assert signer.request_ids == []


def named(
    authority: Authority,
    *names: str,
    end: datetime | None = None,
    use: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
) -> TlsIdentity:
    """Return the identity of a signer whose CA makes no SPIFFE IDs."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(authority.name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - timedelta(hours=1))
        .not_valid_after(end or now() + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return TlsIdentity((made.public_bytes(serialization.Encoding.DER),), private_key=key)


@pytest.mark.asyncio
async def test_fault_91_a_signer_known_by_name(rig: RemoteRig) -> None:
    signer = await rig.signer()
    settings = {"signer_id": None, "signer_name": "signer.example"}
    signer.identity = named(rig.authority, "other.example", "Signer.Example")
    manager = await rig.manager(signer.address, **settings)
    await manager.generate_key("id", P256)
    await signs(manager)
    await manager.close()
    before = len(signer.request_ids)
    wrong = {
        "expected signer.example": named(rig.authority, "evil.example", "x.signer.example"),
        "unknown authority": named(Authority("infra.example"), "signer.example"),
        "expired": named(rig.authority, "signer.example", end=now()),
        "not for servers": named(
            rig.authority, "signer.example", use=ExtendedKeyUsageOID.CLIENT_AUTH
        ),
    }
    for word, identity in wrong.items():
        signer.identity = identity
        again = rig.build(word.replace(" ", "-"))
        with pytest.raises(SpireHwError) as caught:
            await again.configure(rig.config(signer.address, **settings, start_timeout="1s"))
        assert caught.value.kind is ErrorKind.UNAUTHENTICATED, word
        assert word in caught.value.message, caught.value.message
        await again.close()
    assert len(signer.request_ids) == before


@pytest.mark.asyncio
async def test_fault_92_expired_client_certificate_is_told_and_reloaded_without_a_restart(
    rig: RemoteRig,
) -> None:
    signer = await rig.signer()
    soon = now() + timedelta(seconds=2)
    rig.files = write_client(rig.authority, rig.folder / "client", end=soon)
    manager = await rig.manager(signer.address, timeout="500ms")
    await manager.generate_key("id", P256)
    await asyncio.sleep((soon - SystemClock().now()).total_seconds() + 1)
    await signer.stop()
    await signer.start()
    with pytest.raises(SpireHwError, match="our client certificate expired at") as caught:
        await manager.sign_data("id", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED
    assert str(rig.files.cert) in caught.value.message
    write_client(rig.authority, rig.folder / "client")
    await healed(manager)
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_92_half_written_files_leave_the_old_ones_in_use(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    rig.files.cert.write_text("-----BEGIN CERT")
    await asyncio.sleep(1.1)  # files are looked at once a second
    await signs(manager)
    write_client(rig.authority, rig.folder / "client", SERVER_ID + "-renewed")
    await asyncio.sleep(1.1)
    await signs(manager)
    assert signer.callers[-1] == SERVER_ID + "-renewed"


@pytest.mark.asyncio
@pytest.mark.parametrize("named", [False, True], ids=["signature", "fingerprint"])
async def test_fault_93_signature_of_another_key_is_refused_and_alarmed(
    rig: RemoteRig, capsys: pytest.CaptureFixture[str], *, named: bool
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    signer.lies.foreign_key, signer.lies.foreign_fingerprint = True, named
    with pytest.raises(SpireHwError, match="signer returned foreign key") as caught:
        await manager.sign_data("id", DIGEST, SHA256)
    assert caught.value.kind is ErrorKind.INTERNAL
    assert "signer.foreign_key" in "".join(capsys.readouterr())
    signer.lies.foreign_key = signer.lies.foreign_fingerprint = False
    await signs(manager)


@pytest.mark.asyncio
async def test_fault_94_unknown_keys_are_ignored_with_a_warning(
    rig: RemoteRig, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    made = await manager.generate_key("id", P256)
    signer.lies.extra = ["x509-CA-B"]
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]
    assert "never asked for" in "".join(capsys.readouterr())
    with pytest.raises(NotFoundError):
        await manager.sign_data("x509-CA-B", DIGEST, SHA256)


@pytest.mark.asyncio
async def test_fault_94_changed_key_needs_the_operator(
    rig: RemoteRig, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    await manager.generate_key("other", P256)
    signer.lies.swapped = {"id": generate_private_key(P256)}
    with pytest.raises(NotReadyError, match="changed key") as caught:
        await manager.get_public_keys()
    assert "accept_changed_keys" in caught.value.message
    assert "signer.key_changed" in "".join(capsys.readouterr())
    await signs(manager, "other")
    await manager.close()
    again = rig.build()
    with pytest.raises(NotReadyError, match="changed key"):
        await again.configure(rig.config(signer.address))
    await again.configure(rig.config(signer.address, accept_changed_keys=["id"]))
    signer.lies.swapped = {}
    with pytest.raises(NotReadyError, match="changed key"):
        await again.get_public_keys()


@pytest.mark.asyncio
async def test_a_configuration_that_is_replaced_takes_back_nothing_on_the_note(
    rig: RemoteRig,
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    changed = generate_private_key(P256)
    signer.lies.swapped = {"id": changed}
    await manager.configure(rig.config(signer.address, accept_changed_keys=["id"]))
    found = StateFile(rig.folder / "server", "example.org").load()
    assert found is not None
    assert found.keys == {"id": spki_der(changed.public_key())}


@pytest.mark.asyncio
async def test_fault_94_missing_key_is_unavailable(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("a", P256)
    await manager.generate_key("b", P256)
    signer.lies.hidden = {"a"}
    with pytest.raises(SpireHwError, match=r"2 keys are on note.*1 of them.*missing: a") as caught:
        await manager.get_public_keys()
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    signer.lies.hidden = {"a", "b"}
    again = rig.build()
    with pytest.raises(SpireHwError) as starting:
        await again.configure(rig.config(signer.address, start_timeout="1s"))
    assert starting.value.kind is ErrorKind.UNAVAILABLE
    await again.configure(rig.config(signer.address, accept_key_loss=True))
    assert await again.get_public_keys() == []


@pytest.mark.asyncio
async def test_fault_94_keys_without_a_note_need_the_operator(rig: RemoteRig) -> None:
    signer = await rig.signer()
    first = await rig.manager(signer.address)
    made = await first.generate_key("id", P256)
    fresh = rig.build("another")
    with pytest.raises(NotReadyError, match="accept_listed_keys"):
        await fresh.configure(rig.config(signer.address))
    await fresh.configure(rig.config(signer.address, accept_listed_keys=True))
    assert [k.fingerprint for k in await fresh.get_public_keys()] == [made.fingerprint]


@pytest.mark.asyncio
@pytest.mark.parametrize("content", ["", "{", '{"version": 2}', "[]", '{"version": 1, "keys": {}}'])
async def test_fault_94_damaged_note_stops_the_start(rig: RemoteRig, content: str) -> None:
    signer = await rig.signer()
    first = await rig.manager(signer.address)
    await first.generate_key("id", P256)
    await first.close()
    (note,) = (rig.folder / "server").glob("*.json")
    note.write_text(content)
    again = rig.build()
    with pytest.raises(NotReadyError, match=r"note of keys at the signer.*does not decode"):
        await again.configure(rig.config(signer.address))
    assert note.read_text() == content


@pytest.mark.asyncio
@pytest.mark.parametrize("lie", ["rewind", "fork", "log key", "no log key"])
async def test_fault_95_log_that_goes_back_stops_signing_where_a_witness_is_required(
    rig: RemoteRig, lie: str, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address, require_witness=True)
    await manager.generate_key("id", P256)
    for _ in range(3):
        await signs(manager)
    await manager.close()
    _rewind(signer, lie)
    again = rig.build()
    with pytest.raises(NotReadyError, match="signer audit log rewound"):
        await again.configure(rig.config(signer.address, require_witness=True))
    assert "signer.log_rewound" in "".join(capsys.readouterr())
    # It is remembered, even when the log has grown past what was seen.
    signer.lies.rewind = 0
    signer.lies.fork = False
    signer.lies.log_key = None
    signer.lies.no_log_key = False
    await again.configure(
        rig.config(signer.address, require_witness=True, accept_log=[signer.address])
    )
    await signs(again)


@pytest.mark.asyncio
async def test_fault_95_whoever_goes_on_accepting_is_told_at_every_start(
    rig: RemoteRig, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log accepted for ever is not witnessed over restarts any more."""
    signer = await rig.signer()
    await (await rig.manager(signer.address)).close()
    assert "take it out" not in "".join(capsys.readouterr())
    for _ in range(2):
        lax = await rig.manager(signer.address, accept_log=[signer.address], accept_key_loss=True)
        await lax.close()
        said = "".join(capsys.readouterr())
        assert said.count("take it out") == 2
        assert "accept_log" in said
        assert "accept_key_loss" in said


def _rewind(signer: LiarSigner, lie: str) -> None:
    if lie == "rewind":
        signer.lies.rewind = 5
    elif lie == "fork":
        signer.rewind_log(1)
        signer.lies.fork = True
    elif lie == "no log key":
        signer.lies.no_log_key = True
    else:
        signer.lies.log_key = generate_private_key(P256)


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another head": (lambda c: c | {"head": "00" * 32}, "a signature that does not hold"),
    "another number": (lambda c: c | {"at": c["at"] + 1}, "a signature that does not hold"),
    "signed by another": (lambda c: c | {"key": "11" * 32}, "signed by another key"),
    "no signature": (lambda c: c | {"signature": ""}, "not lower-case hexadecimal"),
    "a number as text": (lambda c: c | {"at": str(c["at"])}, "lacks members"),
    "true": (lambda c: c | {"at": True}, "lacks members"),
    "members missing": (lambda c: {"at": c["at"]}, "lacks members"),
    "no object": (lambda _: [], "not a JSON object"),
    "long": (lambda c: c | {"more": "x" * 5000}, "longer than 4096 bytes"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("row", CHECKPOINTS)
async def test_fault_95_checkpoint_that_does_not_hold(rig: RemoteRig, row: str) -> None:
    """Whoever has the signer's TLS key has not got its log key."""
    signer = await rig.signer()
    first = await rig.manager(signer.address, require_witness=True)
    await first.generate_key("id", P256)
    await first.close()
    signer.lies.checkpoint, reason = CHECKPOINTS[row]
    again = rig.build()
    with pytest.raises(NotReadyError, match=f"its last checkpoint does not hold: .*{reason}"):
        await again.configure(rig.config(signer.address, require_witness=True))


@pytest.mark.asyncio
async def test_fault_95_rewound_while_in_use(
    rig: RemoteRig, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = await rig.signer()
    strict = await rig.manager(signer.address, require_witness=True)
    await strict.generate_key("id", P256)
    signer.lies.rewind = 2
    with pytest.raises(NotReadyError, match="went back from record"):
        await strict.sign_data("id", DIGEST, SHA256)
    signer.lies.rewind = 0
    with pytest.raises(NotReadyError, match="signer audit log rewound"):
        await strict.sign_data("id", DIGEST, SHA256)
    await strict.close()
    capsys.readouterr()
    mild = await rig.manager(signer.address, accept_log=[signer.address])
    signer.lies.rewind = 3
    await signs(mild)
    assert "signer.log_rewound" in "".join(capsys.readouterr())
    assert mild.key_health().health is KeyHealth.DEGRADED


@pytest.mark.asyncio
async def test_fault_95_answers_that_overtake_each_other_are_no_rewinding(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address, require_witness=True)
    await manager.generate_key("id", P256)
    signer.hang = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(signs(manager))
        await signer.asked.wait()
        for _ in range(3):
            await manager.get_public_keys()
        signer.hang.set()
    assert manager.key_health().health is KeyHealth.GOOD


@pytest.mark.asyncio
async def test_fault_95_heads_are_in_our_log_and_on_note(
    rig: RemoteRig, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    for _ in range(50):
        await signs(manager)
    await manager.close()
    told = [line for line in "".join(capsys.readouterr()).splitlines() if "log witnessed" in line]
    assert len(told) == 1  # not one for every signature
    assert "seq=1 " in told[0]
    (note,) = (rig.folder / "server").glob("*.json")
    seen = json.loads(note.read_text())["logs"][signer.address]
    assert seen["seq"] > 50


@pytest.mark.asyncio
async def test_fault_96_slow_and_lossy_line_keeps_deadlines_without_a_storm(rig: RemoteRig) -> None:
    signer = await rig.signer()
    line = await rig.line(signer.port)
    line.delay_s = 0.1
    line.loss = 0.05
    manager = await rig.manager(line.address, timeout="4s")
    await manager.generate_key("id", P256)
    calls = len(signer.batches)
    await asyncio.gather(*(signs(manager) for _ in range(300)))
    assert len(signer.batches) - calls <= 300
    assert line.connections == 1
    # Nothing comes through any more: every call ends by its deadline, and the signer is not flooded.
    line.delay_s = 30
    quick = await _timed_out(manager)
    assert quick <= {ErrorKind.DEADLINE_EXCEEDED, ErrorKind.UNAVAILABLE}
    assert line.connections < 12


async def _timed_out(manager: RemoteKeyManager) -> set[ErrorKind]:
    kinds = set()
    async with asyncio.timeout(60):
        for result in await asyncio.gather(
            *(manager.sign_data("id", DIGEST, SHA256) for _ in range(100)), return_exceptions=True
        ):
            assert isinstance(result, SpireHwError)
            kinds.add(result.kind)
    return kinds


@pytest.mark.asyncio
async def test_fault_96_retries_are_a_tenth(rig: RemoteRig) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address, timeout="5s")
    await manager.generate_key("id", P256)
    signer.lies.lost_signatures = 10_000
    before = len(signer.batches)
    for _ in range(20):
        with pytest.raises(SpireHwError):
            await manager.sign_data("id", DIGEST, SHA256)
    # 20 calls, 10 retries in reserve and 2 that were earned.
    assert len(signer.batches) - before <= 20 + 12


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (7, "tbs_policy", ErrorKind.PERMISSION_DENIED),
        (8, "rate", ErrorKind.RESOURCE_EXHAUSTED),
        (3, "digest", ErrorKind.INVALID_ARGUMENT),
        (14, "hsm.token_missing", ErrorKind.UNAVAILABLE),
        (0, "", ErrorKind.INTERNAL),
    ],
)
async def test_fault_97_refusals_are_passed_on_with_their_reason_and_not_repeated(
    rig: RemoteRig, code: int, reason: str, kind: ErrorKind
) -> None:
    signer = await rig.signer()
    manager = await rig.manager(signer.address)
    await manager.generate_key("id", P256)
    signer.lies.refusal = pb.Refusal(code=code, reason=reason, message="no\nsuch thing")
    with pytest.raises(SpireHwError) as caught:
        await manager.sign_data("id", DIGEST, SHA256)
    assert caught.value.kind is kind
    assert reason in caught.value.message
    assert "\n" not in caught.value.message
    assert len(signer.batches) == 1
    if kind is ErrorKind.PERMISSION_DENIED:
        assert isinstance(caught.value, DeniedError)
    assert manager.key_health().health is KeyHealth.GOOD


@pytest.mark.asyncio
async def test_another_signer_of_the_same_token_takes_over_and_gives_back(rig: RemoteRig) -> None:
    shelf = Shelf()
    one, two = await rig.signer(shelf), await rig.signer(shelf)
    manager = await rig.manager(one.address, two.address)
    await healed(manager)
    await manager.generate_key("id", P256)
    await healed(manager)
    signed = 0

    async def load() -> None:
        nonlocal signed
        for _ in range(60):
            await signs(manager)
            signed += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(load())
        await one.asked.wait()
        await one.stop()
    assert signed == 240
    assert two.batches
    assert manager.key_health().health is KeyHealth.DEGRADED
    assert one.address in manager.key_health().message
    await one.start()
    await healed(manager)
    before = len(one.batches)
    await signs(manager)
    assert len(one.batches) == before + 1


@pytest.mark.asyncio
async def test_a_signer_with_other_keys_is_never_used_instead(rig: RemoteRig) -> None:
    one, two = await rig.signer(), await rig.signer()
    manager = await rig.manager(one.address, two.address, timeout="400ms")
    await manager.generate_key("id", P256)
    other = generate_private_key(P256)
    two.shelf.keys["id"] = other
    await one.stop()
    with pytest.raises(SpireHwError):
        await manager.sign_data("id", DIGEST, SHA256)
    assert two.batches == []


@pytest.mark.asyncio
async def test_generation_goes_on_at_another_signer_of_the_same_token(rig: RemoteRig) -> None:
    shelf = Shelf()
    one, two = await rig.signer(shelf), await rig.signer(shelf)
    manager = await rig.manager(one.address, two.address, timeout="2s")
    await healed(manager)
    one.dies_after_generation = True
    made = await manager.generate_key("id", P256)
    assert shelf.generations == 1
    assert two.request_ids == []
    assert made.fingerprint == (await manager.get_public_keys())[0].fingerprint


@pytest.mark.asyncio
async def test_keys_are_made_at_the_signer_that_may(rig: RemoteRig) -> None:
    shelf = Shelf()
    one, two = await rig.signer(shelf), await rig.signer(shelf)
    one.makes_no_keys = True
    manager = await rig.manager(one.address, two.address)
    await healed(manager)
    made = await manager.generate_key("id", P256)
    assert shelf.generations == 1
    await signs(manager)
    await healed(manager)
    before = len(one.batches)
    await signs(manager)
    assert len(one.batches) == before + 1
    two.makes_no_keys = True
    with pytest.raises(NotReadyError, match="record 7"):
        await manager.generate_key("id", P256)
    assert [k.fingerprint for k in await manager.get_public_keys()] == [made.fingerprint]
