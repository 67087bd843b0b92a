"""The token that the server's keys are on: who has keys there, and whose are cleared away."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from typing_extensions import override

from spire_hw import log
from spire_hw.cli.flags import GoDurationType, GoGroup, flag
from spire_hw.cli.output import Printer, count_of, epoch, output_flags, relative, rfc3339, table
from spire_hw.cli.run import batch_code
from spire_hw.errors import NotReadyError, SpireHwError
from spire_hw.pkcs11.inventory.tenants import JUMP_S
from spire_hw_server.cli.key import parse_generation
from spire_hw_server.config import DEFAULT_CONFIG, load_settings

if TYPE_CHECKING:
    from spire_hw.pkcs11.inventory.reaping import SharedToken
    from spire_hw.pkcs11.inventory.tenants import Tenancy, Tenant
    from spire_hw.plugin.keymanager import KeyInfo, RetainedKey
    from spire_hw_server.config import ServerSettings

_WIDTH: Final = 14
_DAYS: Final = re.compile(r"([0-9]{1,5})d", re.ASCII)
_DEFAULT_AGE: Final = timedelta(days=14)
_LEAST_AGE: Final = timedelta(days=1)


if TYPE_CHECKING:
    _MomentBase = click.ParamType[datetime]
else:
    _MomentBase = click.ParamType  # older releases of click cannot be subscripted


class _AgeType(GoDurationType):
    """A duration that may be given in days, `14d`."""

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        days = _DAYS.fullmatch(value) if isinstance(value, str) else None
        age = timedelta(days=int(days[1])) if days else super().convert(value, param, ctx)
        if age < _LEAST_AGE:
            self.fail("servers mark their keys every half hour: at least 24h is needed", param, ctx)
        return age


class _MomentType(_MomentBase):
    """A time such as `2026-05-01T12:00`, UTC unless it says otherwise."""

    name = "time"

    @override
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        try:
            found = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except ValueError:
            self.fail("expected a time such as 2026-05-01T12:00", param, ctx)
        return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


_config_flag = flag("config", "The server's configuration file.", default=DEFAULT_CONFIG)
_expand_flag = flag("expandEnv", "Expand $VARIABLES in it.", type=bool, default=False)
_token_flag = flag("token", "Which token, when several are configured.", default="")


@click.group("hsm", cls=GoGroup)
def group() -> None:
    """Keys of all servers on the token that this server's KeyManager uses."""


@group.command(
    "list",
    examples="""
    spire-hw-server hsm list -config /etc/spire-hw/server.conf
    spire-hw-server hsm list -config /etc/spire-hw/server.conf -output json
    """,
)
@_token_flag
@_expand_flag
@_config_flag
@output_flags
def list_(config: str, *, expand_env: bool, token: str, output: str, field: str) -> None:
    """Show who has keys on the token, and when they were seen last.

    The running server is not disturbed: nothing is written.
    """
    settings = _settings(config, expand_env=expand_env)

    async def look() -> tuple[str, float, Tenancy]:
        from spire_hw_server.offline import shared_token  # noqa: PLC0415 - loads what a server is made of

        async with shared_token(settings, token) as shared:
            return shared.device, shared.now, await shared.tenancy()

    device, now, tenancy = asyncio.run(look())
    values = {
        "token": device,
        "servers": [_values(tenant) for tenant in tenancy.tenants],
        "nameless_objects": tenancy.nameless,
        "other_objects": tenancy.foreign,
    }
    Printer(output == "json", field).value(values, lambda: _show(device, now, tenancy))


