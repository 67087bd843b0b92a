"""The verifier against another implementation: tpm2-tools over a real swtpm."""

from __future__ import annotations

import secrets
import shutil
import struct
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AttestationError
from spire_hw.tpm import verify, wire
from spire_hw.tpm.credential import make_credential
from spire_hw.tpm.public import (
    check_ak,
    check_ek,
    check_svid_key,
    hierarchy_of,
    name_of,
    parse_public,
    qualified_name,
)
from spire_hw.tpm.verify import Statement
from spire_hw.tpm.wire import PcrSelection

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.skipif(
    shutil.which("tpm2_quote") is None, reason="tpm2-tools are not installed"
)
SECRET = b"0123456789abcdef0123456789abcdef"
BADGE = struct.pack(">II", 0xBADCC0DE, 1)
ENDORSEMENT = wire.RH_ENDORSEMENT.to_bytes(4, "big")


@dataclass(frozen=True)
class Tools:
    """tpm2-tools with a working directory."""

    tcti: str
    directory: Path

    def run(self, *arguments: str) -> None:
        """Run `tpm2 <arguments>`; `@x` is the file x of the directory."""
        command = [f"{self.directory}/{a[1:]}" if a.startswith("@") else a for a in arguments]
        command = [a.replace("session:@", f"session:{self.directory}/") for a in command]
        done = subprocess.run(  # noqa: S603
            ["tpm2", *command, "-T", self.tcti],  # noqa: S607
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr

    def read(self, name: str) -> bytes:
        """Return a file."""
        return (self.directory / name).read_bytes()

    def area(self, name: str) -> bytes:
        """Return the TPMT_PUBLIC of a TPM2B_PUBLIC file."""
        return self.read(name)[2:]


@pytest.fixture
def tools(tpm: Swtpm, tmp_path: Path) -> Tools:
    return Tools(tpm.tcti, tmp_path)


def _make_ek(tools: Tools, kind: str) -> bytes:
    tools.run("createek", "-c", "@ek.ctx", "-G", kind, "-u", "@ek.pub")
    tools.run("flushcontext", "-t")
    return tools.area("ek.pub")


def _make_ak(tools: Tools, kind: str, scheme: str) -> bytes:
    tools.run(
        *("createak", "-C", "@ek.ctx", "-c", "@ak.ctx", "-G", kind, "-g", "sha256"),
        *("-s", scheme, "-u", "@ak.pub", "-n", "@ak.name"),
    )
    tools.run("flushcontext", "-t")
    return tools.area("ak.pub")


def _policy(tools: Tools) -> None:
    tools.run("startauthsession", "--policy-session", "-S", "@session")
    tools.run("policysecret", "-S", "@session", "-c", "e")


def _activate(tools: Tools, credential: bytes, encrypted: bytes) -> bytes:
    (tools.directory / "cred").write_bytes(BADGE + credential + encrypted)
    _policy(tools)
    tools.run(
        *("activatecredential", "-c", "@ak.ctx", "-C", "@ek.ctx", "-i", "@cred"),
        *("-o", "@opened", "-P", "session:@session"),
    )
    tools.run("flushcontext", "@session")
    tools.run("flushcontext", "-t")
    return tools.read("opened")


@pytest.mark.parametrize("kind", ["rsa2048", "ecc256"])
def test_credential_of_ours_opens_in_a_tpm(tools: Tools, kind: str) -> None:
    ek = _make_ek(tools, kind)
    assert check_ek(parse_public(ek)).label == {"rsa2048": "L-1", "ecc256": "L-2"}[kind]
    ak = _make_ak(tools, "ecc", "ecdsa")
    assert name_of(ak) == tools.read("ak.name")
    made = make_credential(ek, name_of(ak), SECRET)
    assert _activate(tools, made.id_object, made.encrypted_secret) == SECRET


def test_credential_opens_for_a_p384_endorsement_key(tools: Tools) -> None:
    tools.run("readpublic", "-c", "0x81010016", "-o", "@ek.pub")
    ek = tools.area("ek.pub")
    assert check_ek(parse_public(ek)).label == "H-3"
    tools.run(
        *("createprimary", "-C", "e", "-c", "@ak.ctx", "-G", "ecc256:ecdsa-sha256:null"),
        *("-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign|noda"),
    )
    tools.run("readpublic", "-c", "@ak.ctx", "-o", "@ak.pub")
    tools.run("flushcontext", "-t")
    made = make_credential(ek, name_of(tools.area("ak.pub")), SECRET)
    (tools.directory / "cred").write_bytes(BADGE + made.id_object + made.encrypted_secret)
    tools.run(
        *("activatecredential", "-c", "@ak.ctx", "-C", "0x81010016", "-i", "@cred"),
        *("-o", "@opened"),
    )
    assert tools.read("opened") == SECRET


def test_credential_of_the_tools_has_the_layout_of_ours(tools: Tools) -> None:
    ek = _make_ek(tools, "ecc256")
    ak = _make_ak(tools, "ecc", "ecdsa")
    (tools.directory / "secret").write_bytes(SECRET)
    tools.run(
        *("makecredential", "-u", "@ek.pub", "-s", "@secret"),
        *("-n", name_of(ak).hex(), "-o", "@theirs"),
    )
    theirs = tools.read("theirs")
    made = make_credential(ek, name_of(ak), SECRET)
    assert len(theirs) == len(BADGE + made.id_object + made.encrypted_secret)
    assert theirs[: len(BADGE) + 4] == BADGE + made.id_object[:4]


@pytest.mark.parametrize(
    ("kind", "scheme"), [("ecc", "ecdsa"), ("rsa", "rsassa"), ("rsa", "rsapss")]
)
def test_quote_of_a_tpm_is_verified(tools: Tools, kind: str, scheme: str) -> None:
    ek = _make_ek(tools, "ecc256")
    ak = parse_public(_make_ak(tools, kind, scheme))
    check_ak(ak)
    place = qualified_name(qualified_name(ENDORSEMENT, name_of(ek)), ak.name)
    assert hierarchy_of(place, ak.name, (name_of(ek),)) == "endorsement"
    expected = secrets.token_bytes(32)
    tools.run(
        *("quote", "-c", "@ak.ctx", "-l", "sha256:0,2,4,7", "-q", expected.hex()),
        *("-m", "@attest", "-s", "@sig", "-o", "@pcrs", "-F", "values", "-g", "sha256"),
        *("--scheme", scheme),
    )
    asked = (PcrSelection("sha256", (0, 2, 4, 7)),)
    raw = tools.read("pcrs")
    values = {n: raw[32 * i : 32 * i + 32] for i, n in enumerate((0, 2, 4, 7))}
    statement = Statement(tools.read("attest"), tools.read("sig"))
    quote = verify.verify_quote(
        ak,
        place,
        expected=expected,
        selections=asked,
        statement=statement,
        values={"sha256": values},
    )
    assert quote.pcrs == {("sha256", n): value for n, value in values.items()}
    assert quote.clock.reset_count < 100  # not scrambled: the key is in the endorsement hierarchy
    with pytest.raises(AttestationError, match="nonce_mismatch"):
        verify.verify_quote(
            ak,
            place,
            expected=bytes(32),
            selections=asked,
            statement=statement,
            values={"sha256": values},
        )


@pytest.mark.parametrize("selection", ["sha256:0", "sha256:0,2,4,7,8", "sha384:0,2,4,7"])
def test_quote_over_other_pcrs_is_refused(tools: Tools, selection: str) -> None:
    ek = _make_ek(tools, "ecc256")
    ak = parse_public(_make_ak(tools, "ecc", "ecdsa"))
    place = qualified_name(qualified_name(ENDORSEMENT, name_of(ek)), ak.name)
    tools.run(
        *("quote", "-c", "@ak.ctx", "-l", selection, "-q", "00" * 32),
        *("-m", "@attest", "-s", "@sig", "-g", "sha256"),
    )
    with pytest.raises(AttestationError) as caught:
        verify.verify_quote(
            ak,
            place,
            expected=bytes(32),
            selections=(PcrSelection("sha256", (0, 2, 4, 7)),),
            statement=Statement(tools.read("attest"), tools.read("sig")),
            values={"sha256": {n: bytes(32) for n in (0, 2, 4, 7)}},
        )
    assert caught.value.findings[0].code == "pcr_selection"


def test_certification_by_a_tpm_is_verified(tools: Tools) -> None:
    ek = _make_ek(tools, "ecc256")
    ak = parse_public(_make_ak(tools, "ecc", "ecdsa"))
    place = qualified_name(qualified_name(ENDORSEMENT, name_of(ek)), ak.name)
    tools.run("createprimary", "-C", "o", "-G", "ecc256", "-c", "@srk.ctx")
    attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|sign"
    tools.run(
        *("create", "-C", "@srk.ctx", "-G", "ecc256", "-a", attributes),
        *("-u", "@key.pub", "-r", "@key.priv", "-c", "@key.ctx"),
    )
    tools.run("flushcontext", "-t")
    key = parse_public(tools.area("key.pub"))
    check_svid_key(key)
    expected = secrets.token_bytes(32)
    tools.run(
        *("certify", "-c", "@key.ctx", "-C", "@ak.ctx", "-g", "sha256"),
        *("-o", "@attest", "-s", "@sig"),
    )
    with pytest.raises(AttestationError) as caught:
        verify.verify_certify(
            ak,
            place,
            key=key,
            expected=expected,
            statement=Statement(tools.read("attest"), tools.read("sig")),
        )
    codes = [finding.code for finding in caught.value.findings]
    assert codes == ["nonce_mismatch"]  # the tool cannot be given qualifying data: all else holds
