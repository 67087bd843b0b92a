"""Which token `init` puts into a configuration, where its PIN is, and what its service may touch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from spire_hw.cli.flags import F, flag
from spire_hw.cli.plan import check_plain
from spire_hw.errors import InvalidInputError, SpireHwError
from spire_hw.files import read_bounded
from spire_hw.pkcs11.pool.pin import FilePin
from spire_hw.pkcs11.pool.place import PinFrom
from spire_hw.pkcs11.survey import ModuleView, TokenView, find_modules, look_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.cli.plan import Answers, Plan
    from spire_hw.key import KeyType

_LIMIT_S: Final = 15.0
_NO_SERIAL: Final = frozenset("0")
_PIN_FLAGS: Final = {
    "user_pin_locked": "its user PIN is locked: unlock it first",
    "user_pin_final_try": "one more wrong PIN locks it: log in once by hand first",
    "user_pin_count_low": "wrong PINs were tried on it lately",
    "write_protected": "it is write-protected: no key can be made on it",
}
# By profile: what else the service has to reach.
_GROUPS: Final = {"softhsm": ("softhsm",), "tpm2": ("tss",)}
_WRITABLE: Final = {"softhsm": ("/var/lib/softhsm",), "tpm2": ("/etc/tpm2_pkcs11",)}
_DEVICES: Final = {"tpm2": ("/dev/tpmrm0",)}
_AFTER: Final = {"smartcard-hsm": ("pcscd.service",)}
_SOFTHSM_CONF: Final = "SOFTHSM2_CONF"
_SOFTHSM_TOKENS: Final = re.compile(r"^\s*directories\.tokendir\s*=\s*(\S+)\s*$", re.MULTILINE)
_MAX_CONF: Final = 64 * 1024
_ASKS_ITSELF: Final = "protected_authentication_path"
_PIN_LINES: Final = {
    PinFrom.FILE: '      pin_file     = "{}"',
    PinFrom.DEVICE: "      protected_login = true",
    PinFrom.TERMINAL: "      pin_prompt   = true",
}
_PIN_SOURCES: Final = {
    PinFrom.DEVICE: "the token's own key pad or reader, each time the program starts",
    PinFrom.FILE: "a file that only its owner reads",
    PinFrom.TERMINAL: "somebody at the terminal, each time the program starts",
}
_NOT_FITTING: Final = {
    "device": "will not do: the token has no key pad or reader of its own",
    "terminal": "will not do for a service, which has none (-unit=false for no service)",
}
_ON_THE_BUS: Final = frozenset({"generic", "yubihsm2", "luna", "nshield"})


@dataclass(frozen=True, slots=True)
class HsmFlags:
    """What the command line said about the token; "" where it said nothing."""

    module: str = ""
    token_label: str = ""
    token_serial: str = ""
    pin_from: str = ""
    pin_file: str = ""
    environment: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HsmChoice:
    """The token that was chosen.

    Attributes:
        profile: its profile's name.
        pin_from: where the PIN comes from.
        pin_file: where the PIN is kept, on the disk; "" where it comes from elsewhere.
        environment: what its module needs in its environment.
        folder: where SoftHSM keeps its tokens, when its configuration says so; else "".
    """

    module: str
    label: str
    serial: str
    profile: str
    pin_from: PinFrom
    pin_file: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: str = ""

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the groups a service that uses it needs."""
        return _GROUPS.get(self.profile, ())

    @property
    def writable(self) -> tuple[str, ...]:
        """Return the paths a service that uses it has to write to."""
        return (self.folder,) if self.folder else _WRITABLE.get(self.profile, ())

    @property
    def devices(self) -> tuple[str, ...]:
        """Return the device files a service that uses it needs."""
        return _DEVICES.get(self.profile, ())

    @property
    def is_on_the_bus(self) -> bool:
        """Tell whether it may be reached by device files nobody here knows."""
        return self.profile in _ON_THE_BUS

    @property
    def after(self) -> tuple[str, ...]:
        """Return the units that have to run first."""
        return _AFTER.get(self.profile, ())

    def plugin(self, pin_file: str) -> str:
        """Return the KeyManager block; pin_file is where the service finds the PIN."""
        lines = [
            '  KeyManager "pkcs11" {',
            "    plugin_data {",
            f'      module_path  = "{self.module}"',
            f'      token_label  = "{self.label}"',
        ]
        if set(self.serial) - _NO_SERIAL:
            lines.append(f'      token_serial = "{self.serial}"')
        lines.append(_PIN_LINES[self.pin_from].format(pin_file))
        lines.append(f'      profile      = "{self.profile}"')
        if self.environment:
            given = " ".join(f'{name} = "{value}"' for name, value in self.environment.items())
            lines.append(f"      environment {{ {given} }}")
        return "\n".join([*lines, "    }", "  }"])