@group.command(
    "reap",
    examples="""
    spire-hw-server hsm reap -config /etc/spire-hw/server.conf -olderThan 14d
    spire-hw-server hsm reap -config /etc/spire-hw/server.conf -olderThan 14d -yes
    """,
)
@_token_flag
@_expand_flag
@_config_flag
@flag(
    "olderThan",
    "For how long a server must have been silent, such as 14d.",
    type=_AgeType(),
    default=_DEFAULT_AGE,
    alias="older-than",
)
@flag(
    "now",
    "With -yes: what another clock shows, UTC, such as 2026-05-01T12:00. Needed where no other server's "
    "mark on the token vouches for this machine's clock.",
    type=_MomentType(),
    from_environment=False,
)
@flag("yes", "Destroy; without it, only say what would be destroyed.", type=bool, default=False)
@output_flags
@click.pass_context
def reap(
    ctx: click.Context,
    /,
    config: str,
    *,
    expand_env: bool,
    token: str,
    older_than: timedelta,
    now: datetime | None,
    yes: bool,
    output: str,
    field: str,
) -> None:
    """Destroy the keys of servers of this trust domain that are no more.

    An HSM gives nothing back. Own keys, those of other trust domains, and those of which nobody knows
    whose they are or when they were used last are never touched.
    """
    settings = _settings(config, expand_env=expand_env)
    done = asyncio.run(_reap(settings, token, older_than.total_seconds(), now, is_meant=yes))
    Printer(output == "json", field).value(done.values(), done.show)
    ctx.exit(batch_code(len(done.reaped), len(done.failed)))


@group.command(
    "restore",
    examples="""
    spire-hw-server hsm restore -config /etc/spire-hw/server.conf
    spire-hw-server hsm restore x509-CA-A@3 -config /etc/spire-hw/server.conf
    """,
)
@click.argument("generation", metavar="[KEY@GENERATION]", required=False, default="")
@_expand_flag
@_config_flag
@output_flags
def restore(generation: str, config: str, *, expand_env: bool, output: str, field: str) -> None:
    """Make a replaced key the current one again, while the server is stopped; list them without one.

    For a server that goes back to a journal from before the replacement, that of a database that was
    restored: it starts with the key which that journal names.
    """
    settings = _settings(config, expand_env=expand_env)
    wanted = parse_generation(generation) if generation else None

    async def work() -> tuple[KeyInfo | None, list[RetainedKey]]:
        from spire_hw_server.offline import keys_at_rest  # noqa: PLC0415 - loads what a server is made of

        async with keys_at_rest(settings) as keys:
            made = None if wanted is None else await keys.restore_key(*wanted)
            return made, await keys.retained_keys()

    made, kept = asyncio.run(work())
    values: dict[str, Any] = {
        "restored": None if made is None else {"id": made.key_id, "fingerprint": made.fingerprint},
        "retained": [
            {
                "id": one.info.key_id,
                "generation": one.generation,
                "fingerprint": one.info.fingerprint,
                "until": rfc3339(int(one.until)),
            }
            for one in kept
        ],
    }

    def pretty() -> None:
        if made is not None:
            click.echo(f"{made.key_id} is {made.fingerprint} again.")
        for one in kept:
            until = rfc3339(int(one.until))
            click.echo(f"{one.info.key_id}@{one.generation} {one.info.fingerprint} until {until}")
        if made is None and not kept:
            click.echo("No replaced key is retained.")

    Printer(output == "json", field).value(values, pretty)


class _Reaping:
    """What came of it."""

    def __init__(self, device: str, *, is_meant: bool) -> None:
        self._device = device
        self._is_meant = is_meant
        self.reaped: list[Tenant] = []
        self.kept: list[tuple[Tenant, str]] = []
        self.failed: list[tuple[Tenant, str]] = []

    def values(self) -> dict[str, Any]:
        return {
            "token": self._device,
            "dry_run": not self._is_meant,
            "reaped": [_values(tenant) for tenant in self.reaped],
            "kept": [{**_values(tenant), "reason": why} for tenant, why in self.kept],
            "failed": [{**_values(tenant), "error": error} for tenant, error in self.failed],
        }

    def show(self) -> None:
        verb = "destroyed" if self._is_meant else "would be destroyed"
        for tenant in self.reaped:
            keys = count_of(len(tenant.pairs), "key", "keys")
            click.echo(f"{_name(tenant)}: {keys} {verb}")
        for tenant, why in self.kept:
            click.echo(f"{_name(tenant)}: kept, {why}")
        for tenant, error in self.failed:
            click.echo(f"{_name(tenant)}: failed, {error}")
        servers = count_of(len(self.reaped), "server", "servers")
        end = "" if self._is_meant else " Nothing was destroyed; add -yes to do it."
        click.echo(f"{servers} reaped, {len(self.kept)} kept, {len(self.failed)} failed.{end}")


