"""Both halves of the `tpm` node attestor in one process, over real TPMs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typing_extensions import override

from spire_hw.config.hcl import Body
from spire_hw.errors import AttestationError, ErrorKind, InvalidInputError, SpireHwError
from spire_hw.key import KeyType, fingerprint, spki_der
from spire_hw.plugin.nodeattestor import SvidKey
from spire_hw.tpm.connection import Hierarchy
from spire_hw.tpm.endorsement import EkType
from spire_hw.tpm.errors import Rc, TpmError
from spire_hw.tpm.public import parse_public
from spire_hw_plugins.keymanager.memory import build as build_memory
from spire_hw_plugins.keymanager.tpm import TpmKeyManager
from spire_hw_plugins.nodeattestor.tpm import wire
from spire_hw_sim.again import refused
from spire_hw_sim.manufacturer import EkKind, Manufacturer
from spire_hw_sim.tpm_bus import TpmBus, refusal
from spire_hw_sim.tpm_command import ENDORSEMENT
from tests.integration.tpm.leaks import nothing_left_behind
from tests.integration.tpm.parties import (
    Bench,
    Change,
    Exchange,
    attest,
    codes,
    node,
    serving,
)

if TYPE_CHECKING:
    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
QUOTE, ACTIVATE, CERTIFY = 0x158, 0x147, 0x148


@pytest.mark.parametrize("ek_type", [EkType.AUTO, EkType.EC_P256, EkType.RSA_2048])
async def test_a_certified_tpm_is_accepted(bench: Bench, tpm: Swtpm, ek_type: EkType) -> None:
    server = await serving(bench)
    async with node(bench, tpm, ek_type) as n:
        with nothing_left_behind(tpm):
            first = await attest(n.agent, server, n.key)
            again = await attest(n.agent, server, n.key)
    assert (first.agent_id, first.selector_values) == (again.agent_id, again.selector_values)
    assert first.can_reattest
    assert first.agent_id.path.startswith("/spire/agent/tpm/")
    assert "key:tpm" in first.selector_values
    assert "ak:hierarchy:endorsement" in first.selector_values
    assert any(value.startswith("pcr:sha256:7:") for value in first.selector_values)


async def test_two_banks_are_quoted(bench: Bench, tpm: Swtpm) -> None:
    banks = {"sha256": [0, 7], "sha384": list(range(24))}
    server = await serving(bench, pcrs=banks)
    async with node(bench, tpm) as n:
        found = await attest(n.agent, server, n.key)
    assert sum(value.startswith("pcr:sha384:") for value in found.selector_values) == 24


async def test_a_tpm_without_certificate_is_accepted_by_its_hash_alone(
    bench: Bench, bare_tpm: Swtpm
) -> None:
    bare_tpm.extend_pcr(0, b"firmware")
    async with node(bench, bare_tpm) as n:
        refusing = await serving(bench)
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, refusing, n.key)
        assert codes(caught.value) == ["ek_no_certificate"]
        stream = Exchange()
        with pytest.raises(AttestationError):
            await attest(n.agent, refusing, n.key, stream)
        spki = wire.decode_attestation_data(stream.sent[0]).ek_spki
        assert spki is not None
        listed = await serving(bench, ek_policy="hash", ek_hashes=[fingerprint(spki)])
        found = await attest(n.agent, listed, n.key)
        assert found.agent_id.path == f"/spire/agent/tpm/{fingerprint(spki)}"


async def test_a_tpm_of_an_unknown_manufacturer_is_refused(bench: Bench, bare_tpm: Swtpm) -> None:
    Manufacturer("Somebody Else").equip(bare_tpm)
    server = await serving(bench)
    async with node(bench, bare_tpm) as n:
        with nothing_left_behind(bare_tpm), pytest.raises(AttestationError) as caught:
            await attest(n.agent, server, n.key)
    assert caught.value.kind is ErrorKind.PERMISSION_DENIED


async def test_a_changed_pcr_is_refused(bench: Bench, tpm: Swtpm) -> None:
    open_server = await serving(bench)
    async with node(bench, tpm) as n:
        found = await attest(n.agent, open_server, n.key)
        (value,) = (
            v.rpartition(":")[2] for v in found.selector_values if v.startswith("pcr:sha256:4:")
        )
        strict = await serving(bench, pcr_values={"sha256": {"4": [value]}})
        await attest(n.agent, strict, n.key)
        tpm.extend_pcr(4, b"another boot loader", banks=("sha256", "sha384"))
        with nothing_left_behind(tpm), pytest.raises(AttestationError) as caught:
            await attest(n.agent, strict, n.key)
    assert codes(caught.value) == ["pcr_mismatch"]
    assert value not in caught.value.message


async def test_a_key_outside_the_tpm_is_refused_unless_policy_allows_it(
    bench: Bench, tpm: Swtpm
) -> None:
    memory = build_memory(bench.agent_host)
    await memory.configure(Body.empty())
    info = await memory.generate_key("id", KeyType.EC_P256)
    outside = SvidKey(memory, "id", info.public_key)
    async with node(bench, tpm) as n:
        strict = await serving(bench)
        with nothing_left_behind(tpm), pytest.raises(AttestationError) as caught:
            await attest(n.agent, strict, outside)
        assert codes(caught.value) == ["key_not_in_tpm"]
        lax = await serving(bench, require_tpm_key=False)
        found = await attest(n.agent, lax, outside)
        assert "key:tpm" not in found.selector_values
        await attest(n.agent, lax, None)


async def test_a_key_bound_to_pcrs_is_told_from_one_that_is_not(bench: Bench, tpm: Swtpm) -> None:
    keys = TpmKeyManager(bench.agent_host)
    settings = {
        "tcti": tpm.tcti,
        "keys_path": str(bench.folder / "bound"),
        "policy_pcrs": {"sha256": [7]},
    }
    await keys.configure(Body.from_dict(settings))
    info = await keys.generate_key("id", KeyType.EC_P256)
    bound = SvidKey(keys, "id", info.public_key)
    policy = parse_public(keys.tpm_key_blob("id")[0][2:]).auth_policy
    strict = await serving(bench, key_policies=[policy.hex()])
    async with node(bench, tpm) as n:
        with nothing_left_behind(tpm):
            found = await attest(n.agent, strict, bound)
        assert "key:tpm" in found.selector_values
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, strict, n.key)
        assert codes(caught.value) == ["key_policy"]
    await keys.close()


@pytest.mark.parametrize(
    ("agent_knows", "server_knows"), [(True, False), (False, True), (False, False)]
)
async def test_a_key_that_one_half_does_not_see_is_not_spoken_of(
    bench: Bench, tpm: Swtpm, agent_knows: bool, server_knows: bool
) -> None:
    """So it is when one half, or both, run under a host that does not show them the CSR."""
    async with node(bench, tpm) as n:
        key = n.key if agent_knows else None
        spki = spki_der(n.key.public_key) if server_knows else None
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, await serving(bench), key, None, spki, shown=server_knows)
        assert codes(caught.value) == ["csr_unbound" if server_knows else "key_not_in_tpm"]
        strict = await serving(bench, bind_csr=False)
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, strict, key, None, spki, shown=server_knows)
        assert codes(caught.value) == ["key_not_in_tpm"]
        lax = await serving(bench, require_tpm_key=False, bind_csr=False)
        settings = {"tcti": tpm.tcti, "bind_csr": False}
        await n.agent.configure(Body.from_dict(settings))
        found = await attest(n.agent, lax, key, None, spki, shown=server_knows)
    assert "key:tpm" not in found.selector_values
    assert "tier:quote" in found.selector_values


async def test_evidence_is_not_bound_to_a_key_nobody_showed(bench: Bench, tpm: Swtpm) -> None:
    def bind(data: bytes) -> bytes:
        message = json.loads(data)
        del message["spire_hw"]["csr"]
        return json.dumps(message).encode()

    async with node(bench, tpm) as n:
        lax = await serving(bench, require_tpm_key=False, bind_csr=False)
        with pytest.raises(InvalidInputError, match="nobody showed us"):
            await attest(n.agent, lax, None, Exchange(on_challenge=bind))


async def test_evidence_for_one_key_does_not_serve_another(bench: Bench, tpm: Swtpm) -> None:
    thief = spki_der(ec.generate_private_key(ec.SECP256R1()).public_key())
    async with node(bench, tpm) as n:
        server = await serving(bench)
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, server, n.key, csr_spki=thief)
        assert codes(caught.value) == ["csr_key_mismatch"]
        lax = await serving(bench, require_tpm_key=False)
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, lax, None, csr_spki=thief)
        assert codes(caught.value) == ["csr_unbound"]


async def test_an_agent_is_not_talked_out_of_binding(bench: Bench, tpm: Swtpm) -> None:
    """A server in the middle could hand unbound evidence on with a key of its own."""
    async with node(bench, tpm) as n:
        lax = await serving(bench, require_tpm_key=False, bind_csr=False)
        exchange = Exchange()
        with pytest.raises(InvalidInputError, match="bind_csr"):
            await attest(n.agent, lax, n.key, exchange, shown=False)
        assert len(exchange.sent) == 1


async def test_replayed_evidence_is_refused(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    async with node(bench, tpm) as n:
        recorded = Exchange()
        await attest(n.agent, server, n.key, recorded)
        old = wire.decode_response(recorded.sent[1])

        whole = Exchange(on_answer=lambda _: recorded.sent[1])
        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, server, n.key, whole)
        assert codes(caught.value) == ["secret_mismatch"]

        def old_statements(data: bytes) -> bytes:
            fresh = wire.decode_response(data)
            return wire.encode_response(wire.Response(fresh.secret, old.quotes, old.certify))

        with pytest.raises(AttestationError) as caught:
            await attest(n.agent, server, n.key, Exchange(on_answer=old_statements))
        assert set(codes(caught.value)) == {"nonce_mismatch"}


async def test_another_tpm_cannot_answer_for_this_one(
    bench: Bench, tpm: Swtpm, other_tpm: Swtpm
) -> None:
    server = await serving(bench)
    async with (
        node(bench, tpm) as victim,
        node(bench, other_tpm) as thief,
    ):
        shown = Exchange()
        await attest(victim.agent, server, victim.key, shown)
        claim = wire.decode_attestation_data(shown.sent[0])
        seen = await attest(thief.agent, server, thief.key)

        @dataclass
        class Masked(Exchange):
            @override
            async def send(self, data: bytes) -> None:
                if not self.sent:
                    own = wire.decode_attestation_data(data)
                    data = wire.encode_attestation_data(
                        wire.AttestationData(
                            claim.ek_certificate,
                            claim.ek_spki,
                            own.ak,
                            claim.ek_pub,
                            claim.ek_chain,
                            own.key_pub,
                        )
                    )
                await super().send(data)

        with (
            nothing_left_behind(other_tpm),
            pytest.raises(InvalidInputError, match="TPM refused the credential"),
        ):
            await attest(thief.agent, server, thief.key, Masked())
        assert seen.agent_id != (await attest(victim.agent, server, victim.key)).agent_id


def edited(**changes: object) -> Change:
    """Return a change of our object in a challenge."""

    def change(data: bytes) -> bytes:
        message = json.loads(data)
        message["spire_hw"].update(changes)
        return json.dumps(message).encode()

    return change


def without_credential(data: bytes) -> bytes:
    message = json.loads(data)
    del message["EC"]
    return json.dumps(message).encode()


def damaged_credential(data: bytes) -> bytes:
    message = wire.decode_challenge(data)
    credential = message.credential[:-1] + bytes([message.credential[-1] ^ 1])
    return wire.encode_challenge(
        wire.ChallengeMessage(credential, message.secret, message.nonce, message.quote)
    )


HOSTILE: dict[str, tuple[Change, str]] = {
    "no credential": (without_credential, "credential is missing"),
    "damaged credential": (damaged_credential, "TPM refused the credential"),
    "short nonce": (edited(nonce="AAAA"), "nonce must be 32 bytes"),
    "PCR 24": (edited(quote=[{"bank": "sha256", "pcrs": [24]}]), "PCR request is malformed"),
    "no PCR": (edited(quote=[{"bank": "sha256", "pcrs": []}]), "PCR request is malformed"),
    "unknown bank": (edited(quote=[{"bank": "md5", "pcrs": [1]}]), "PCR request is malformed"),
    "bank twice": (edited(quote=[{"bank": "sha256", "pcrs": [1]}] * 2), "a bank is named twice"),
    "disabled bank": (edited(quote=[{"bank": "sha512", "pcrs": [1]}]), "sha512 is not active"),
    "not JSON": (lambda _: b"{", "envelope: "),
    "empty": (lambda _: b"", "envelope: "),
    "huge": (lambda _: b" " * 200_000, "envelope: "),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_server_gets_no_statement(bench: Bench, tpm: Swtpm, name: str) -> None:
    change, words = HOSTILE[name]
    server = await serving(bench)
    async with node(bench, tpm) as n:
        stream = Exchange(on_challenge=change)

        async def act() -> object:
            stream.sent.clear()
            return await attest(n.agent, server, n.key, stream)

        with nothing_left_behind(tpm):
            error = await refused(act)
        assert re.search(words, error.message)
        assert len(stream.sent) == 1
        await attest(n.agent, server, n.key)


def damaged_secret(data: bytes) -> bytes:
    message = wire.decode_challenge(data)
    secret = message.secret[:-1] + bytes([message.secret[-1] ^ 1])
    return wire.encode_challenge(replace(message, secret=secret))


@pytest.mark.parametrize("change", [damaged_secret, damaged_credential])
@pytest.mark.parametrize("ek_type", [EkType.EC_P256, EkType.RSA_2048])
async def test_a_credential_that_does_not_open_is_no_dead_tpm(
    bench: Bench, tpm: Swtpm, ek_type: EkType, change: Change
) -> None:
    """What a damaged secret of an RSA key is answered with is also what a broken TPM says."""
    server = await serving(bench)
    async with node(bench, tpm, ek_type) as n:
        stream = Exchange(on_challenge=change)
        with (
            nothing_left_behind(tpm),
            pytest.raises(InvalidInputError, match="challenge: TPM refused the credential"),
        ):
            await attest(n.agent, server, n.key, stream)
        assert len(stream.sent) == 1
        await attest(n.agent, server, n.key)


@pytest.mark.parametrize("code", [Rc.LOCKOUT, Rc.OBJECT_MEMORY, Rc.SESSION_MEMORY, 0x9A2])
@pytest.mark.parametrize("command", [ACTIVATE, QUOTE, CERTIFY])
async def test_a_tpm_that_refuses_in_mid_exchange_ends_it_and_is_left_clean(
    bench: Bench, tpm: Swtpm, command: int, code: int
) -> None:
    server = await serving(bench)
    with TpmBus(tpm) as bus:
        async with node(bench, tpm, EkType.EC_P256, bus) as n:
            await attest(n.agent, server, n.key)
            bus.on_command = lambda seen: refusal(code) if seen.code == command else None

            async def act() -> object:
                bus.forget()
                return await attest(n.agent, server, n.key)

            is_password = code in {Rc.LOCKOUT, 0x9A2}
            with nothing_left_behind(tpm):
                # Memory is waited for, which takes too long to be done often.
                error = await refused(act, again=is_password)
            assert error.kind is ErrorKind.UNAVAILABLE
            if is_password:  # and is not tried again
                assert sum(seen.code == command for seen in bus.commands) == 1
            bus.on_command = lambda _: None
            await attest(n.agent, server, n.key)


async def test_an_endorsement_password_is_proved_and_never_sent(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    tpm.commands.set_password(ENDORSEMENT, b"endorsement secret")
    async with node(bench, tpm) as n:
        with nothing_left_behind(tpm), pytest.raises(TpmError, match="password required"):
            await attest(n.agent, server, n.key)
        await n.agent.open(tpm.tcti, passwords={Hierarchy.ENDORSEMENT: b"endorsement secret"})
        with nothing_left_behind(tpm):
            await attest(n.agent, server, n.key)


async def test_a_tpm_that_goes_away_in_mid_exchange_is_unavailable_and_comes_back(
    bench: Bench, tpm: Swtpm
) -> None:
    server = await serving(bench)

    def kill(data: bytes) -> bytes:
        tpm.kill()
        return data

    async with node(bench, tpm) as n:
        with pytest.raises(SpireHwError) as caught:
            await attest(n.agent, server, n.key, Exchange(on_challenge=kill))
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        tpm.start()
        tpm.extend_pcr(0, b"firmware")
        with nothing_left_behind(tpm):
            await attest(n.agent, server, n.key)


async def test_the_same_node_keeps_its_id_over_reboot_and_clear(bench: Bench, tpm: Swtpm) -> None:
    server = await serving(bench)
    async with node(bench, tpm) as n:
        before = await attest(n.agent, server, n.key)
        tpm.reset()
        tpm.extend_pcr(0, b"firmware")
        assert (await attest(n.agent, server, n.key)).agent_id == before.agent_id
        tpm.commands.clear()
    async with node(bench, tpm) as n:
        assert (await attest(n.agent, server, n.key)).agent_id == before.agent_id


async def test_a_certificate_for_another_key_is_told_before_anything_is_sent(
    bench: Bench, bare_tpm: Swtpm
) -> None:
    server = await serving(bench)
    stranger = ec.generate_private_key(ec.SECP256R1()).public_key()
    bare_tpm.commands.nv_store(EkKind.ECC_P256.value, bench.factory.manufacturer.issue(stranger))
    async with node(bench, bare_tpm) as n:
        stream = Exchange()
        with (
            nothing_left_behind(bare_tpm),
            pytest.raises(SpireHwError, match="0x01C0000A is for another key than template L-2"),
        ):
            await attest(n.agent, server, n.key, stream)
        assert stream.sent == []
