from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from spire_hw.config.hcl import parse
from spire_hw.errors import AttestationError, ConfigError, InvalidInputError, NotReadyError
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.nodeattestor import AttestationRequest
from spire_hw.spiffeid import TrustDomain
from spire_hw.tpm.ekcert import ChainTime
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.nodeattestor.tpm.config import build_settings, find_faults
from spire_hw_plugins.nodeattestor.tpm.server import build
from spire_hw_sim.clock import SimClock
from spire_hw_sim.ekca import CrlSpec
from spire_hw_sim.tpmlab import Lab, ListedEks
from spire_hw_sim.tpmnode import Vendor

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.plugin.info import EkList

HASH = "ab" * 32
DIGEST = "cd" * 32


def _host(directory: Path, ek_list: EkList | None = None) -> HostInfo:
    return HostInfo(
        side=Side.SERVER,
        trust_domain=TrustDomain.parse("example.org"),
        data_dir=directory,
        log=get_logger("tpm"),
        clock=SimClock(),
        ek_list=ek_list,
    )


def test_empty_configuration_is_enough_with_an_enrolment_list() -> None:
    settings = build_settings(parse(""), has_ek_list=True)
    assert settings.use_ca
    assert settings.use_hash
    assert not settings.need_both
    assert settings.selections == (PcrSelection("sha256", (0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 14)),)
    assert settings.policy == {}
    assert settings.require_tpm_key
    assert not settings.allow_owner_ak
    assert settings.timeout == timedelta(seconds=30)
    assert settings.chain_time is ChainTime.ISSUER_AT_LEAF_ISSUANCE


def test_everything_set_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root.der"
    root.write_bytes(Vendor.make().root.certificate)
    hashes = tmp_path / "hashes"
    hashes.write_text(f"# nodes\n{HASH.upper()}  # rack 1\n\n")
    text = f"""
    ek_policy = "ca_and_hash"
    endorsement_ca_path = "{root}"
    ek_chain_time = "strict"
    sha1_ca_fingerprints = ["{DIGEST}"]
    ek_hashes = ["{DIGEST}"]
    hash_path = "{hashes}"
    pcrs = {{ sha256 = [7, 0, 4, 4]  sha384 = [0] }}
    pcr_values {{ sha256 {{ "7" = ["{DIGEST.upper()}", "{HASH}"] }} }}
    require_tpm_key = false
    allow_owner_ak = true
    challenge_timeout = "2m"
    """
    settings = build_settings(parse(text), has_ek_list=False)
    assert settings.need_both
    assert settings.hashes == {HASH, DIGEST}
    assert settings.selections == (PcrSelection("sha256", (0, 4, 7)), PcrSelection("sha384", (0,)))
    assert settings.policy == {("sha256", 7): {bytes.fromhex(HASH), bytes.fromhex(DIGEST)}}
    assert settings.roots is not None
    assert settings.roots.value.pinned == {DIGEST}
    assert len(settings.roots.value.anchors) == 1
    assert settings.timeout == timedelta(minutes=2)


FAULTS = {
    'ek_policy = "cert"': "must be one of",
    'ek_policy = "ca"': '"ca" needs endorsement_ca_path',
    'ek_policy = "ca_and_hash"': '"ca_and_hash" needs endorsement_ca_path',
    'ek_hashes = ["zz"]': "expected a SHA-256 in hexadecimal",
    f'ek_hashes = ["{HASH}00"]': "expected a SHA-256 in hexadecimal",
    "ek_hash = []": 'did you mean "ek_hashes"?',
    "crl_required = true": "needs crl_path",
    'challenge_timeout = "0s"': "must be between 1s and 2m",
    'challenge_timeout = "1h"': "must be between 1s and 2m",
    "challenge_timeout = 30": "challenge_timeout",
    "pcrs = { sha256 = [] }": "names no PCR",
    "pcrs = { sha256 = [24] }": "must be less than 24",
    "pcrs = { sha1 = [0] }": 'unknown key "sha1"',
    f'pcr_values {{ sha256 {{ "9" = ["{DIGEST}"] }} }}': "is not among those quoted",
    f'pcr_values {{ sha384 {{ "0" = ["{DIGEST}"] }} }}': "is not among those quoted",
    'pcr_values { sha256 { "7" = [] } }': "has no allowed value",
    'pcr_values { sha256 { "7" = ["ab"] } }': "needs values of 64 digits",
    'pcr_values { sha256 { "7" = ["xy"] } }': "expected a digest in hexadecimal",
    f'pcr_values {{ sha256 {{ "24" = ["{DIGEST}"] }} }}': 'unknown key "24"',
}


