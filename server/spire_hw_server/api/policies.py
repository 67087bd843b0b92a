"""Policies made with the CLI, and those in force with what they come from."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from spire_hw._pb import hw_policy_pb2 as pb
from spire_hw.errors import AlreadyExistsError, InvalidInputError, LimitError, NotFoundError
from spire_hw.posture.policyfile import parse_policy, stated_version
from spire_hw.rpc import convert
from spire_hw.transport.peer import UnixPeer
from spire_hw_server.datastore.records import StoredPolicy

if TYPE_CHECKING:
    from spire_hw.posture.policy import Policy
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.posture.policies import Held, Policies

MAX_COMMENT: Final = 1024
# What fits into a message with all that is around it.
MAX_TEXT: Final = 3 * 1024 * 1024 + 512 * 1024


class PolicyService:
    """`spire_hw.server.v1.Policy`."""

    def __init__(self, *, store: Datastore, policies: Policies, audit: Audit) -> None:
        self._store = store
        self._policies = policies
        self._audit = audit

    async def create_policy(self, request: pb.CreatePolicyRequest, call: Call) -> pb.PolicyInfo:
        """Store a new policy."""
        policy, stated = await self._parse(request.text, request.comment, call)
        self._policies.check(policy)
        newest = await self._newest(policy.name)
        if newest is not None and not newest.deleted:
            raise AlreadyExistsError(f'there is a policy "{policy.name}": update it instead')
        row = _next(policy, newest, stated, text=request.text, comment=request.comment, call=call)
        return await self._add(row, policy, newest, call)

    async def update_policy(self, request: pb.UpdatePolicyRequest, call: Call) -> pb.PolicyInfo:
        """Store the next version of a policy."""
        policy, stated = await self._parse(request.text, request.comment, call)
        self._policies.check(policy)
        newest = await self._newest(policy.name)
        if newest is None or newest.deleted:
            raise NotFoundError(f'there is no policy "{policy.name}": create it instead')
        expected = request.expected_version
        if expected and expected != newest.version:
            raise AlreadyExistsError(
                f'policy "{policy.name}" has version {newest.version} by now, not {expected}'
            )
        row = _next(policy, newest, stated, text=request.text, comment=request.comment, call=call)
        return await self._add(row, policy, newest, call)

    async def delete_policy(self, request: pb.DeletePolicyRequest, call: Call) -> pb.PolicyInfo:
        """Take a policy out of force."""
        self._audit.note(call, policy=request.name[:255])
        _check_comment(request.comment)
        held = self._policies.held.get(request.name)
        if held is not None and held.file:
            raise InvalidInputError(f'policy "{request.name}" is the file {held.file}: remove that')
        newest = await self._newest(request.name)
        if newest is None or newest.deleted:
            raise NotFoundError(f'there is no policy "{request.name[:255]}"')
        end = StoredPolicy(
            name=newest.name,
            version=newest.version + 1,
            text="",
            sha256="",
            comment=request.comment,
            created_by=_author(call),
        )
        stored = await self._store.add_policy(end, newest.version)
        await self._policies.refresh()
        call.log.info("Policy deleted", policy=stored.name, version=stored.version)
        return _of_row(stored)

    async def list_policies(
        self, request: pb.ListPoliciesRequest, call: Call
    ) -> pb.ListPoliciesResponse:
        """Return the policies in force."""
        del request, call
        held = self._policies.held
        return pb.ListPoliciesResponse(policies=[_of_held(held[name]) for name in sorted(held)])

    async def list_versions(
        self, request: pb.ListVersionsRequest, call: Call
    ) -> pb.ListVersionsResponse:
        """Return all versions of a policy."""
        del call
        held = self._policies.held.get(request.name)
        if held is not None and held.file:
            return pb.ListVersionsResponse(versions=[_of_held(held)])
        rows = await self._store.list_policy_versions(request.name)
        if not rows:
            raise NotFoundError(f'there is no policy "{request.name[:255]}"')
        return pb.ListVersionsResponse(versions=[_of_row(row) for row in rows])

    async def get_policy(self, request: pb.GetPolicyRequest, call: Call) -> pb.GetPolicyResponse:
        """Return a version with its text."""
        del call
        held = self._policies.held.get(request.name)
        if held is not None and request.version in {0, held.policy.version}:
            text = held.text if held.row is None else held.row.text
            _check_size(text)
            return pb.GetPolicyResponse(info=_of_held(held), text=text)
        if held is not None and held.file:
            raise NotFoundError(f'policy "{request.name}" is a file: it has one version')
        row = await self._store.get_policy(request.name, request.version)
        return pb.GetPolicyResponse(info=_of_row(row), text=row.text)

    async def _parse(self, text: str, comment: str, call: Call) -> tuple[Policy, int]:
        """Return the policy of a text and the version it states, 0 for none."""
        _check_size(text)
        _check_comment(comment)
        # A long list takes a while, in which the server has other things to do.
        policy = await asyncio.to_thread(parse_policy, text)
        self._audit.note(call, policy=policy.name, policy_sha256=policy.sha256)
        return policy, await asyncio.to_thread(stated_version, text)

    async def _newest(self, name: str) -> StoredPolicy | None:
        versions = await self._store.list_policy_versions(name)
        return versions[-1] if versions else None

    async def _add(
        self, row: StoredPolicy, policy: Policy, newest: StoredPolicy | None, call: Call
    ) -> pb.PolicyInfo:
        stored = await self._store.add_policy(row, newest.version if newest is not None else 0)
        await self._policies.refresh()
        call.log.info("Policy stored", policy=stored.name, version=stored.version)
        return _of_row(stored, policy)


def _next(
    policy: Policy,
    newest: StoredPolicy | None,
    stated: int,
    *,
    text: str,
    comment: str,
    call: Call,
) -> StoredPolicy:
    """Return the next version of a policy.

    Raises:
        InvalidInputError: the version it states is not higher than all before.
    """
    after = newest.version if newest is not None else 0
    if stated and stated <= after:
        raise InvalidInputError(
            f'policy "{policy.name}" has had version {after} before: state a higher one, or'
            " none to have the next number"
        )
    return StoredPolicy(
        name=policy.name,
        version=stated or after + 1,
        text=text,
        sha256=policy.sha256,
        comment=comment,
        created_by=_author(call),
    )


def _author(call: Call) -> str:
    return f"uid:{call.peer.process.uid}" if isinstance(call.peer, UnixPeer) else ""


def _check_comment(comment: str) -> None:
    if len(comment.encode()) > MAX_COMMENT:
        raise InvalidInputError(f"comment is longer than {MAX_COMMENT} bytes")


def _check_size(text: str) -> None:
    size = len(text.encode())
    if size > MAX_TEXT:
        raise LimitError(
            f"the policy is {size} bytes with its files, at most {MAX_TEXT} fit into a message:"
            " keep it in policy_dir"
        )


def _of_held(held: Held) -> pb.PolicyInfo:
    policy = held.policy
    if held.row is not None:
        return _of_row(held.row, policy)
    return pb.PolicyInfo(
        name=policy.name,
        version=policy.version,
        sha256=policy.sha256,
        description=policy.description,
        file=held.file,
        is_default=not policy.nodes,
    )


def _of_row(row: StoredPolicy, policy: Policy | None = None) -> pb.PolicyInfo:
    return pb.PolicyInfo(
        name=row.name,
        version=row.version,
        sha256=row.sha256,
        description=policy.description if policy is not None else "",
        comment=row.comment,
        created_at=convert.time_to_pb(row.created_at),
        created_by=row.created_by,
        deleted=row.deleted,
        is_default=policy is not None and not policy.nodes,
    )
