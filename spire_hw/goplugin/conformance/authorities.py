"""What servers expect of upstream authorities, composers and those who take bundles and SVIDs.

Source: the behaviour of SPIRE 1.15's hosts towards these plugins.
"""

from __future__ import annotations

from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from spire_hw.bundle.bundle import Bundle, JwtAuthority, X509Root
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.goplugin.conformance.bench import TRUST_DOMAIN
from spire_hw.goplugin.conformance.report import (
    FailedError,
    NotedError,
    SkippedError,
    answered,
    refused,
)
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key, spki_der
from spire_hw.plugin.credentialcomposer import (
    DistinguishedName,
    JwtSvidAttributes,
    X509CaAttributes,
    X509SvidAttributes,
)
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.svidstore import StoredX509Svid
from spire_hw.spiffeid import agent_id, server_id
from spire_hw.x509.authority import X509Authority, check_ca_certificate
from spire_hw.x509.certificate import load_certificate, public_key_of
from spire_hw.x509.chain import verify_chain
from spire_hw.x509.csr import build_csr
from spire_hw.x509.issue import issue_ca_certificate, issue_x509_svid

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from spire_hw.goplugin.conformance.bench import Bench
    from spire_hw.goplugin.conformance.report import Report
    from spire_hw.plugin.upstreamauthority import UpstreamX509Ca

_HOUR: Final = timedelta(hours=1)
_SUBJECT: Final = DistinguishedName(country=("US",), organization=("SPIRE",))
_WITHOUT_EFFECTS: Final = "it would have effects outside; asked for with -effects"


async def examine_upstream(bench: Bench, report: Report) -> None:
    """Have a CA signed."""
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    async with report.step("has a CA signed, with a chain to its roots"):
        csr = await build_csr(signer, spiffe_id=TRUST_DOMAIN.id)
        async with aclosing(bench.contract.mint_x509_ca(csr, _HOUR)) as answers:
            first = await anext(answers, None)
        if first is None:
            raise FailedError("it ended without an answer")
        await _check_chain(first, signer, bench.clock.now())
    async with report.step("refuses a request that is nonsense"):

        async def mint() -> None:
            async with aclosing(bench.contract.mint_x509_ca(b"nonsense", _HOUR)) as answers:
                await anext(answers)

        error = await refused(mint(), "nonsense")
        if error.kind is not ErrorKind.INVALID_ARGUMENT:
            raise NotedError(answered(error))
    async with report.step("publishes JWT keys, or says that it does not"):
        key = JwtAuthority("spire-hw-check", spki_der(signer.public_key), bench.clock.now() + _HOUR)
        if not bench.subject.effects:
            raise SkippedError(_WITHOUT_EFFECTS)
        await _first_or_unimplemented(bench.contract.publish_jwt_key(key))
    async with report.step("tells the local bundle, or says that it does not"):
        await _first_or_unimplemented(bench.contract.subscribe_to_local_bundle())


async def _check_chain(made: UpstreamX509Ca, signer: SoftwareSigner, now: datetime) -> None:
    """Issue an SVID with the CA that was made, and verify it with the roots that came with it."""
    certificates = [load_certificate(der) for der in made.chain]
    spki = spki_der(signer.public_key)
    if spki_der(public_key_of(certificates[0])) != spki:
        raise FailedError("the first certificate of the chain is not for the key of the request")
    check_ca_certificate(certificates[0], TRUST_DOMAIN)
    authority = X509Authority(made.chain[0], signer, chain=made.chain)
    leaf = await issue_x509_svid(
        authority,
        spki=spki_der(generate_private_key(KeyType.EC_P256).public_key()),
        spiffe_id=TRUST_DOMAIN.member("web"),
        not_before=now,
        not_after=now + _HOUR,
    )
    roots = [root.certificate for root in made.roots]
    verify_chain(load_certificate(leaf), certificates, roots, now)


async def _first_or_unimplemented(answers: Any) -> None:
    try:
        async with aclosing(answers):
            if await anext(answers, None) is None:
                raise FailedError("it ended without an answer")
    except SpireHwError as e:
        if e.kind is ErrorKind.UNIMPLEMENTED:
            raise SkippedError("not supported, which is allowed") from e
        raise


async def examine_composer(bench: Bench, report: Report) -> None:
    """Have everything composed."""
    key = generate_private_key(KeyType.EC_P256).public_key()
    svid = X509SvidAttributes(_SUBJECT, ("a.check.test",))
    workload, agent = TRUST_DOMAIN.member("web"), agent_id(TRUST_DOMAIN, "check", "1")
    claims = JwtSvidAttributes({"sub": str(workload), "aud": ["x"], "exp": 1_800_000_000})
    composer = bench.contract
    calls: dict[str, Callable[[], Any]] = {
        "the server's CA": lambda: composer.compose_server_x509_ca(X509CaAttributes(_SUBJECT)),
        "the server's SVID": lambda: composer.compose_server_x509_svid(svid),
        "an agent's SVID": lambda: composer.compose_agent_x509_svid(agent, key, svid),
        "a workload's SVID": lambda: composer.compose_workload_x509_svid(workload, key, svid),
        "a workload's JWT": lambda: composer.compose_workload_jwt_svid(workload, claims),
    }
    for what, call in calls.items():
        async with report.step(f"composes {what}") as step:
            made = await call()
            step.detail = "left as it was" if made is None else "amended"


async def examine_outlet(bench: Bench, report: Report) -> None:
    """Hand over a bundle or an SVID of a trust domain that does not exist."""
    async with report.step("takes what it is handed, twice"):
        if not bench.subject.effects:
            raise SkippedError(_WITHOUT_EFFECTS)
        for _ in range(2):
            await _hand_over(bench)


async def _hand_over(bench: Bench) -> None:
    signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
    now = bench.clock.now()
    root = await issue_ca_certificate(
        None, trust_domain=TRUST_DOMAIN, not_before=now, not_after=now + _HOUR, signer=signer
    )
    bundle = Bundle(TRUST_DOMAIN, (X509Root(root),), sequence=1)
    match bench.subject.kind:
        case PluginKind.BUNDLE_PUBLISHER:
            await bench.contract.publish_bundle(bundle)
        case PluginKind.NOTIFIER:
            await bench.contract.notify_and_advise_bundle_loaded(bundle)
            await bench.contract.notify_bundle_updated(bundle)
        case _:
            svid = StoredX509Svid(
                server_id(TRUST_DOMAIN), (root,), b"no key", (root,), now + _HOUR, {}
            )
            metadata = ["name:spire-hw-check"]
            await bench.contract.put_x509_svid(svid, metadata)
            await bench.contract.delete_x509_svid(metadata)
