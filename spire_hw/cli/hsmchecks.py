"""Checks of a PKCS#11 token for `doctor`: module, token, its flags, its PIN's source, a login if asked.

A token counts wrong PINs, so its flags are looked at first, without any login; one login is made
when the operator says so and nothing speaks against it.
"""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.cli.findings import Finding, ok, problem, warning
from spire_hw.config.hcl import Block, Body
from spire_hw.config.schema import check
from spire_hw.errors import SpireHwError
from spire_hw.pkcs11.memory import Memory
from spire_hw.pkcs11.pool.place import (
    Faults,
    PinFrom,
    Pins,
    Place,
    TokenConfig,
    opening_of,
    place_of,
)
from spire_hw.pkcs11.profile import Profile, ProfileChoice
from spire_hw.pkcs11.survey import ModuleView, TokenView, look_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    from spire_hw.key import KeyType

_LIMIT_S: Final = 15.0
_FIELDS: Final = frozenset(TokenConfig.model_fields)
_CREDENTIALS: Final = Path("/run/credentials")
_FLAGS: Final = {
    "user_pin_locked": (
        problem,
        "its user PIN is locked",
        "unlock it with the security officer's PIN (for a TPM: tpm2_dictionarylockout -c)",
    ),
    "user_pin_final_try": (
        problem,
        "the next wrong PIN locks it; nobody logs in on its own now",
        "log in once by hand with the right PIN",
    ),
    "user_pin_count_low": (
        warning,
        "a wrong PIN was tried since the last login",
        "see that the PIN file holds the right one before the next start",
    ),
    "write_protected": (
        warning,
        "it is write-protected: keys cannot be replaced",
        "take the protection away before the CA's keys are due",
    ),
}


def check_hsm(
    title: str,
    data: Body,
    *,
    key_types: Iterable[KeyType] = (),
    user: int | None = None,
    login: bool = False,
) -> list[Finding]:
    """Return what is found at the tokens of a block.

    Args:
        title: how messages name the block, such as `keymanager(pkcs11)`.
        data: its plugin_data.
        key_types: types of the keys that will be made.
        user: whose rights the program has, None when nobody knows yet.
        login: log in once.
    """
    named = [b for b in data.blocks("token") if len(b.keys) > 1]
    if not named:
        return _check_one(title, data, key_types, user, login=login)
    return [
        finding
        for block in named
        for finding in _check_one(
            f"{title} token {block.keys[1]}", block.body, key_types, user, login=login
        )
    ]


def _check_one(
    title: str, data: Body, key_types: Iterable[KeyType], user: int | None, *, login: bool
) -> list[Finding]:
    place = _place(data)
    if place is None:
        return []  # faults of the configuration are told by the check of the whole
    (view,) = look_at([place.module], {**os.environ, **place.environment}, _LIMIT_S)
    findings = [*check_pin(title, place, user)]
    if view.problem:
        remedy = "install it, correct module_path, or see to its device, service and environment"
        text = f"{title}: module {place.module}: {view.problem}"
        return [*findings, problem("hsm.module", text, remedy)]
    tokens = _matching(view, place)
    if len(tokens) != 1:
        return [*findings, _none_or_many(title, view, tokens)]
    (token,) = tokens
    if not _profile(place, token).tells_memory:
        token = replace(token, memory=Memory())
    found = check_token(title, token, key_types)
    findings += found
    if place.pin_from is PinFrom.DEVICE and "protected_authentication_path" not in token.flags:
        text = f"{title}: protected_login is set, and the token has no key pad or reader of its own"
        findings.append(problem("hsm.no_protected_login", text, "set pin_file in its place"))
    elif login:
        # `user_pin_locked` and `user_pin_final_try` are problems; others do not endanger the token.
        if {"user_pin_locked", "user_pin_final_try"} & set(token.flags):
            text = f"{title}: no login was made: it would put the token at risk"
            findings.append(warning("hsm.login_skipped", text, "see the finding about its PIN"))
        elif place.pin_from is PinFrom.DEVICE:
            text = f"{title}: no login was made: somebody would have to enter the PIN at the device"
            findings.append(warning("hsm.login_skipped", text, "the program asks when it starts"))
        else:
            findings.append(_log_in(title, place))
    return findings


def _place(data: Body) -> Place | None:
    items = tuple(
        item
        for item in data.items
        if (item.keys[0] if isinstance(item, Block) else item.key) in _FIELDS
    )
    config, faults = check(Body(items, data.line, data.file), TokenConfig)
    return None if config is None or faults else place_of(config, Faults(config), with_key=True)


def _profile(place: Place, token: TokenView) -> Profile:
    given = place.token["profile"]
    choice = ProfileChoice.from_dict(given) if isinstance(given, dict) else ProfileChoice()
    return replace(choice, name=choice.name or token.profile).resolve(())


