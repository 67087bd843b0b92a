"""What the admin socket is told about policies: refused with the right word, nothing in force changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from spire_hw._pb import hw_policy_pb2 as pb
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw_sim.servers import TIMEOUT_S, Operator, ScriptedAgent

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from spire_hw_server.app import Server

pytestmark = pytest.mark.asyncio

SERVICE = "/spire_hw.server.v1.Policy/"
PIN = f'pcrs {{ sha256 {{ "4" = ["{"11" * 32}"] }} }}'
GOOD = f'policy "web" {{ {PIN} }}'


async def call(
    operator: Operator, method: str, request: Message, answer: Any = pb.PolicyInfo
) -> Any:
    return await operator.channel.unary(SERVICE + method, request, answer, timeout_s=TIMEOUT_S)


async def create(operator: Operator, text: str = GOOD, comment: str = "") -> pb.PolicyInfo:
    made: pb.PolicyInfo = await call(
        operator, "CreatePolicy", pb.CreatePolicyRequest(text=text, comment=comment)
    )
    return made


async def in_force(operator: Operator) -> list[str]:
    listed = await call(operator, "ListPolicies", pb.ListPoliciesRequest(), pb.ListPoliciesResponse)
    return [f"{one.name}@{one.version}" for one in listed.policies]


@pytest_asyncio.fixture
async def kept(operator: Operator) -> str:
    """Put a policy in force that has to stay."""
    made = await create(operator)
    return f"{made.name}@{made.version}"


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        ("", ErrorKind.INVALID_ARGUMENT, '"policy"'),
        ("policy", ErrorKind.INVALID_ARGUMENT, "ends too early"),
        ("\0", ErrorKind.INVALID_ARGUMENT, "NUL"),
        ('policy "a" {' * 5000, ErrorKind.INVALID_ARGUMENT, ""),
        (f'policy "Web" {{ {PIN} }}', ErrorKind.INVALID_ARGUMENT, "a policy's name"),
        (f'policy "a" {{ {PIN} }} policy "b" {{ {PIN} }}', ErrorKind.INVALID_ARGUMENT, "found 2"),
        ('policy "a" { boot { } }', ErrorKind.FAILED_PRECONDITION, "PCR 7 alone"),
        (
            'policy "a" { ima { allow = ["@/etc/passwd"] } }',
            ErrorKind.INVALID_ARGUMENT,
            'file "/etc/passwd" is not in the text',
        ),
        (f'policy "other" {{ {PIN} }}', ErrorKind.INVALID_ARGUMENT, "both for every node"),
        (GOOD, ErrorKind.ALREADY_EXISTS, "update it instead"),
        (GOOD + "#" * (3 << 20) + "#" * (1 << 19), ErrorKind.RESOURCE_EXHAUSTED, "policy_dir"),
        (GOOD + "#" * (4 << 20), ErrorKind.RESOURCE_EXHAUSTED, ""),
    ],
    ids=range(12),
)
async def test_policies_that_are_none(
    operator: Operator, kept: str, text: str, kind: ErrorKind, part: str
) -> None:
    with pytest.raises(SpireHwError) as caught:
        await create(operator, text)
    assert caught.value.kind is kind, caught.value
    assert part in caught.value.message
    assert await in_force(operator) == [kept]


@pytest.mark.parametrize(
    ("method", "request_", "kind"),
    [
        ("CreatePolicy", pb.CreatePolicyRequest(text=GOOD, comment="x" * 1025), "INVALID_ARGUMENT"),
        (
            "UpdatePolicy",
            pb.UpdatePolicyRequest(text=GOOD, comment="☃" * 342),
            "INVALID_ARGUMENT",
        ),
        ("UpdatePolicy", pb.UpdatePolicyRequest(text=GOOD, expected_version=7), "ALREADY_EXISTS"),
        (
            "UpdatePolicy",
            pb.UpdatePolicyRequest(text=f'policy "web" {{ version = 1 {PIN} }}'),
            "INVALID_ARGUMENT",
        ),
        (
            "UpdatePolicy",
            pb.UpdatePolicyRequest(text=GOOD.replace("web", "new")),
            "INVALID_ARGUMENT",
        ),
        ("DeletePolicy", pb.DeletePolicyRequest(), "NOT_FOUND"),
        ("DeletePolicy", pb.DeletePolicyRequest(name="none"), "NOT_FOUND"),
        ("DeletePolicy", pb.DeletePolicyRequest(name="web" * 1000), "NOT_FOUND"),
        (
            "DeletePolicy",
            pb.DeletePolicyRequest(name="web", comment="x" * 1025),
            "INVALID_ARGUMENT",
        ),
        ("GetPolicy", pb.GetPolicyRequest(name="web", version=2), "NOT_FOUND"),
        ("GetPolicy", pb.GetPolicyRequest(name="web", version=2**32 - 1), "NOT_FOUND"),
        ("GetPolicy", pb.GetPolicyRequest(name="\u202eweb"), "NOT_FOUND"),
        ("ListVersions", pb.ListVersionsRequest(name="'; DROP TABLE policies; --"), "NOT_FOUND"),
    ],
    ids=range(13),
)
async def test_requests_that_are_refused(
    operator: Operator, kept: str, method: str, request_: Message, kind: str
) -> None:
    with pytest.raises(SpireHwError) as caught:
        await call(operator, method, request_)
    assert caught.value.kind.name == kind, caught.value
    assert await in_force(operator) == [kept]


async def test_policies_are_for_the_admin_socket_alone(agent: ScriptedAgent, kept: str) -> None:
    request = pb.ListPoliciesRequest()
    async with await agent.channel() as channel:
        with pytest.raises(SpireHwError) as caught:
            await channel.unary(
                SERVICE + "ListPolicies", request, pb.ListPoliciesResponse, timeout_s=TIMEOUT_S
            )
    assert caught.value.kind is ErrorKind.UNIMPLEMENTED


async def test_of_many_updates_at_once_each_is_a_version_or_refused(
    operator: Operator, server: Server, kept: str
) -> None:
    request = pb.UpdatePolicyRequest(text=GOOD, expected_version=1)
    results = await asyncio.gather(
        *(call(operator, "UpdatePolicy", request) for _ in range(8)), return_exceptions=True
    )
    won = [result for result in results if isinstance(result, pb.PolicyInfo)]
    lost = [result for result in results if isinstance(result, SpireHwError)]
    assert [one.version for one in won] == [2]
    assert {one.kind for one in lost} == {ErrorKind.ALREADY_EXISTS}
    assert await in_force(operator) == ["web@2"]
