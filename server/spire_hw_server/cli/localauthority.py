"""The authorities this server signs with, rotated by hand after a compromise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw._pb import hw_keys_pb2 as keys_pb
from spire_hw._pb import server_localauthority_pb2 as pb
from spire_hw.cli.flags import F, GoCommand, GoGroup, flag
from spire_hw.cli.output import go_time, shown, to_dict
from spire_hw_server.cli.connect import admin_flags

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.cli.admin import Admin, Session

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["LocalAuthority"]
_KEYS: Final = keys_pb.DESCRIPTOR.services_by_name["Keys"]
_SLOTS: Final = ("active", "prepared", "old")


@dataclass(frozen=True, slots=True)
class _Kind:
    """One kind of authority.

    Attributes:
        name: its group of commands.
        rpc: in the names of methods and messages.
        title: in sentences.
        has_upstream: another authority may have signed it.
    """

    name: str
    rpc: str
    title: str
    has_upstream: bool

    def request(self, verb: str, **fields: str) -> Any:
        """Return the request message of a method."""
        return getattr(pb, f"{verb}{self.rpc}AuthorityRequest")(**fields)


_KINDS: Final = (_Kind("x509", "X509", "X.509", True), _Kind("jwt", "JWT", "JWT", False))


def _state_text(state: pb.AuthorityState, kind: _Kind) -> str:
    lines = [
        f"  Authority ID: {shown(state.authority_id)}",
        f"  Expires at: {go_time(state.expires_at, utc=True)}",
    ]
    upstream = state.upstream_authority_subject_key_id
    if kind.has_upstream and upstream:
        lines.append(f"  Upstream authority Subject Key ID: {shown(upstream)}")
    elif kind.has_upstream:
        lines.append("  Upstream authority ID: No upstream authority")
    return "\n".join(lines)


async def _keys_of(session: Session) -> dict[str, keys_pb.Key]:
    """Return the keys of authorities by authority ID."""
    answer = await session.call(_KEYS, "ListKeys", keys_pb.ListKeysRequest())
    return {key.authority.id: key for key in answer.keys if key.HasField("authority")}


def _custody_text(key: keys_pb.Key | None) -> str:
    if key is None:
        return ""
    lines = [f"Custody: {shown(key.custody)}", f"Key: {shown(key.id)} in {shown(key.location)}"]
    return "".join(f"\n  {line}" for line in lines)


def _custody_values(key: keys_pb.Key) -> dict[str, str]:
    return {
        "custody": key.custody,
        "key_id": key.id,
        "fingerprint": key.fingerprint,
        "location": key.location,
    }


def _show_command(kind: _Kind) -> click.Command:
    def show(admin: Admin, *, custody: bool) -> None:
        request = getattr(pb, f"Get{kind.rpc}AuthorityStateRequest")()

        async def work(session: Session) -> tuple[Any, dict[str, keys_pb.Key]]:
            answer = await session.call(_SERVICE, f"Get{kind.rpc}AuthorityState", request)
            return answer, await _keys_of(session) if custody else {}

        answer, keys = admin.run(work)

        def pretty() -> None:
            parts = []
            for slot in _SLOTS:
                text = f"  No {slot} {kind.title} authority found"
                if answer.HasField(slot):
                    state = getattr(answer, slot)
                    text = _state_text(state, kind) + _custody_text(keys.get(state.authority_id))
                parts.append(f"{slot.capitalize()} {kind.title} authority:\n{text}")
            click.echo("\n\n".join(parts))

        values = to_dict(answer)
        for slot in _SLOTS:
            key = keys.get(getattr(answer, slot).authority_id)
            if custody and answer.HasField(slot):
                values[slot]["custody"] = None if key is None else _custody_values(key)
        admin.printer.value(values, pretty)

    return click.command(
        "show",
        cls=GoCommand,
        help=f"Show the local {kind.title} authorities: active, prepared and old.",
        examples=f"""
        spire-hw-server localauthority {kind.name} show
        spire-hw-server localauthority {kind.name} show -custody
        """,
    )(
        flag("custody", "Show where the keys are, and who says so.", type=bool, default=False)(
            admin_flags(show)
        )
    )


def _change_command(kind: _Kind, verb: str, field: str, text: str) -> click.Command:
    """Return a command that changes one authority.

    Args:
        kind: of authority.
        verb: the command, such as `taint`.
        field: of the response; it begins with the participle that heads the answer.
        text: help.
    """
    title = field.partition("_")[0].capitalize()

    def change(admin: Admin, authority_id: str | None = None) -> None:
        fields = {}
        if authority_id is not None:
            if not authority_id:
                raise click.UsageError("an authority ID is required (-authorityID)")
            fields = {"authority_id": authority_id}
        request = kind.request(verb.capitalize(), **fields)
        answer = admin.call(_SERVICE, f"{verb.capitalize()}{kind.rpc}Authority", request)
        state = _state_text(getattr(answer, field), kind)
        admin.printer.message(
            answer, lambda: click.echo(f"{title} {kind.title} authority:\n{state}")
        )

    call = f"spire-hw-server localauthority {kind.name} {verb}"
    return click.command(
        verb,
        cls=GoCommand,
        help=text,
        examples=call if verb == "prepare" else f"{call} -authorityID 2f0e...c41",
    )(_flags_of(verb, kind)(change))


def _flags_of(verb: str, kind: _Kind) -> Callable[[F], F]:
    def add(command: F) -> F:
        made = admin_flags(command)
        if verb == "prepare":
            return made
        return flag("authorityID", f"ID of the {kind.title} authority to {verb}.", default="")(made)

    return add


def _kind_group(kind: _Kind) -> GoGroup:
    made = GoGroup(kind.name, help=f"The {kind.title} authorities of this server.")
    made.add_command(_show_command(kind))
    for verb, field, text in (
        ("prepare", "prepared_authority", "Make the next {} authority and publish it."),
        ("activate", "activated_authority", "Let the prepared {} authority sign."),
        (
            "taint",
            "tainted_authority",
            "Mark the old {} authority as compromised: what it signed is replaced everywhere.",
        ),
        (
            "revoke",
            "revoked_authority",
            "Take the tainted {} authority out of the bundle: nobody believes it any more.",
        ),
    ):
        made.add_command(_change_command(kind, verb, field, text.format(kind.title)))
    return made


group = GoGroup("localauthority", help="The authorities this server signs with.")
for _one in _KINDS:
    group.add_command(_kind_group(_one))
