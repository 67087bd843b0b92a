"""`pkcs11 list`: the HSM modules of this machine, their tokens and what they can do."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import timedelta
from typing import Any, Final

import click

from spire_hw.cli.flags import DURATION, GoCommand, GoGroup, flag
from spire_hw.cli.output import Printer, output_flags, table
from spire_hw.cli.run import ExitCode
from spire_hw.pkcs11.keys import MECHANISM_NAMES
from spire_hw.pkcs11.survey import ModuleView, SlotView, TokenView, find_modules, look_at

_WIDTH: Final = 16
DEFAULT_LIMIT: Final = timedelta(seconds=10)


def pkcs11_group(program: str) -> click.Group:
    """Return the group `pkcs11` of a program."""

    @click.pass_context
    def list_modules(
        ctx: click.Context,
        /,
        module: tuple[str, ...],
        *,
        timeout: timedelta,
        mechanisms: bool,
        output: str,
        field: str,
    ) -> None:
        views = look_at(module or find_modules(), os.environ, timeout.total_seconds())
        printer = Printer(as_json=output == "json", field=field)
        values = {"modules": [_module(view) for view in views]}
        printer.value(values, lambda: _show(views, with_mechanisms=mechanisms))
        # Nothing found on a machine is an answer; a module that was asked for by name is another.
        ctx.exit(ExitCode.UNREACHABLE if module and any(v.problem for v in views) else 0)

    made = output_flags(list_modules)
    made = flag("mechanisms", "Show every mechanism number.", type=bool, default=False)(made)
    text = "How long a module may take; one that hangs is given up."
    made = flag("timeout", text, type=DURATION, default=DEFAULT_LIMIT)(made)
    text = "Path of a module to look at instead of those that are found."
    made = flag("module", text, repeated=True)(made)
    command = click.command(
        "list",
        cls=GoCommand,
        help="List PKCS#11 modules, their slots and tokens. Each is loaded in a process of its own "
        "and nobody logs in.",
        examples=f"{program} pkcs11 list\n"
        f"{program} pkcs11 list -module /usr/lib/softhsm/libsofthsm2.so -output json",
    )(made)
    group = GoGroup("pkcs11", help="PKCS#11 modules and tokens of this machine.")
    group.add_command(command)
    return group


def _module(view: ModuleView) -> dict[str, Any]:
    return {
        "path": view.path,
        "library": dict(view.library),
        "problem": view.problem,
        "slots": [_slot(slot) for slot in view.slots],
    }


def _slot(slot: SlotView) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": slot.number,
        "description": slot.description,
        "problem": slot.problem,
        "token": None,
    }
    if slot.token is not None:
        shown["token"] = {**asdict(slot.token), "key_types": _key_types(slot.token)}
    return shown


def _key_types(token: TokenView) -> list[str]:
    return [key_type.config_name for key_type in token.key_types]


def _show(views: list[ModuleView], *, with_mechanisms: bool) -> None:
    if not views:
        click.echo("No PKCS#11 module was found; name one with -module.")
    for view in views:
        library = view.library
        rows = [("Module", view.path)]
        if view.problem:
            rows.append(("Problem", view.problem))
        else:
            name = f"{library.get('description', '')} {library.get('version', '')}"
            rows.append(("Library", f"{name} ({library.get('manufacturer', '')})"))
        click.echo(table(rows, _WIDTH), nl=False)
        for slot in view.slots:
            _show_slot(slot, with_mechanisms=with_mechanisms)
        if not view.problem and not view.slots:
            click.echo("  no slots")
        click.echo()


def _show_slot(slot: SlotView, *, with_mechanisms: bool) -> None:
    token = slot.token
    if token is None:
        click.echo(table([(f"  Slot {slot.number}", slot.problem or "no token")], _WIDTH), nl=False)
        return
    if not token.is_initialized:
        state = "not initialised" if "initialized" not in token.flags else "user PIN is not set"
        click.echo(table([(f"  Slot {slot.number}", state)], _WIDTH), nl=False)
        return
    rows = [
        ("  Token", f'"{token.label}" serial {token.serial}'),
        ("  Made by", f"{token.manufacturer} {token.model} (profile {token.profile})"),
        ("  Keys", ", ".join(_key_types(token)) or "none that are usable here"),
    ]
    noted = [word for word in token.flags if word not in {"initialized", "user_pin_set"}]
    if noted:
        rows.append(("  Flags", ", ".join(noted)))
    if with_mechanisms:
        names = [MECHANISM_NAMES.get(number, f"0x{number:x}") for number in token.mechanisms]
        rows.append(("  Mechanisms", ", ".join(names)))
    click.echo(table(rows, _WIDTH), nl=False)