async def _reap(
    settings: ServerSettings,
    name: str,
    older_than_s: float,
    stated: datetime | None,
    *,
    is_meant: bool,
) -> _Reaping:
    from spire_hw_server.offline import shared_token  # noqa: PLC0415 - loads what a server is made of

    async with shared_token(settings, name) as token:
        tenancy = await token.tenancy()
        tenancy.check_clock(token.now)
        if is_meant and not tenancy.is_vouched(token.now):
            _check_stated(token.now, stated)
        done = _Reaping(token.device, is_meant=is_meant)
        for tenant in tenancy.tenants:
            why = tenant.why_kept(token.owner, token.now, older_than_s)
            if why:
                done.kept.append((tenant, why))
            elif not is_meant:
                done.reaped.append(tenant)
            else:
                await _reap_one(token, tenant, older_than_s, done)
    return done


def _check_stated(now: float, stated: datetime | None) -> None:
    """Refuse to judge ages by a clock for which nobody but this server vouches.

    Raises:
        NotReadyError: the operator did not say what another clock shows, or that is another time.
    """
    here = rfc3339(int(now))
    if stated is None:
        raise NotReadyError(
            "no other server has marked its keys within the hour, so nobody vouches for this machine's "
            f"clock, which says {here}: nothing is destroyed; say what another clock shows, with -now"
        )
    if abs(now - stated.timestamp()) > JUMP_S:
        raise NotReadyError(
            f"this machine's clock says {here}, which is not {rfc3339(int(stated.timestamp()))}: "
            "nothing is destroyed; correct the clock and start this server, which marks again"
        )


async def _reap_one(
    token: SharedToken, tenant: Tenant, older_than_s: float, done: _Reaping
) -> None:
    try:
        await token.reap(tenant, older_than_s)
    except SpireHwError as e:
        done.failed.append((tenant, e.message))
    else:
        done.reaped.append(tenant)


def _settings(config: str, *, expand_env: bool) -> ServerSettings:
    log.output().level = log.Level.ERROR
    return load_settings(Path(config), expand_env=expand_env, overrides={})


def _name(tenant: Tenant) -> str:
    if tenant.owner is None:
        return tenant.prefix
    return f"{tenant.owner.server} of {tenant.owner.trust_domain}"


def _values(tenant: Tenant) -> dict[str, Any]:
    owner = tenant.owner
    return {
        "prefix": tenant.prefix,
        "trust_domain": "" if owner is None else owner.trust_domain,
        "server": "" if owner is None else owner.server,
        "is_own": tenant.is_own,
        "last_seen": rfc3339(int(tenant.marked)) if tenant.marked > 0 else None,
        "keys": [{"id": cka_id.hex(), "label": label} for cka_id, label in tenant.pairs],
    }


def _show(device: str, now: float, tenancy: Tenancy) -> None:
    click.echo(table([("Token", device)], _WIDTH))
    for tenant in tenancy.tenants:
        mine = " (this server)" if tenant.is_own else ""
        seen = "unknown"
        if tenant.marked > 0:
            seen = relative(epoch(int(tenant.marked)), epoch(int(now)))
        rows = [("Server", f"{_name(tenant)}{mine}"), ("Last seen", seen)]
        rows += [("Key", f"{label} id {cka_id.hex()}") for cka_id, label in tenant.pairs]
        click.echo(table(rows, _WIDTH))
    servers = count_of(len(tenancy.tenants), "server", "servers")
    nameless = count_of(tenancy.nameless, "object", "objects")
    click.echo(f"{servers}, {tenancy.foreign} key objects of others, {nameless} without a name.")
