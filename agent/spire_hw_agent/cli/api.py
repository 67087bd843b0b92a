"""The Workload API by hand: what would a process of this user get?"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from cryptography.hazmat.primitives import serialization
from google.protobuf.json_format import MessageToDict
from typing_extensions import override

from spire_hw._pb import workload_pb2
from spire_hw.aio.backoff import Backoff
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.cli.output import complain, count_of, shown
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.files import replace_file
from spire_hw.x509.certificate import encode_pem, load_chain
from spire_hw_agent.cli.connect import Workload, workload_flags

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cryptography import x509

    from spire_hw_agent.cli.connect import Session


_DER = serialization.Encoding.DER
_MAX_TOKEN_CHARS = 64 << 10
_WATCH_FIRST_S = 0.5
_WATCH_CAP_S = 15.0
# A caller without an identity may get one; one that asks wrongly will always do so.
_WATCH_FINAL = frozenset({ErrorKind.INVALID_ARGUMENT, ErrorKind.UNIMPLEMENTED})


@click.group("api", cls=GoGroup)
def group() -> None:
    """The Workload API, by hand."""


class _Fetch(GoGroup):
    """Without a subcommand it is `fetch x509`, as upstream's is."""

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0].lstrip("-") not in {"h", "help"}):
            args = ["x509", *args]
        return super().parse_args(ctx, args)


@group.group("fetch", cls=_Fetch)
def fetch() -> None:
    """Fetch SVIDs for this process."""


@group.group("validate", cls=GoGroup)
def validate() -> None:
    """Validate SVIDs of others."""


# -- X.509 ---------------------------------------------------------------------


@fetch.command(
    "x509",
    examples="""
    spire-hw-agent api fetch x509
    spire-hw-agent api fetch x509 -write /run/web -silent
    """,
)
@flag("silent", "Print nothing on success.", type=bool, default=False)
@flag("write", "Directory to write SVIDs, keys and bundles to.", default="")
@workload_flags
def fetch_x509(workload: Workload, *, silent: bool, write: str) -> None:
    """Fetch the X.509-SVIDs of this process."""
    started = time.perf_counter()
    answer = workload.run(
        lambda session: session.first(
            "FetchX509SVID", workload_pb2.X509SVIDRequest(), workload_pb2.X509SVIDResponse
        )
    )
    took_s = time.perf_counter() - started
    if not silent:
        workload.printer.message(answer, lambda: _print_x509(answer, took_s))
    if write:
        _write_x509(answer, Path(write), quiet=silent or workload.printer.as_json)


def _print_x509(answer: workload_pb2.X509SVIDResponse, took_s: float | None = None) -> None:
    after = "" if took_s is None else f" after {took_s * 1000:.6g}ms"
    click.echo(f"Received {count_of(len(answer.svids), 'svid', 'svids')}{after}\n")
    for svid in answer.svids:
        leaf, *intermediates = load_chain(svid.x509_svid)
        click.echo(f"SPIFFE ID:\t\t{svid.spiffe_id}")
        if svid.hint:
            click.echo(f"Hint:\t\t\t{shown(svid.hint)}")
        _print_validity("SVID", [leaf], tab="\t")
        _print_validity("Intermediate", intermediates, numbered=True)
        _print_validity("CA", load_chain(svid.bundle), numbered=True, tab="\t")
        for trust_domain, bundle in sorted(answer.federated_bundles.items()):
            name = f"[{trust_domain.removeprefix('spiffe://')}] CA"
            _print_validity(name, load_chain(bundle), numbered=True)
        click.echo()


def _print_validity(
    what: str, certificates: Iterable[x509.Certificate], *, numbered: bool = False, tab: str = ""
) -> None:
    for number, certificate in enumerate(certificates, 1):
        name = f"{what} #{number}" if numbered else what
        after = certificate.not_valid_before_utc.strftime("%Y-%m-%d %H:%M:%S %z UTC")
        until = certificate.not_valid_after_utc.strftime("%Y-%m-%d %H:%M:%S %z UTC")
        click.echo(f"{name} Valid After:\t{tab if numbered else ''}{after}")
        click.echo(f"{name} Valid Until:\t{tab if numbered else ''}{until}")


