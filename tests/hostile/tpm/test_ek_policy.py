"""Who is let in under each `ek_policy`, for every state a key can be in."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

import pytest

from spire_hw.errors import AttestationError, ErrorKind
from spire_hw.tpm.certificate import parse_certificate
from spire_hw_sim.ekca import CrlSpec
from spire_hw_sim.softtpm import SoftTpm, make_ek
from spire_hw_sim.tpmlab import Lab, ListedEks
from spire_hw_sim.tpmnode import TpmNode, Vendor

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.asyncio
POLICIES: Final = ("ca", "hash", "ca_or_hash", "ca_and_hash")
CERTIFICATES: Final = ("trusted", "foreign", "missing", "revoked", "unknown")
VENDOR, STRANGER = Vendor.make(), Vendor.make("Stranger")
WHY: Final = {
    "foreign": "ek_untrusted",
    "missing": "ek_no_certificate",
    "revoked": "ek_revoked",
    "unknown": "ek_revocation_unknown",
}


def expected(policy: str, certificate: str, *, listed: bool) -> tuple[list[str], list[str]]:
    """Return methods, or else the reasons of a refusal."""
    methods, reasons = [], []
    if policy != "hash":
        if certificate == "trusted":
            methods.append("ca")
        # Without a certificate the list is all that is asked where either will do.
        elif not (certificate == "missing" and policy == "ca_or_hash"):
            reasons.append(WHY[certificate])
    if "ek_revoked" in reasons:
        return [], reasons
    if policy in {"hash", "ca_and_hash"} or (policy == "ca_or_hash" and not methods):
        if listed:
            methods.append("hash")
        else:
            reasons.append("ek_unlisted")
    if not methods or (policy == "ca_and_hash" and reasons):
        return [], reasons
    return methods, []


@pytest.mark.parametrize(
    ("policy", "certificate", "listed"),
    list(itertools.product(POLICIES, CERTIFICATES, (True, False))),
)
async def test_policy(tmp_path: Path, policy: str, certificate: str, listed: bool) -> None:
    node = VENDOR.equip(TpmNode(SoftTpm(ek=make_ek("L-2"))))
    assert node.certificate is not None
    crl = CrlSpec()
    if certificate == "foreign":
        STRANGER.equip(node)
    elif certificate == "missing":
        node.certificate, node.chain = None, ()
    elif certificate == "revoked":
        crl = CrlSpec([parse_certificate(node.certificate).serial])
    elif certificate == "unknown":
        crl = CrlSpec(next_update=b"")
    (tmp_path / "a.crl").write_bytes(VENDOR.intermediate.issue_crl(crl))
    lab = await Lab.make(
        tmp_path,
        f'ek_policy = "{policy}"\ncrl_path = "{tmp_path}/a.crl"\n',
        vendor=VENDOR,
        ek_list=ListedEks({node.ek_hash} if listed else set()),
    )
    methods, reasons = expected(policy, certificate, listed=listed)
    if reasons:
        error = await lab.refused(node)
        assert isinstance(error, AttestationError)
        assert [finding.code for finding in error.findings] == reasons
        may_retry = reasons[0] == "ek_revocation_unknown"
        kind = ErrorKind.UNAVAILABLE if may_retry else ErrorKind.PERMISSION_DENIED
        assert error.kind is kind
        assert not lab.admitted
        assert not lab.challenges
        return
    made = await lab.attest(node)
    found = [value for value in made.selector_values if value.startswith("ek:method:")]
    assert found == [f"ek:method:{method}" for method in methods]
