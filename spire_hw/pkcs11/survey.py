"""Which PKCS#11 modules are on this machine, and what do they show?

Modules are found by where makers install them and by p11-kit's module files; `surveyor` looks at
each in a process of its own, within a time. Nobody logs in and no PIN is read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import EncodingError, InvalidInputError, SpireHwError
from spire_hw.files import read_bounded
from spire_hw.key import KeyType
from spire_hw.pkcs11.keys import is_ec, mechanisms_for, modulus_bits
from spire_hw.pkcs11.memory import Memory
from spire_hw.pkcs11.module import check_module_path
from spire_hw.pkcs11.profile import PROFILES, detect

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_LIBRARIES: Final = ("/usr/lib", "/usr/lib64", "/usr/local/lib")
_TRIPLETS: Final = ("x86_64-linux-gnu", "aarch64-linux-gnu")
# Below each library directory, with and without the machine's triplet.
_NAMES: Final = (
    "softhsm/libsofthsm2.so",
    "pkcs11/libsofthsm2.so",
    "pkcs11/libtpm2_pkcs11.so",
    "pkcs11/opensc-pkcs11.so",
    "opensc-pkcs11.so",
    "pkcs11/yubihsm_pkcs11.so",
    "libsc-hsm-pkcs11.so",
    "libykcs11.so",
    "libkmsp11.so",
    "pkcs11/p11-kit-client.so",
)
_ELSEWHERE: Final = (
    "/opt/cloudhsm/lib/libcloudhsm_pkcs11.so",
    "/opt/nfast/toolkits/pkcs11/libcknfast.so",
    "/usr/safenet/lunaclient/lib/libCryptoki2_64.so",
    "/usr/lib/libCryptoki2_64.so",
    "/opt/aws-kms-pkcs11/aws_kms_pkcs11.so",
    "/usr/local/lib/libkmsp11.so",
)
P11_KIT_FOLDERS: Final = (
    Path("/usr/share/p11-kit/modules"),
    Path("/etc/pkcs11/modules"),
)
# Certificates, wrappers and tracers: nothing to keep keys in.
_NO_TOKENS: Final = ("p11-kit-trust", "p11-kit-proxy", "pkcs11-spy")
_MAX_MODULE_FILE: Final = 64 << 10
_MAX_ANSWER: Final = 4 << 20
_AT_ONCE: Final = 4
_COMMAND: Final = (sys.executable, "-P", "-m", "spire_hw.pkcs11.device.surveyor")


@dataclass(frozen=True, slots=True)
class TokenView:
    """A token as its module shows it to everybody.

    Attributes:
        flags: words for the flags that are set, such as `user_pin_locked`.
        mechanisms: CKM numbers.
        profile: name of the profile its own words choose.
        memory: how much room it says that it has.
    """

    label: str
    serial: str
    manufacturer: str
    model: str
    flags: tuple[str, ...]
    mechanisms: tuple[int, ...]
    profile: str
    memory: Memory = field(default_factory=Memory)

    @property
    def is_initialized(self) -> bool:
        """Tell whether it can be logged in to at all."""
        return {"initialized", "user_pin_set"} <= set(self.flags)

    @property
    def key_types(self) -> list[KeyType]:
        """Return the key types it makes and signs with."""
        profile, have = PROFILES[self.profile], set(self.mechanisms)
        return [
            t
            for t in KeyType
            if set(mechanisms_for(t)) <= have
            and (is_ec(t) or modulus_bits(t) <= profile.max_rsa_bits)
        ]


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot; token is None when it is empty, problem says why its token cannot be looked at."""

    number: int
    description: str
    token: TokenView | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ModuleView:
    """A module.

    Attributes:
        path: where it is.
        library: manufacturer, description, version and cryptoki, as it says.
        problem: why it shows nothing; "" when it was looked at.
    """

    path: str
    library: Mapping[str, str] = field(default_factory=dict)
    slots: tuple[SlotView, ...] = ()
    problem: str = ""

    @property
    def tokens(self) -> list[TokenView]:
        """Return the tokens that are initialised."""
        return [s.token for s in self.slots if s.token is not None and s.token.is_initialized]