@pytest.mark.parametrize("text", FAULTS)
def test_fault_is_found_with_its_line(text: str) -> None:
    found = find_faults(parse(f"\n\n{text}\n"), has_ek_list=True)
    assert [fault.line for fault in found] == [3] * len(found)
    assert any(FAULTS[text] in fault.message for fault in found)
    with pytest.raises(ConfigError):
        build_settings(parse(text), has_ek_list=True)


def test_all_faults_are_found_at_once() -> None:
    text = 'ek_policy = "ca"\nchallenge_timeout = "1ms"\npcrs = { sha256 = [] }\n'
    assert len(find_faults(parse(text), has_ek_list=True)) == 3


def test_some_way_to_accept_a_key_is_needed() -> None:
    assert find_faults(parse(""), has_ek_list=False)
    assert find_faults(parse('ek_policy = "hash"'), has_ek_list=False)
    assert not find_faults(parse(f'ek_hashes = ["{HASH}"]'), has_ek_list=False)
    assert not find_faults(parse('hash_path = "/x"'), has_ek_list=False)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match=r"endorsement key hashes at .*none cannot be read"):
        build_settings(parse(f'hash_path = "{tmp_path}/none"'), has_ek_list=False)
    bad = tmp_path / "hashes"
    bad.write_text(f"{HASH}\nnot a hash\n")
    with pytest.raises(InvalidInputError, match=r"hashes:2: expected a SHA-256"):
        build_settings(parse(f'hash_path = "{bad}"'), has_ek_list=False)
    with pytest.raises(NotReadyError, match=r"revocation lists at .*none cannot be read"):
        build_settings(parse(f'crl_path = "{tmp_path}/none"'), has_ek_list=True)
    with pytest.raises(NotReadyError, match=r"endorsement CAs at .*none cannot be read"):
        build_settings(parse(f'endorsement_ca_path = "{tmp_path}/none"'), has_ek_list=False)


def test_revocation_lists_are_read_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendor = Vendor.make()
    for number in range(3):
        (tmp_path / f"{number}.crl").write_bytes(vendor.root.issue_crl(CrlSpec([number])))
    (tmp_path / "notes.txt").write_text("not a list")
    text = f'crl_path = "{tmp_path}"\ncrl_required = true\n'
    crls = build_settings(parse(text), has_ek_list=True).crls
    assert crls is not None
    assert {tuple(crl.revoked) for crl in crls.value.crls} == {(0,), (1,), (2,)}
    assert build_settings(parse(""), has_ek_list=True).crls is None
    monkeypatch.setattr("spire_hw.tpm.crlfiles._MAX_FILES", 2)
    with pytest.raises(InvalidInputError, match="more than 2 revocation lists"):
        build_settings(parse(text), has_ek_list=True)


def test_hash_file_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spire_hw_plugins.nodeattestor.tpm.config._MAX_HASH_FILE_BYTES", 10)
    path = tmp_path / "hashes"
    path.write_text(HASH)
    with pytest.raises(InvalidInputError, match="larger than 10 bytes"):
        build_settings(parse(f'hash_path = "{path}"'), has_ek_list=False)


