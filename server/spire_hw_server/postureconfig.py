"""`posture { }` of server.conf: how long nodes are trusted, and who hears when one is not."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final
from urllib.parse import urlsplit

from pydantic import Field

from spire_hw.config.hcl import Block, Body
from spire_hw.config.schema import GoDuration, Model, at_least, nearest, parsed
from spire_hw.errors import ConfigFault, InvalidInputError
from spire_hw.posture.reasons import DEFAULT_ACTIONS, NEVER_ACCEPTED
from spire_hw.posture.verdict import Action
from spire_hw.syslog import FACILITIES, SyslogSettings, parse_address, parse_facility

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_DEFAULT_INTERVAL: Final = timedelta(seconds=60)
_LEAST_INTERVAL: Final = timedelta(seconds=1)
_MOST_INTERVAL: Final = timedelta(hours=24)
_NONE: Final = timedelta(0)
_ACTIONS: Final = {
    "accept": Action.ACCEPT,
    "refuse": Action.REFUSE,
    "quarantine": Action.QUARANTINE,
    "ban": Action.BAN,
}
_STALE_ACTIONS: Final = {"alarm": Action.ACCEPT, "quarantine": Action.QUARANTINE}


@dataclass(frozen=True, slots=True)
class WebhookSettings:
    """Where state changes are posted to.

    Attributes:
        url: `https://`, or `http://` on this machine.
        secret_path: file with the secret of the HMAC; None for none.
        ca_path: PEM file with the authorities of the receiver; None for the system's.
    """

    url: str
    secret_path: Path | None = None
    ca_path: Path | None = None


@dataclass(frozen=True, slots=True)
class PostureSettings:
    """All of it, with defaults.

    Attributes:
        given: the block stands in the configuration.
        policy_dir: its `*.hcl` files are policies.
        require_policy: nodes are refused where there is no policy at all, too.
        heartbeat_interval: between heartbeats; None when there are none.
        stale_after: intervals without good evidence after which a node is stale.
        stale_action: ACCEPT raises an alarm, QUARANTINE takes the identity too.
        min_boot_time: a machine does not boot in less.
        evidence_retention: how long the history of nodes is kept.
        drift: actions that differ from `reasons.DEFAULT_ACTIONS`, by reason code.
    """

    given: bool = False
    policy_dir: Path | None = None
    require_policy: bool = False
    heartbeat_interval: timedelta | None = _DEFAULT_INTERVAL
    stale_after: int = 3
    stale_action: Action = Action.ACCEPT
    min_boot_time: timedelta = timedelta(seconds=8)
    evidence_retention: timedelta = timedelta(hours=2160)
    drift: Mapping[str, Action] = field(default_factory=dict)
    webhook: WebhookSettings | None = None
    syslog: SyslogSettings | None = None


def _stale_action(text: str) -> Action:
    if text not in _STALE_ACTIONS:
        raise InvalidInputError(f'"{text}" is none of {", ".join(_STALE_ACTIONS)}')
    return _STALE_ACTIONS[text]


def _web_address(text: str) -> str:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as e:
        raise InvalidInputError(f"not a URL: {e}") from e
    if not host or port == 0 or parts.scheme not in {"http", "https"} or parts.fragment:
        raise InvalidInputError("expected https://host[:port]/path")
    if parts.username is not None or parts.password is not None:
        raise InvalidInputError("credentials do not belong into a URL; use secret_path")
    if parts.scheme == "http" and not _is_local(host):
        raise InvalidInputError("http:// is for this machine alone; use https://")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidInputError("has characters that a URL cannot have")
    return text


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


DEFAULT_POSTURE: Final = PostureSettings()


class WebhookKeys(Model):
    """`webhook { }`."""

    url: Annotated[str, parsed(_web_address)]
    secret_path: str = ""
    ca_path: str = ""


class SyslogKeys(Model):
    """`syslog { }`."""

    address: Annotated[SyslogSettings, parsed(parse_address)]
    facility: Annotated[int, parsed(parse_facility)] = FACILITIES["auth"]


class PostureKeys(Model):
    """`posture { }`."""

    policy_dir: str = ""
    require_policy: bool = False
    heartbeat_interval: Annotated[GoDuration, at_least(_NONE)] = _DEFAULT_INTERVAL
    stale_after: Annotated[int, Field(ge=1, le=1000)] = 3
    stale_action: Annotated[Action, parsed(_stale_action)] = Action.ACCEPT
    min_boot_time: Annotated[GoDuration, at_least(_NONE)] = timedelta(seconds=8)
    evidence_retention: Annotated[GoDuration, at_least(timedelta(hours=1))] = timedelta(hours=2160)
    drift: Body = Body.empty()
    webhook: WebhookKeys | None = None
    syslog: SyslogKeys | None = None


def find_posture_faults(keys: PostureKeys) -> Iterator[ConfigFault]:
    """Return what the block's fields do not show by themselves."""
    interval = keys.heartbeat_interval
    if interval != _NONE and not _LEAST_INTERVAL <= interval <= _MOST_INTERVAL:
        text = '"heartbeat_interval": expected 0s (off), or 1s to 24h'
        yield ConfigFault(keys.line("heartbeat_interval"), text)
    for item in keys.drift.items:
        if isinstance(item, Block) or not isinstance(item.value, str):
            key = item.keys[0] if isinstance(item, Block) else item.key
            yield ConfigFault(item.line, f'"{key}": expected a reason code = "action"')
        elif item.key not in DEFAULT_ACTIONS:
            hint = nearest(item.key, DEFAULT_ACTIONS)
            yield ConfigFault(item.line, f'"{item.key}" is no reason code{hint}')
        elif item.value not in _ACTIONS:
            wanted = ", ".join(_ACTIONS)
            yield ConfigFault(item.line, f'"{item.key}": "{item.value}" is none of {wanted}')
        elif item.key in NEVER_ACCEPTED and _ACTIONS[item.value] is Action.ACCEPT:
            yield ConfigFault(item.line, f'"{item.key}" cannot be accepted')


def posture_settings(keys: PostureKeys | None) -> PostureSettings:
    """Return the settings of a block without faults; None stands for no block."""
    if keys is None:
        return DEFAULT_POSTURE
    drift = {i.key: _ACTIONS[str(i.value)] for i in keys.drift.items if not isinstance(i, Block)}
    hook, log = keys.webhook, keys.syslog
    return PostureSettings(
        given=True,
        policy_dir=_path(keys.policy_dir),
        require_policy=keys.require_policy,
        heartbeat_interval=keys.heartbeat_interval or None,
        stale_after=keys.stale_after,
        stale_action=keys.stale_action,
        min_boot_time=keys.min_boot_time,
        evidence_retention=keys.evidence_retention,
        drift=drift,
        webhook=None if hook is None else _webhook(hook),
        syslog=None if log is None else replace(log.address, facility=log.facility),
    )


def _webhook(keys: WebhookKeys) -> WebhookSettings:
    return WebhookSettings(keys.url, _path(keys.secret_path), _path(keys.ca_path))


def _path(text: str) -> Path | None:
    return Path(text) if text else None