def hsm_flags(command: F) -> F:
    """Add the flags that choose a token; the command gets the fields of `HsmFlags`."""
    text = "Have systemd hand the PIN file over as a credential, so that only root can read it."
    made = flag("pinCredential", text, type=bool, default=True)(command)
    text = "NAME=value that the module needs in its environment, such as SOFTHSM2_CONF=PATH."
    made = flag("environment", text, repeated=True)(made)
    text = "Where the PIN comes from: file, device (key pad or reader of the token) or terminal."
    made = flag("pinFrom", text, default="")(made)
    made = flag("pinFile", "File with the token's user PIN.", default="")(made)
    made = flag("tokenSerial", "Serial number of the token.", default="")(made)
    made = flag("tokenLabel", "Label of the token.", default="")(made)
    return flag("module", "Path of the PKCS#11 module.", default="")(made)


def choose_hsm(
    given: HsmFlags,
    answers: Answers,
    plan: Plan,
    *,
    key_type: KeyType,
    default_pin: Path,
    is_service: bool,
) -> HsmChoice:
    """Return the token; what is doubtful about it goes into the plan.

    Args:
        given: what the command line said.
        answers: for the rest.
        plan: gets doubts, choices and steps.
        key_type: of the keys that will be made.
        default_pin: where the PIN is kept unless somebody says otherwise.
        is_service: the program is started by systemd, which has no terminal.

    Raises:
        UsageError: it is not clear which is meant.
    """
    environment = _environment(given.environment)
    modules = [given.module] if given.module else find_modules()
    views = look_at(modules, {**os.environ, **environment}, _LIMIT_S)
    found = _matching(views, given)
    if not found:
        module, token = _unseen(views, given, plan), None
    else:
        module, token = _pick(found, answers)
    label = given.token_label if token is None else token.label
    serial = given.token_serial if token is None else token.serial
    for value in (module, label, serial):
        _plain(value)
    profile = "generic" if token is None else token.profile
    if token is not None:
        _check_token(token, key_type, plan)
    pin_from = _pin_from(given, answers, token, is_service=is_service)
    pin = ""
    if pin_from is PinFrom.FILE:
        text = "File with the token's user PIN"
        pin = answers.text("pinFile", given.pin_file, text, default=str(default_pin))
        _check_pin(pin, plan)
    else:
        plan.choices.append(f"the PIN is kept nowhere: it comes from {_PIN_SOURCES[pin_from]}")
    folder = _token_folder(environment) if profile == "softhsm" else ""
    choice = HsmChoice(module, label, serial, profile, pin_from, pin, environment, folder)
    plan.choices.append(
        f'keys are made in token "{label}" and never leave it (profile {profile}); '
        "it is chosen by label and serial number, since slot numbers change"
    )
    return choice


