"""Where a command takes policies and evidence from: a file, or the server."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from spire_hw._pb import hw_policy_pb2, hw_posture_pb2
from spire_hw.cli.files import read_input
from spire_hw.cli.flags import F, flag
from spire_hw.posture.document import MAX_BYTES, decode_evidence
from spire_hw.posture.policyfile import parse_policy
from spire_hw_server.posture.policyfiles import SUFFIX, read_policy

if TYPE_CHECKING:
    from spire_hw.cli.admin import Admin
    from spire_hw.posture.evidence import Evidence
    from spire_hw.posture.policy import Policy

POLICY: Final = hw_policy_pb2.DESCRIPTOR.services_by_name["Policy"]
_POSTURE: Final = hw_posture_pb2.DESCRIPTOR.services_by_name["PostureAdmin"]
_REFERENCE: Final = re.compile(r"([^@/]+?)(?:@([0-9]{1,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shown:
    """Evidence and what to call it: its file, or its node."""

    source: str
    evidence: Evidence


def parse_reference(text: str) -> tuple[str, int]:
    """Return name and version of `NAME@VERSION`, 0 for the version in force.

    Raises:
        UsageError: something else.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise click.UsageError(f'"{text[:80]}" is not a policy: write NAME or NAME@VERSION')
    return found[1], int(found[2] or 0)


def find_policy(admin: Admin, text: str) -> Policy:
    """Return a policy by what was given: a file (with a slash, or ending in .hcl) or a name.

    Raises:
        ConfigError: a file that is no policy.
        NotFoundError: the server has no such policy or version.
    """
    if "/" in text or text.endswith(SUFFIX):
        return read_policy(Path(text))[0]
    name, version = parse_reference(text)
    request = hw_policy_pb2.GetPolicyRequest(name=name, version=version)
    answer = admin.call(POLICY, "GetPolicy", request)
    label = f"{answer.info.name}@{answer.info.version}"
    return parse_policy(answer.text, label, version=answer.info.version)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which evidence a command is about.

    Attributes:
        files: paths of documents.
        nodes: SPIFFE IDs of agents.
        number: of a node's record, 0 for the last that was accepted.
    """

    files: tuple[str, ...]
    nodes: tuple[str, ...]
    number: int

    def find(self, admin: Admin) -> list[Shown]:
        """Return it; the server is asked when there are nodes.

        Raises:
            EncodingError: a file is no evidence document.
            NotFoundError: there is no such node, or nothing is stored of it.
        """
        found = [Shown(name, decode_evidence(read_input(name, MAX_BYTES))) for name in self.files]
        for node in self.nodes:
            request = hw_posture_pb2.GetEvidenceRequest(agent_id=node, id=self.number)
            answer = admin.call(_POSTURE, "GetEvidence", request)
            found.append(Shown(node, decode_evidence(answer.document)))
        return found

    def find_some(self, admin: Admin) -> list[Shown]:
        """Return it; there must be some.

        Raises:
            UsageError: none was named.
        """
        if not self.files and not self.nodes:
            raise click.UsageError("-evidence or -node is required")
        return self.find(admin)


def evidence_flags(command: F) -> F:
    """Add the flags that name evidence; the command gets a `Wanted`."""

    @functools.wraps(command)
    def inner(
        *args: Any, evidence: tuple[str, ...], node: tuple[str, ...], number: int, **kwargs: Any
    ) -> Any:
        if number < 0:
            raise click.UsageError("-number is negative")
        return command(*args, wanted=Wanted(evidence, node, number), **kwargs)

    which = "Number of the nodes' evidence; 0 for the last that was accepted."
    wrapped = flag("number", which, type=int, default=0)(inner)
    of_node = "SPIFFE ID of an agent whose stored evidence is taken."
    wrapped = flag("node", of_node, repeated=True)(wrapped)
    document = "Evidence document, as `agent evidence ID -latest` prints it."
    return flag("evidence", document, repeated=True)(wrapped)  # type: ignore[return-value]
