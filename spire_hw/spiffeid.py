"""What is a SPIFFE ID: the one parser of the whole program, and who an ID belongs to.

Nothing is folded, cleaned or decoded: an ID that is not exact is refused. IDs are built from
checked segments only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from typing_extensions import override

from spire_hw.errors import SpiffeIdError

SERVER_PATH: Final = "/spire/server"
MAX_ID_BYTES: Final = 2048

_SCHEME: Final = "spiffe://"
_RESERVED_PATH: Final = "/spire"
_AGENT_PREFIX: Final = "/spire/agent/"
_MAX_NAME_BYTES: Final = 255
_MAX_SHOWN: Final = 64
_NAME: Final = re.compile(r"[a-z0-9._-]{1,255}", re.ASCII)
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_ID: Final = re.compile(
    r"spiffe://([a-z0-9._-]{1,255})((?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)*)", re.ASCII
)


@dataclass(frozen=True, slots=True, order=True)
class TrustDomain:
    """A trust domain, known by its name.

    Args:
        name: 1 to 255 of `a-z 0-9 . - _`.

    Raises:
        SpiffeIdError: any other name; upper case is refused, not folded.
    """

    name: str

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise SpiffeIdError(f"trust domain name {_shown(self.name)} {_name_fault(self.name)}")

    @classmethod
    def parse(cls, text: str) -> TrustDomain:
        """Return the trust domain of a bare name (not of a `spiffe://` ID).

        Raises:
            SpiffeIdError: not a trust domain name.
        """
        return _trust_domain(text)

    @property
    def id(self) -> SpiffeId:
        """Return the ID of the trust domain itself, which has no path."""
        return SpiffeId(_SCHEME + self.name)

    def member(self, *segments: str) -> SpiffeId:
        """Return the ID of a member.

        Args:
            segments: path segments, at least one; each is checked.

        Raises:
            SpiffeIdError: no segment, or one that is not a legal segment.
        """
        if not segments:
            raise SpiffeIdError("a member of a trust domain needs a path")
        for segment in segments:
            check_segment(segment)
        return SpiffeId(f"{_SCHEME}{self.name}/{'/'.join(segments)}")

    @override
    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, order=True, repr=False)
class SpiffeId:
    """A SPIFFE ID; equal, hashed and ordered by its text, byte by byte.

    Args:
        text: `spiffe://<trust domain><path>`, at most 2,048 bytes.

    Attributes:
        trust_domain: whose it is.
        path: "" or `/` and segments, exactly as given.

    Raises:
        SpiffeIdError: not a SPIFFE ID.

    Spec: SPIFFE-ID section 2.
    """

    text: str
    trust_domain: TrustDomain = field(init=False, compare=False)
    path: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        text = self.text
        if len(text) > MAX_ID_BYTES:
            raise SpiffeIdError(f"SPIFFE ID is longer than {MAX_ID_BYTES} bytes")
        found = _ID.fullmatch(text)
        if found is None:
            raise SpiffeIdError(f"SPIFFE ID {_shown(text)} {_id_fault(text)}")
        object.__setattr__(self, "trust_domain", _trust_domain(found[1]))
        object.__setattr__(self, "path", found[2])

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Return the ID written in text.

        Raises:
            SpiffeIdError: not a SPIFFE ID; the message says why.
        """
        return cls(text)

    def is_member_of(self, trust_domain: TrustDomain) -> bool:
        """Tell whether the ID lies in that trust domain."""
        return self.trust_domain == trust_domain

    def is_agent(self) -> bool:
        """Tell whether the ID lies below `/spire/agent/`."""
        return self.path.startswith(_AGENT_PREFIX)

    def is_reserved(self) -> bool:
        """Tell whether the first path segment is `spire`."""
        return self.path == _RESERVED_PATH or self.path.startswith(_RESERVED_PATH + "/")

    @override
    def __str__(self) -> str:
        return self.text

    @override
    def __repr__(self) -> str:
        return f"SpiffeId({self.text!r})"