def _environment(given: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in given:
        name, has_value, value = text.partition("=")
        if not has_value or not name.isidentifier():
            raise click.UsageError(f"-environment {text}: NAME=value is expected")
        _plain(value)
        found[name] = value
    return found


def _token_folder(environment: Mapping[str, str]) -> str:
    """Return where SoftHSM keeps its tokens by the configuration that was named, "" for none."""
    file = environment.get(_SOFTHSM_CONF)
    if file is None:
        return ""
    try:
        text = read_bounded(Path(file), _MAX_CONF).decode("utf-8", "replace")
    except SpireHwError:
        return ""  # the module itself could not be used either, and that is told
    found = _SOFTHSM_TOKENS.search(text)
    if found is None:
        return ""
    _plain(found[1])
    return found[1]


def _plain(value: str) -> None:
    try:
        check_plain(value)
    except InvalidInputError as e:
        raise click.UsageError(f"{value}: {e.message}") from e


def _matching(views: list[ModuleView], given: HsmFlags) -> list[tuple[str, TokenView]]:
    return [
        (view.path, token)
        for view in views
        for token in view.tokens
        if given.token_label in {"", token.label} and given.token_serial in {"", token.serial}
    ]


def _pick(found: list[tuple[str, TokenView]], answers: Answers) -> tuple[str, TokenView]:
    # One token may be seen through several modules.
    options = [(token.serial, f'"{token.label}" in {module}') for module, token in found]
    return found[answers.pick("tokenSerial", "Which token holds the keys", options)]


def _unseen(views: list[ModuleView], given: HsmFlags, plan: Plan) -> str:
    problems = "; ".join(f"{view.path}: {view.problem}" for view in views if view.problem)
    why = f" ({problems})" if problems else ""
    if not given.module or not (given.token_label or given.token_serial):
        wanted = " ".join(
            word
            for word in (
                given.token_label and f'labelled "{given.token_label}"',
                given.token_serial and f"with serial {given.token_serial}",
            )
            if word
        )
        seen = [f'"{t.label}" serial {t.serial}' for view in views for t in view.tokens]
        if seen:
            raise click.UsageError(
                f"no token {wanted} was found; there is {', '.join(seen)}: name one of these, or "
                "-module as well for a token that will be there"
            )
        raise click.UsageError(
            f"no initialised token was found{why}; initialise one with its maker's tool, or name "
            "-module and -tokenLabel of one that will be there"
        )
    plan.doubts.append(f"the token is not there yet, nothing about it was checked{why}")
    return given.module


def _pin_from(
    given: HsmFlags, answers: Answers, token: TokenView | None, *, is_service: bool
) -> PinFrom:
    """Return where the PIN comes from; asked for where the token can be given it by hand."""
    asks_itself = token is not None and _ASKS_ITSELF in token.flags
    fitting = [
        source
        for source in _PIN_SOURCES
        if (source is not PinFrom.DEVICE or asks_itself or token is None)
        and (source is not PinFrom.TERMINAL or not is_service)
    ]
    if not given.pin_from:
        if given.pin_file or not asks_itself or not answers.may_ask:
            return PinFrom.FILE
        options = [(source.value, _PIN_SOURCES[source]) for source in fitting]
        return PinFrom(answers.choice("pinFrom", "", "Where does the PIN come from", options))
    known = {source.value: source for source in fitting}
    chosen = known.get(given.pin_from)
    if chosen is None:
        why = _NOT_FITTING.get(given.pin_from, "is not known")
        raise click.UsageError(f"-pinFrom {given.pin_from} {why}; it is one of {', '.join(known)}")
    if given.pin_file and chosen is not PinFrom.FILE:
        raise click.UsageError(f"-pinFile and -pinFrom {given.pin_from} exclude each other")
    return chosen


def _check_token(token: TokenView, key_type: KeyType, plan: Plan) -> None:
    plan.doubts += [
        f'token "{token.label}": {words}'
        for name, words in _PIN_FLAGS.items()
        if name in token.flags
    ]
    if key_type not in token.key_types:
        made = ", ".join(t.config_name for t in token.key_types) or "none of ours"
        raise click.UsageError(
            f'token "{token.label}" makes no {key_type.config_name} keys; it makes {made}'
        )


def _check_pin(path: str, plan: Plan) -> None:
    try:
        if not Path(path).is_absolute():
            raise click.UsageError("-pinFile: the path has to be absolute")
        FilePin(Path(path)).read()
    except SpireHwError as e:
        plan.doubts.append(e.message)
        plan.steps.append(f"put the PIN there: install -D -m 0600 /dev/stdin {path}")