@pytest.mark.asyncio
async def test_hash_directory_is_asked_on_every_attestation(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    lab = await Lab.make(tmp_path, f'ek_policy = "hash"\nhash_path = "{tmp_path / "h"}"\n')
    node = lab.node()
    with pytest.raises(Exception, match="ek_unlisted"):
        await lab.attest(node)
    (tmp_path / "h" / node.ek_hash).touch()
    assert "ek:method:hash" in (await lab.attest(node)).selector_values


@pytest.mark.asyncio
async def test_hash_alone_admits_a_node_without_a_certificate(tmp_path: Path) -> None:
    listed = ListedEks()
    server = build(_host(tmp_path, listed))
    await server.configure(parse(""))
    lab = Lab(server, Vendor.make(), SimClock())
    node = lab.node()
    node.certificate, node.chain = None, ()
    listed.hashes.add(node.ek_hash)
    values = (await lab.attest(node)).selector_values
    assert "ek:method:hash" in values


@pytest.mark.asyncio
async def test_listed_node_of_an_unknown_vendor_gets_no_vendor_selectors(tmp_path: Path) -> None:
    listed = ListedEks()
    lab = await Lab.make(tmp_path, 'ek_policy = "ca_or_hash"\n', ek_list=listed)
    node = Vendor.make("Stranger").equip(lab.node())
    listed.hashes.add(node.ek_hash)
    values = (await lab.attest(node)).selector_values
    assert "ek:method:hash" in values
    assert not any(v.startswith(("manufacturer:", "model:", "ek:ca:")) for v in values)


@pytest.mark.asyncio
async def test_both_methods_are_told_when_both_are_needed(tmp_path: Path) -> None:
    listed = ListedEks()
    lab = await Lab.make(tmp_path, 'ek_policy = "ca_and_hash"\n', ek_list=listed)
    node = lab.node()
    listed.hashes.add(node.ek_hash)
    values = (await lab.attest(node)).selector_values
    assert {"ek:method:ca", "ek:method:hash"} <= set(values)


@pytest.mark.asyncio
async def test_unconfigured_server_is_not_ready(tmp_path: Path) -> None:
    server = build(_host(tmp_path))

    async def never(_: bytes) -> bytes:
        raise AssertionError

    async def admit(_: object) -> None:
        return None

    request = AttestationRequest(b"{}", never, None, admit)
    with pytest.raises(NotReadyError):
        await server.attest(request)
    await server.configure(parse(f'ek_hashes = ["{HASH}"]'))
    await server.close()
    with pytest.raises(NotReadyError):
        await server.attest(request)


@pytest.mark.asyncio
async def test_policy_over_pcr_7_alone_is_warned_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f'ek_hashes = ["{HASH}"]\npcr_values {{ sha256 {{ "7" = ["{DIGEST}"] }} }}'
    server = build(_host(tmp_path))
    assert server.validate(parse(text)) == []
    await server.configure(parse(text))
    assert "PCR 7 alone" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_policy_lets_listed_values_pass(tmp_path: Path) -> None:
    lab = await Lab.make(tmp_path)
    value = lab.node().tpm.pcrs["sha256", 7].hex()
    text = f'pcr_values {{ sha256 {{ "7" = ["{DIGEST}", "{value}"] }} }}\n'
    allowed = await Lab.make(tmp_path, text)
    await allowed.attest(allowed.node())


@pytest.mark.asyncio
async def test_refusal_is_logged_with_every_finding_and_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = await Lab.make(tmp_path, 'ek_policy = "ca_or_hash"\n', ek_list=ListedEks())
    node = Vendor.make("Stranger").equip(lab.node())
    with pytest.raises(AttestationError):
        await lab.attest(node)
    logged = capsys.readouterr().out
    assert "ek_untrusted" in logged
    assert "ek_unlisted" in logged
    assert node.ek_hash in logged


@pytest.mark.asyncio
async def test_host_is_told_how_long_and_how_large_an_exchange_may_be(tmp_path: Path) -> None:
    server = build(_host(tmp_path))
    assert (server.timeout_s, server.max_message_bytes) == (35, 1 << 20)
    await server.configure(parse(f'ek_hashes = ["{HASH}"]\nchallenge_timeout = "2m"'))
    assert server.timeout_s == 125