def find_modules(root: Path = Path("/"), folders: Iterable[Path] = P11_KIT_FOLDERS) -> list[str]:
    """Return the paths of modules on this machine; one file has one path.

    Args:
        root: what the known places are below.
        folders: where p11-kit's module files are.
    """
    places = [f"{lib}/{name}" for lib in _LIBRARIES for name in _NAMES]
    places += [f"/usr/lib/{t}/{name}" for t in _TRIPLETS for name in _NAMES]
    places += _ELSEWHERE
    found = [root / place.lstrip("/") for place in places]
    found += _configured(folders)
    by_file: dict[Path, str] = {}
    for path in found:
        if path.is_file() and not any(name in path.name for name in _NO_TOKENS):
            by_file.setdefault(path.resolve(), str(path))
    return list(by_file.values())


def _configured(folders: Iterable[Path]) -> list[Path]:
    """Return the modules that p11-kit's module files name (pkcs11.conf(5))."""
    found = []
    for file in sorted(f for folder in folders for f in folder.glob("*.module")):
        try:
            text = read_bounded(file, _MAX_MODULE_FILE, "p11-kit module file").decode()
        except (SpireHwError, UnicodeDecodeError):
            continue  # nobody can use it, so there is nothing to look at
        for line in text.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "module" and value.strip():
                found += _resolved(Path(value.strip()))
    return found


def _resolved(module: Path) -> list[Path]:
    if module.is_absolute():
        return [module]
    below = [Path(lib) / "pkcs11" for lib in _LIBRARIES]
    return [
        *(folder / module for folder in below),
        *(Path("/usr/lib") / t / "pkcs11" / module for t in _TRIPLETS),
    ]


def look_at(
    modules: Sequence[str], environment: Mapping[str, str], limit_s: float
) -> list[ModuleView]:
    """Look at modules, several at once, and return what each shows.

    Args:
        modules: their paths.
        environment: the whole environment of the processes that load them.
        limit_s: seconds for each.
    """
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="survey") as pool:
        return list(pool.map(lambda path: _look_at(path, environment, limit_s), modules))


def _look_at(path: str, environment: Mapping[str, str], limit_s: float) -> ModuleView:
    try:
        resolved = check_module_path(path)
    except SpireHwError as e:
        return ModuleView(path, problem=e.message)
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        [*_COMMAND, str(os.getpid()), resolved],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(environment),
        cwd="/",
        start_new_session=True,
    )
    try:
        answer, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return ModuleView(path, problem=f"hung: no answer within {limit_s:g} s")
    finally:
        _end(process)
    if process.returncode != 0:
        how = -process.returncode if process.returncode < 0 else process.returncode
        word = "signal" if process.returncode < 0 else "exit"
        return ModuleView(path, problem=f"crashed when it was loaded ({word} {how})")
    try:
        return _view(path, answer)
    except (EncodingError, KeyError, TypeError, ValueError, AttributeError):
        return ModuleView(path, problem="talks nonsense")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    if process.stdout is not None:
        process.stdout.close()
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        # The device holds it in a call that cannot be interrupted; it dies when that returns.
        return


def _view(path: str, answer: bytes) -> ModuleView:
    if len(answer) > _MAX_ANSWER:
        raise EncodingError("survey", f"{len(answer)} bytes are too many")
    fields: dict[str, Any] = json.loads(answer)
    problem = str(fields.get("problem", ""))
    library = {str(name): str(value) for name, value in fields.get("library", {}).items()}
    slots = tuple(_slot(slot) for slot in fields.get("slots", ()))
    return ModuleView(path, library, slots, problem)


def _slot(fields: Mapping[str, Any]) -> SlotView:
    token = fields.get("token")
    return SlotView(
        int(fields["id"]),
        str(fields["description"]),
        None if token is None else _token(token),
        str(fields.get("problem", "")),
    )


def _token(fields: Mapping[str, Any]) -> TokenView:
    return TokenView(
        label=str(fields["label"]),
        serial=str(fields["serial"]),
        manufacturer=str(fields["manufacturer"]),
        model=str(fields["model"]),
        flags=tuple(str(flag) for flag in fields["flags"]),
        mechanisms=tuple(int(number) for number in fields["mechanisms"]),
        profile=detect(str(word) for word in fields["words"]),
        memory=Memory.read(fields.get("memory")),
    )


def token_of(
    views: Iterable[ModuleView], label: str | None, serial: str | None
) -> list[tuple[ModuleView, TokenView]]:
    """Return the initialised tokens with a label and a serial number, each where it is given.

    Raises:
        InvalidInputError: neither was given.
    """
    if label is None and serial is None:
        raise InvalidInputError("a token is chosen by label, serial number or both")
    return [
        (view, token)
        for view in views
        for token in view.tokens
        if label in {None, token.label} and serial in {None, token.serial}
    ]
