"""signer.conf, and the files it names."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from spire_hw.config import hcl
from spire_hw.errors import ConfigError, InvalidInputError, NotReadyError, SpireHwError
from spire_hw.spiffeid import TrustDomain
from spire_hw_signer.config import build_settings, owner_config
from spire_hw_signer.policy import Custody, Import, Owner
from spire_hw_signer.tlsfiles import TlsFiles, TlsPaths
from spire_hw_sim.pki import HOUR, Authority, now

if TYPE_CHECKING:
    from datetime import datetime

OWNER = Owner(TrustDomain("example.org"), "s1")
LEAST = """
signer {
  name = "a"
  data_dir = "/d"
  policy_file = "/p"
  socket_path = "/s"
}
plugins { KeyManager "pkcs11" { plugin_data { module_path = "/m" } } }
"""


def faults(old: str, new: str) -> str:
    assert old in LEAST
    with pytest.raises(ConfigError) as caught:
        build_settings(hcl.parse(LEAST.replace(old, new), "signer.conf"))
    return caught.value.message


def test_what_is_not_said_has_a_default() -> None:
    settings = build_settings(hcl.parse(LEAST))
    assert settings.bind_port == 8445
    assert settings.admin_socket_path == Path("/run/spire-hw/signer-admin.sock")
    assert settings.audit.directory == Path("/d/audit")
    assert settings.tls is None
    assert settings.notices == ()


def test_flags_win_over_the_file() -> None:
    settings = build_settings(hcl.parse(LEAST), {"policy_file": "/q", "bind_port": 1})
    assert (settings.policy_file, settings.bind_port) == (Path("/q"), 1)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('socket_path = "/s"', "", "nobody could reach the signer"),
        ('socket_path = "/s"', 'socket_path = "/s" admin_socket_path = "/s"', "are the same"),
        ('name = "a"', 'name = "a b"', '"name"'),
        ('name = "a"', "", '"name": is required'),
        ('policy_file = "/p"', 'policy_fill = "/p"', 'did you mean "policy_file"'),
        ('socket_path = "/s"', "tls {}", '"cert_file": is required'),
        (
            'socket_path = "/s"',
            'tls { cert_file = "/c" key_file = "/k" client_ca_files = [] }',
            "client_ca_files",
        ),
        ('KeyManager "pkcs11"', 'KeyManager "memory"', "keeps its keys in pkcs11, tpm, disk"),
        ('KeyManager "pkcs11"', 'KeyManager "remote"', "keeps its keys in pkcs11, tpm, disk"),
        ("plugins {", 'plugins { KeyManager "disk" {} ', "at most 1 KeyManager"),
        ('module_path = "/m"', 'key_identifier_value = "x"', "is set by the signer"),
        ('module_path = "/m"', 'retain_replaced = "1h"', "is set by the signer"),
        ('module_path = "/m"', 'import "k" { label = "x" }', "write import in the policy"),
        (
            'module_path = "/m"',
            'token "a" { import "k" { label = "x" } }',
            "write import in the policy",
        ),
        ('plugin_data { module_path = "/m" }', 'plugin_cmd = "/x"', "built in"),
        ('plugin_data { module_path = "/m" }', 'plugin_data_file = "/x"', "not plugin_data_file"),
        ("plugins {", 'plugins { NodeAttestor "tpm" {} ', "do not belong here"),
    ],
)
def test_faults_are_told(old: str, new: str, expected: str) -> None:
    assert expected in faults(old, new)


def test_keys_on_disk_say_that_they_are_for_demonstrations() -> None:
    text = LEAST.replace('KeyManager "pkcs11"', 'KeyManager "disk"').replace(
        'module_path = "/m"', ""
    )
    (notice,) = build_settings(hcl.parse(text)).notices
    assert "demonstrations" in notice
    assert "replaced ones are not kept" in notice


def test_owners_are_told_apart_by_the_signer() -> None:
    keys = build_settings(hcl.parse(LEAST)).keys
    made = owner_config(keys, OWNER, Path("/o"), Custody(timedelta(hours=26)))
    assert made.data.get("key_identifier_value") == "s1"
    assert made.data.get("retain_replaced") == "93600s"
    assert made.data.get("module_path") == "/m"
    assert owner_config(keys, OWNER, Path("/o"), Custody()).data.get("retain_replaced") is None


@pytest.mark.parametrize(
    ("name", "retain", "is_said", "expected"),
    [
        ("pkcs11", timedelta(hours=1), True, "3600s"),
        ("tpm", timedelta(hours=1), True, "3600s"),
        ("tpm", timedelta(hours=26), False, "93600s"),
        ("tpm", timedelta(), True, "0s"),
        ("tpm", None, False, None),
        ("disk", timedelta(hours=26), False, None),
        ("disk", timedelta(), True, None),
    ],
)
def test_replaced_keys_are_kept_where_that_can_be_done(
    name: str, retain: timedelta | None, is_said: bool, expected: str | None
) -> None:
    keys = replace(build_settings(hcl.parse(LEAST)).keys, name=name)
    made = owner_config(keys, OWNER, Path("/o"), Custody(retain, is_said=is_said))
    assert made.data.get("retain_replaced") == expected


def test_nobody_is_made_to_believe_that_keys_are_kept() -> None:
    keys = replace(build_settings(hcl.parse(LEAST)).keys, name="disk")
    with pytest.raises(ConfigError, match=r'"disk" keeps no replaced keys; pkcs11 and tpm do'):
        owner_config(keys, OWNER, Path("/o"), Custody(timedelta(hours=26), is_said=True))


class Files:
    """TLS files in a directory."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority("infra.example")
        self.identity = self.authority.identity("spiffe://infra.example/signer")
        self.paths = TlsPaths(folder / "cert", folder / "key", (folder / "ca",))
        self.paths.cert_file.write_bytes(pem(self.identity.chain_der[0]))
        assert self.identity.private_key is not None
        self.paths.key_file.write_bytes(
            self.identity.private_key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        (folder / "ca").write_bytes(pem(self.authority.der))


def pem(der: bytes) -> bytes:
    certificate = x509.load_der_x509_certificate(der)
    return certificate.public_bytes(serialization.Encoding.PEM)


def test_tls_files_are_read_and_read_again(tmp_path: Path) -> None:
    files = Files(tmp_path)
    tls = TlsFiles(files.paths)
    with pytest.raises(NotReadyError, match="not read yet"):
        tls.identity()
    tls.load()
    first = tls.identity()
    assert first.chain_der == files.identity.chain_der
    assert tls.pins().authorities == (files.authority.certificate,)
    tls.load()
    assert tls.identity().version > first.version
    assert tls.fault(now()) == ""
    assert "has expired" in tls.fault(now() + 2 * HOUR)


@pytest.mark.parametrize("which", ["cert", "key", "ca"])
@pytest.mark.parametrize("content", [None, b"", b"no PEM"])
def test_tls_files_that_are_bad_change_nothing(
    tmp_path: Path, which: str, content: bytes | None
) -> None:
    tls = TlsFiles(Files(tmp_path).paths)
    tls.load()
    before = tls.identity()
    path = tmp_path / which
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(SpireHwError, match=which):
        tls.load()
    assert tls.identity() is before


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    files, other = Files(tmp_path), tmp_path / "other"
    other.mkdir()
    files.paths.key_file.write_bytes(Files(other).paths.key_file.read_bytes())
    with pytest.raises(InvalidInputError, match="is not the key of cert_file"):
        TlsFiles(files.paths).load()


@pytest.mark.parametrize("order", [1, -1])
def test_a_client_is_believed_as_long_as_any_of_its_authorities_is(
    tmp_path: Path, order: int
) -> None:
    files = Files(tmp_path)
    authority = files.authority
    roots = authority.der, reissued(authority, now() + 100 * HOUR)
    (tmp_path / "ca").write_bytes(b"".join(map(pem, roots[::order])))
    tls = TlsFiles(files.paths)
    tls.load()
    leaf = authority.identity("spiffe://infra.example/x", end=now() + 50 * HOUR).chain_der[0]
    chain = (x509.load_der_x509_certificate(leaf),)
    assert tls.is_believed(chain, now())
    assert tls.is_believed(chain, now() + 48 * HOUR)
    assert not tls.is_believed(chain, now() + 51 * HOUR)
    assert not tls.is_believed(chain, now() + 101 * HOUR)


def reissued(authority: Authority, end: datetime) -> bytes:
    """Return another certificate of an authority's key, DER."""
    old = authority.certificate
    builder = (
        x509.CertificateBuilder(extensions=list(old.extensions))
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(authority.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(end)
    )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_keys_made_elsewhere_are_their_owners_alone() -> None:
    keys = build_settings(hcl.parse(LEAST)).keys
    custody = Custody(imports=(Import("k", uri="pkcs11:object=a"), Import("l", label="b")))
    made = owner_config(keys, OWNER, Path("/o"), custody)
    found = {b.keys[1]: b.body for b in made.data.labelled("import")}
    assert (found["k"].get("uri"), found["l"].get("label")) == ("pkcs11:object=a", "b")
    assert not owner_config(keys, OWNER, Path("/o"), Custody()).data.labelled("import")
    with pytest.raises(ConfigError, match="uses its own keys alone"):
        owner_config(replace(keys, name="tpm"), OWNER, Path("/o"), custody)
