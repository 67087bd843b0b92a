"""Policies as text: read, checked as a whole, and made one piece with the files they refer to.

A text holds one `policy "NAME" { }`. Beside it, `file "NAME" { }` blocks may hold the files that
its lists refer to as `"@NAME"`; others are asked of whoever has the text. `pack` puts all files
into the text: that is what digests are taken of and what the datastore keeps.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from spire_hw.config import hcl
from spire_hw.config.hcl import Block, Body
from spire_hw.config.schema import check
from spire_hw.errors import ConfigError, ConfigFault, ErrorKind, InvalidInputError
from spire_hw.posture.policybuild import Builder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spire_hw.config.hcl import Item
    from spire_hw.posture.policy import Policy
    from spire_hw.posture.policykeys import FileKeys, FileModel

_TAG: Final = "END_OF_FILE"
_WIDTH: Final = 76


class ReadFile(Protocol):
    """Gives the content of a file that a policy refers to."""

    def __call__(self, name: str, /) -> bytes:
        """Return the bytes.

        Raises:
            SpireHwError: there is no such file for this policy.
        """
        ...


def no_files(name: str, /) -> bytes:
    """Refuse: for texts that have to be complete in themselves."""
    raise InvalidInputError(f'file "{name[:80]}" is not in the text')


def parse_policy(
    text: str, file: str = "", *, read: ReadFile = no_files, version: int = 0
) -> Policy:
    """Return the policy of a text; see `load_policy`."""
    return load_policy(text, file, read=read, version=version)[0]


def load_policy(
    text: str, file: str = "", *, read: ReadFile = no_files, version: int = 0
) -> tuple[Policy, str]:
    """Return the policy of a text, and the text with all its files in it.

    Args:
        text: HCL or JSON.
        file: its name for messages.
        read: gives files that are not in the text.
        version: number it was stored under; 0 for the one in the text, 1 without one.

    Raises:
        ConfigError: with every fault; FAILED_PRECONDITION when it relies on PCR 7 alone.
    """
    where = file or "policy"
    body = hcl.parse(text, file)
    raw, faults = _check(body)
    whole = not faults
    if raw is None:
        raw, _ = _check(_without(body, {fault.line for fault in faults}))
    if raw is None:
        raise ConfigError(where, faults)
    if len(raw.policy) != 1:
        message = f"expected one policy, found {len(raw.policy)}"
        raise ConfigError(where, [*faults, ConfigFault(raw.line("policy"), message)])
    ((name, keys),) = raw.policy.items()
    files = _Files(raw.file, read)
    builder = Builder(name, keys, files)
    policy = builder.build(version or keys.version or 1)
    if version and keys.version not in {None, version}:
        message = f'"version": is {keys.version} in the text, but it is stored as {version}'
        faults.append(ConfigFault(keys.line("version"), message))
    if files.outside and text.lstrip().startswith("{"):
        message = "JSON cannot take in the files a policy refers to: write it as HCL"
        faults.append(ConfigFault(0, message))
    if whole:
        builder.check_whole(policy)
    if found := sorted([*faults, *files.faults, *builder.faults], key=lambda fault: fault.line):
        error = ConfigError(where, found)
        if builder.pcr7_only:
            error.kind = ErrorKind.FAILED_PRECONDITION
        raise error
    packed = _packed(text, files.outside)
    return replace(policy, sha256=digest(packed)), packed


def pack(text: str, file: str = "", *, read: ReadFile) -> str:
    """Return a text that holds all files its policy refers to; good ones only.

    Raises:
        ConfigError: the policy has faults.
        InvalidInputError: the text becomes too large.
    """
    _, packed = load_policy(text, file, read=read)
    if len(packed) > hcl.MAX_CHARS:
        raise InvalidInputError(
            f"with its files the policy is {len(packed)} characters long, at most {hcl.MAX_CHARS}"
            " can be stored: put it into policy_dir"
        )
    return packed


def stated_version(text: str) -> int:
    """Return the version that a good text states, 0 when it states none."""
    raw, _ = _check(hcl.parse(text))
    stated = [keys.version or 0 for keys in raw.policy.values()] if raw is not None else []
    return max(stated, default=0)


def digest(packed: str) -> str:
    """Return the digest by which a packed text is known."""
    return hashlib.sha256(packed.encode()).hexdigest()


def _check(body: Body) -> tuple[FileModel | None, list[ConfigFault]]:
    from spire_hw.posture.policykeys import FileModel  # noqa: PLC0415 - models take long to make

    return check(body, FileModel)


def _without(body: Body, lines: set[int]) -> Body:
    """Return a body without what stands on some lines, to find faults in the rest."""
    kept: list[Item | Block] = []
    for item in body.items:
        if isinstance(item, Block):
            kept.append(Block(item.keys, _without(item.body, lines), item.line))
        elif item.line not in lines:
            kept.append(item)
    return Body(tuple(kept), body.line, body.file)


def _packed(text: str, outside: Mapping[str, bytes]) -> str:
    blocks = [file_block(name, outside[name]) for name in sorted(outside)]
    if not blocks:
        return text
    return "\n".join([text.rstrip("\n") + "\n", *blocks])


def file_block(name: str, content: bytes) -> str:
    """Return a block that reads back as this file: as text where that is exact."""
    label = hcl.quote(name)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""
    block = f"file {label} {{\n  content = <<{_TAG}\n{text}{_TAG}\n}}\n"
    if text and _reads_back(block, content):
        return block
    coded = base64.b64encode(content).decode("ascii")
    lines = [coded[at : at + _WIDTH] for at in range(0, len(coded), _WIDTH)]
    return f"file {label} {{\n  base64 = <<{_TAG}\n" + "\n".join([*lines, _TAG]) + "\n}\n"


def _reads_back(block: str, content: bytes) -> bool:
    try:
        body = hcl.parse(block)
    except ConfigError:
        return False
    found = [b.body.get("content") for b in body.blocks("file")]
    return len(found) == 1 and isinstance(found[0], str) and found[0].encode() == content


class _Files:
    """Files of one policy, from its text or from outside, each read once."""

    def __init__(self, inside: Mapping[str, FileKeys], read: ReadFile) -> None:
        self._inside = inside
        self._read = read
        self.outside: dict[str, bytes] = {}
        self.faults: list[ConfigFault] = []
        self._held: dict[str, bytes] = {}
        for name, keys in inside.items():
            self._take(name, keys)

    def _take(self, name: str, keys: FileKeys) -> None:
        if (keys.content is None) == (keys.base64 is None):
            self.faults.append(ConfigFault(keys.line(""), "needs either content or base64"))
        elif keys.content is not None:
            self._held[name] = keys.content.encode()
        elif keys.base64 is not None:
            try:
                coded = "".join(keys.base64.split()).encode()
                self._held[name] = base64.b64decode(coded, validate=True)
            except (binascii.Error, UnicodeEncodeError):
                self.faults.append(ConfigFault(keys.line("base64"), '"base64" is malformed'))

    def __call__(self, name: str, /) -> bytes:
        """Return a file's content."""
        if name not in self._inside and name not in self._held:
            self.outside[name] = self._held[name] = self._read(name)
        if name not in self._held:
            raise InvalidInputError(f'file "{name[:80]}" is malformed')
        return self._held[name]
