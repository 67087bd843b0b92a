from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization

from spire_hw.config.hcl import parse
from spire_hw.errors import ConfigError, InvalidInputError, NotReadyError
from spire_hw.key import KeyType, generate_private_key
from spire_hw.tpm.pcrpolicy import approve, signer_public
from spire_hw.tpm.wire import PcrSelection
from spire_hw_plugins.keymanager.tpm_config import (
    build_settings,
    find_faults,
    load_approvals,
    read_config,
)

if TYPE_CHECKING:
    from pathlib import Path

KEY = generate_private_key(KeyType.EC_P256)
PCRS = "policy_pcrs = { sha256 = [7, 0] }"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('tcti = "a"\ntpm_device_path = "/b"', "not both"),
        ('session = "bound"', "session"),
        ('persistent_handles = "0x8100"', "eight hex digits"),
        ('persistent_handles = "81008100"', "eight hex digits"),
        ('persistent_handles = "0x40000001"', "are expected"),
        ('persistent_handles = "0x81800000"', "are expected"),
        ('persistent_handles = "0x817ffff8"', "are expected"),
        ('persistent_handles = "0x81000000"', "reserved"),
        ('persistent_handles = "0x8100fff8"', "reserved"),
        ('persistent_handles = "0x81010001"', "reserved"),
        ('persistent_handles = "0x81020000"', "reserved"),
        ("policy_pcrs = {}", "names no PCR"),
        ("policy_pcrs = { sha256 = [24] }", "less than 24"),
        ("policy_pcrs = { sha1 = [0] }", "sha1"),
        ('policy_authority_path = "a"\napprovals_path = "b"', "needs policy_pcrs"),
        (f'{PCRS}\npolicy_authority_path = "a"', "need each other"),
        (f'{PCRS}\napprovals_path = "a"', "need each other"),
        (f'{PCRS}\npolicy_ref = "a"', "needs policy_authority_path"),
    ],
)
def test_what_does_not_fit_is_told(text: str, words: str) -> None:
    assert any(words in fault.message for fault in find_faults(parse(text))), text
    with pytest.raises(ConfigError):
        read_config(parse(text))


def test_what_fits_comes_out(tmp_path: Path) -> None:
    public = tmp_path / "authority.pem"
    public.write_bytes(
        KEY.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    text = (
        f'{PCRS}\npolicy_authority_path = "{public}"\napprovals_path = "{tmp_path}"\n'
        'policy_ref = "web"\nsession = "salted"\npersistent_handles = "0x81008100"\ntcti = "a"'
    )
    assert find_faults(parse(text)) == []
    settings = build_settings(read_config(parse(text)), tmp_path)
    assert settings.salted
    assert settings.first_handle == 0x81008100
    assert settings.directory == tmp_path / "keys-tpm"
    binding = settings.binding
    assert binding is not None
    assert binding.selections == (PcrSelection("sha256", (0, 7)),)
    assert binding.authority == signer_public(KEY.public_key())
    assert binding.ref == b"web"
    public.write_bytes(b"nothing")
    with pytest.raises(InvalidInputError, match="holds no public key"):
        build_settings(read_config(parse(text)), tmp_path)
    public.unlink()
    with pytest.raises(NotReadyError, match="policy_authority_path"):
        build_settings(read_config(parse(text)), tmp_path)


def test_without_settings_keys_are_plain(tmp_path: Path) -> None:
    settings = build_settings(read_config(parse("")), tmp_path)
    assert (settings.salted, settings.first_handle, settings.binding) == (False, None, None)
    assert load_approvals(settings.approvals) == ([], [])


def test_approvals_are_read_and_others_files_are_told(tmp_path: Path) -> None:
    good = approve(KEY, bytes(32))
    (tmp_path / "good.json").write_bytes(good.encode())
    (tmp_path / "note.txt").write_text("not read")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    found, complaints = load_approvals(tmp_path)
    assert found == [good]
    assert complaints[0].startswith(f"{tmp_path}/bad.json: ")
    assert complaints[1:] == [f"{tmp_path}/folder.json cannot be read: Is a directory"]
    with pytest.raises(NotReadyError, match="approvals_path"):
        load_approvals(tmp_path / "none")


def test_more_approvals_than_anybody_needs_are_not_read(tmp_path: Path) -> None:
    text = approve(KEY, bytes(32)).encode()
    for number in range(260):
        (tmp_path / f"{number}.json").write_bytes(text)
    found, complaints = load_approvals(tmp_path)
    assert len(found) == 256
    assert "more than 256" in complaints[0]