@lru_cache(maxsize=1024)
def _trust_domain(name: str) -> TrustDomain:
    return TrustDomain(name)


def check_segment(segment: str) -> str:
    """Return segment when it may stand in a path.

    Raises:
        SpiffeIdError: empty, `.`, `..`, or a character outside `A-Za-z0-9._-`.
    """
    if _SEGMENT.fullmatch(segment) is None:
        raise SpiffeIdError(
            f"path segment {_shown(segment)} is not made of letters, digits, '.', '-' and '_'"
        )
    if segment in {".", ".."}:
        raise SpiffeIdError("path segments '.' and '..' are not allowed")
    return segment


def server_id(trust_domain: TrustDomain) -> SpiffeId:
    """Return the ID every server of a trust domain carries."""
    return SpiffeId(f"{_SCHEME}{trust_domain.name}{SERVER_PATH}")


def agent_id(trust_domain: TrustDomain, attestor: str, *segments: str) -> SpiffeId:
    """Return the ID of an agent.

    Args:
        trust_domain: whose agent it is.
        attestor: name of the node attestor.
        segments: what the attestor knows the node by, at least one.

    Raises:
        SpiffeIdError: no segment, or one that is not legal.
    """
    if not segments:
        raise SpiffeIdError("an agent ID needs at least one segment after the attestor's name")
    return trust_domain.member("spire", "agent", attestor, *segments)


def check_member(
    spiffe_id: SpiffeId, trust_domain: TrustDomain, *, path_required: bool = False
) -> None:
    """Refuse an ID of another trust domain.

    Args:
        spiffe_id: the ID under test.
        trust_domain: where it has to belong.
        path_required: also refuse the ID of the trust domain itself.

    Raises:
        SpiffeIdError: not a member, or the path is missing.
    """
    if spiffe_id.trust_domain != trust_domain:
        raise SpiffeIdError(f'"{spiffe_id}" is not a member of trust domain "{trust_domain.name}"')
    if path_required and not spiffe_id.path:
        raise SpiffeIdError(f'"{spiffe_id}" has no path')


def check_workload_id(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> None:
    """Refuse an ID that no workload may have.

    Raises:
        SpiffeIdError: other trust domain, no path, or reserved (`/spire` and below).
    """
    check_member(spiffe_id, trust_domain, path_required=True)
    if spiffe_id.is_reserved():
        raise SpiffeIdError(
            f'"{spiffe_id}" lies in the reserved namespace "/spire"; workload IDs may not'
        )


def check_agent_id(spiffe_id: SpiffeId, trust_domain: TrustDomain) -> None:
    """Refuse an ID that is not one of an agent.

    Raises:
        SpiffeIdError: other trust domain, or not below `/spire/agent/`.
    """
    check_member(spiffe_id, trust_domain, path_required=True)
    if not spiffe_id.is_agent():
        raise SpiffeIdError(f'"{spiffe_id}" is not below "{_AGENT_PREFIX}", where agents are')


def _shown(text: str) -> str:
    whole = ascii(text[:_MAX_SHOWN])
    return whole if len(text) <= _MAX_SHOWN else whole + "..."


def _name_fault(name: str) -> str:
    if not name:
        return "is empty"
    if name.startswith(_SCHEME):
        return "is an ID; give the bare name"
    if len(name) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME_BYTES} bytes"
    return "is not made of lower-case letters, digits, '.', '-' and '_'"


def _id_fault(text: str) -> str:
    if not text.startswith(_SCHEME):
        return "does not start with spiffe://"
    name, slash, path = text.removeprefix(_SCHEME).partition("/")
    if _NAME.fullmatch(name) is None:
        return f"has a trust domain name that {_name_fault(name)}"
    segments = path.split("/")
    if slash and not segments[-1]:
        return "ends with a slash"
    if not all(segments):
        return "has an empty path segment"
    if {".", ".."} & set(segments):
        return "has a path segment '.' or '..'"
    return "has a path character outside letters, digits, '.', '-' and '_'"