def _matching(view: ModuleView, place: Place) -> list[TokenView]:
    label, serial = place.token["label"], place.token["serial"]
    return [t for t in view.tokens if label in {None, t.label} and serial in {None, t.serial}]


def _none_or_many(title: str, view: ModuleView, tokens: list[TokenView]) -> Finding:
    seen = ", ".join(f'"{t.label}" serial {t.serial}' for t in tokens or view.tokens) or "none"
    if tokens:
        text = f"{title}: several tokens fit: {seen}"
        return problem("hsm.token_ambiguous", text, "set token_serial")
    text = f"{title}: the token is not there; tokens seen: {seen}"
    return problem(
        "hsm.token_missing",
        text,
        "connect it, initialise it, or correct token_label and token_serial; "
        "`spire-hw-server pkcs11 list` shows what there is",
    )


def check_token(title: str, token: TokenView, key_types: Iterable[KeyType]) -> list[Finding]:
    """Return what a token's flags and mechanisms say."""
    name = f'{title}: token "{token.label}" serial {token.serial}'
    findings = [
        level(f"hsm.{flag}", f"{name}: {words}", remedy)
        for flag, (level, words, remedy) in _FLAGS.items()
        if flag in token.flags
    ]
    wanted = list(key_types)
    missing = [t.config_name for t in wanted if t not in token.key_types]
    if missing:
        made = ", ".join(t.config_name for t in token.key_types) or "none of ours"
        text = f"{name} makes no {', '.join(missing)} keys; it makes {made}"
        findings.append(problem("hsm.key_types", text, "set another ca_key_type, or use its token"))
    if token.memory.is_short(wanted):
        text = f"{name} says that it has {token.memory.words} left: room for a few keys at most"
        remedy = (
            "make room on it, or set tells_memory = false in profile_overrides if that is wrong"
        )
        findings.append(warning("hsm.nearly_full", text, remedy))
    return findings or [ok("hsm.token", f"{name} is there (profile {token.profile})")]


def check_pin(title: str, place: Place, user: int | None) -> list[Finding]:
    """Return whether the PIN's source can be used; the PIN goes nowhere."""
    match place.pin_from:
        case PinFrom.DEVICE:
            return [ok("hsm.pin_source", f"{title}: the PIN is entered at the device")]
        case PinFrom.TERMINAL:
            text = f"{title}: the PIN is asked for at the terminal when the program starts"
            return [
                warning("hsm.pin_unseen", text, "use pin_file for a service: it has no terminal")
            ]
        case PinFrom.ENVIRONMENT:
            text = f"{title}: the PIN comes from variable {place.pin_name}, which only the program sees"
            return [warning("hsm.pin_unseen", text, "use pin_file: it can be checked and changed")]
        case PinFrom.FILE:
            return _check_pin_file(title, Path(place.pin_name), user)


def _check_pin_file(title: str, path: Path, user: int | None) -> list[Finding]:
    if path.is_relative_to(_CREDENTIALS) and not path.exists():
        unit = path.parent.name
        text = f"{title}: {path} is there while {unit} runs"
        return [warning("hsm.pin_unseen", text, f"see LoadCredential= in {unit}, and start it")]
    try:
        status = path.stat()
    except OSError as e:
        text = f"{title}: PIN file {path}: {e.strerror}"
        return [problem("hsm.pin_source", text, f"install -D -m 0600 /dev/stdin {path}")]
    fault = _pin_fault(path, status, user)
    if fault is not None:
        words, remedy = fault
        return [problem("hsm.pin_source", f"{title}: PIN file {path} {words}", remedy)]
    return [ok("hsm.pin_source", f"{title}: PIN file {path} is kept to its owner")]


def _pin_fault(path: Path, status: os.stat_result, user: int | None) -> tuple[str, str] | None:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file", "put a file there"
    # systemd lets the service read its credential by an access list, shown as the group's rights.
    is_credential = path.is_relative_to(_CREDENTIALS)
    allowed = stat.S_IRGRP if is_credential else 0
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) & ~allowed:
        mode = stat.S_IMODE(status.st_mode)
        return f"has mode {mode:04o}: others may read it", f"chmod 0600 {path}; think of a new PIN"
    if user not in {None, 0, status.st_uid} and not is_credential:
        words = f"belongs to user {status.st_uid}, the program is user {user}"
        return words, f"chown {user} {path}, or have systemd hand it over (LoadCredential=)"
    if status.st_size == 0:
        return "is empty", "put the token's user PIN into it"
    return None


def _log_in(title: str, place: Place) -> Finding:
    async def once() -> str:
        opening = await opening_of(place, Pins().guard(place))
        worker, facts = await opening.start("doctor")
        await worker.close()
        return facts.device

    try:
        device = asyncio.run(once())
    except SpireHwError as e:
        return problem("hsm.login", f"{title}: {e.message}", "correct it before the next start")
    return ok("hsm.login", f"{title}: logged in to {device}")