def _write_x509(answer: workload_pb2.X509SVIDResponse, directory: Path, *, quiet: bool) -> None:
    def put(what: str, number: int | str, name: str, content: bytes, mode: int) -> None:
        path = directory / name
        if not quiet:
            click.echo(f"Writing {what} #{number} to file {path}.")
        replace_file(path, content, mode=mode, shared=True)

    for i, svid in enumerate(answer.svids):
        put("SVID", i, f"svid.{i}.pem", _pem(svid.x509_svid), 0o644)
        put("key", i, f"svid.{i}.key", _key_pem(svid.x509_svid_key), 0o600)
        put("bundle", i, f"bundle.{i}.pem", _pem(svid.bundle), 0o644)
        for j, (_, bundle) in enumerate(sorted(answer.federated_bundles.items())):
            put(
                "federated bundle",
                f"{j} for SVID #{i}",
                f"federated_bundle.{i}.{j}.pem",
                _pem(bundle),
                0o644,
            )


def _pem(ders: bytes) -> bytes:
    return encode_pem(c.public_bytes(_DER) for c in load_chain(ders))


def _key_pem(der: bytes) -> bytes:
    return serialization.load_der_private_key(der, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


# -- JWT -----------------------------------------------------------------------


@fetch.command(
    "jwt",
    examples="""
    spire-hw-agent api fetch jwt -audience db
    spire-hw-agent api fetch jwt -audience db,cache -spiffeID spiffe://example.org/web
    """,
)
@flag("audience", "Comma separated list of audiences.", default="")
@flag("spiffeID", "Only the token for this SPIFFE ID.", default="")
@workload_flags
def fetch_jwt(workload: Workload, audience: str, spiffe_id: str) -> None:
    """Fetch JWT-SVIDs of this process."""
    audiences = [a.strip() for a in audience.split(",") if a.strip()]
    if not audiences:
        raise click.UsageError("-audience is required")
    request = workload_pb2.JWTSVIDRequest(audience=audiences, spiffe_id=spiffe_id)

    async def work(
        session: Session,
    ) -> tuple[workload_pb2.JWTSVIDResponse, workload_pb2.JWTBundlesResponse]:
        bundles = await session.first(
            "FetchJWTBundles", workload_pb2.JWTBundlesRequest(), workload_pb2.JWTBundlesResponse
        )
        svids = await session.call("FetchJWTSVID", request, workload_pb2.JWTSVIDResponse)
        return svids, bundles

    svids, bundles = workload.run(work)

    def pretty() -> None:
        for svid in svids.svids:
            click.echo(f"token({svid.spiffe_id}):\n\t{svid.svid}")
            if svid.hint:
                click.echo(f"hint({svid.spiffe_id}):\n\t{shown(svid.hint)}")
        for trust_domain, keys in sorted(bundles.bundles.items()):
            click.echo(f"bundle({trust_domain}):\n\t{keys.decode()}")

    workload.printer.message(svids, pretty)


@validate.command(
    "jwt", examples="spire-hw-agent api validate jwt -audience db -svid eyJhbGciOi..."
)
@flag("audience", "Audience the token has to be for.", default="")
@flag("svid", "The JWT-SVID; `-` reads it from standard input.", default="")
@workload_flags
def validate_jwt(workload: Workload, audience: str, svid: str) -> None:
    """Check a JWT-SVID."""
    if not audience or not svid:
        raise click.UsageError("-audience and -svid are required")
    token = sys.stdin.read(_MAX_TOKEN_CHARS).strip() if svid == "-" else svid
    request = workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token)
    answer = workload.run(
        lambda session: session.call(
            "ValidateJWTSVID", request, workload_pb2.ValidateJWTSVIDResponse
        )
    )

    def show() -> None:
        claims = json.dumps(MessageToDict(answer.claims), sort_keys=True, separators=(",", ":"))
        click.echo(f"SVID is valid.\nSPIFFE ID : {answer.spiffe_id}\nClaims    : {claims}")

    workload.printer.message(answer, show)


# -- watch ---------------------------------------------------------------------


@group.command("watch", examples="spire-hw-agent api watch")
@workload_flags
def watch(workload: Workload) -> None:
    """Print every update of this process's X.509-SVIDs until interrupted."""

    async def follow(session: Session) -> None:
        stream = session.stream(
            "FetchX509SVID", workload_pb2.X509SVIDRequest(), workload_pb2.X509SVIDResponse
        )
        async for answer in stream:
            backoff.reset()
            workload.printer.message(answer, functools.partial(_print_x509, answer))

    backoff = Backoff(_WATCH_FIRST_S, _WATCH_CAP_S)
    complain("Watching for updates; Ctrl-C ends it.")
    while True:
        try:
            workload.run(follow)
            why = "the agent ended the stream"
        except SpireHwError as e:
            if e.kind in _WATCH_FINAL:
                raise
            why = e.message
        wait_s = backoff.next_s()
        complain(f"{why}; trying again in {wait_s:.1f} s")
        time.sleep(wait_s)
