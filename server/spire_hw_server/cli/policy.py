"""Policies: what machines have to show, tried before they are in force."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from spire_hw._pb import hw_policy_pb2 as pb
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.cli.output import complain, count_of
from spire_hw.cli.run import ExitCode
from spire_hw.errors import LimitError
from spire_hw.posture.diff import compare, judge_both
from spire_hw.posture.evaluate import evaluate
from spire_hw.posture.learn import learn as draft
from spire_hw_server.cli import policyview
from spire_hw_server.cli.connect import admin_flags
from spire_hw_server.cli.policysource import POLICY, evidence_flags, find_policy, parse_reference
from spire_hw_server.posture.policyfiles import read_policy

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from spire_hw.cli.admin import Admin, Session
    from spire_hw_server.cli.policysource import Wanted

# As much as the server takes.
_MAX_BYTES: Final = 3 * 1024 * 1024 + 512 * 1024

_comment = flag("comment", "Why; kept with the version.", default="")


@click.group("policy", cls=GoGroup)
def group() -> None:
    """What machines have to show before they are trusted."""


def _policy_file(help_text: str) -> Callable[..., Any]:
    return flag("policyFile", help_text, default="")


def _text_of(policy_file: str) -> str:
    if not policy_file:
        raise click.UsageError("a policy file is required: -policyFile FILE")
    _, text = read_policy(Path(policy_file))
    if len(text.encode()) > _MAX_BYTES:
        raise LimitError(
            f"with its files the policy is larger than {_MAX_BYTES} bytes: put it into policy_dir"
        )
    return text


@group.command(
    "create",
    examples="""
    spire-hw-server policy create -policyFile web.hcl -comment "rack 7"
    """,
)
@_policy_file("Policy to store, with the files it refers to.")
@_comment
@admin_flags
def create(admin: Admin, policy_file: str, comment: str) -> None:
    """Store a new policy; it is in force at once."""
    request = pb.CreatePolicyRequest(text=_text_of(policy_file), comment=comment)
    answer = admin.call(POLICY, "CreatePolicy", request)
    admin.printer.message(answer, lambda: policyview.print_info([answer]))


@group.command(
    "update",
    examples="""
    spire-hw-server policy update -policyFile web.hcl -expectedVersion 3 -comment "new kernel"
    """,
)
@_policy_file("Next version to store, with the files it refers to.")
@flag("expectedVersion", "Newest version you know; fail if there is another.", type=int, default=0)
@_comment
@admin_flags
def update(admin: Admin, policy_file: str, expected_version: int, comment: str) -> None:
    """Store the next version of a policy; nodes are judged by it at once."""
    if expected_version < 0:
        raise click.UsageError("-expectedVersion is negative")
    request = pb.UpdatePolicyRequest(
        text=_text_of(policy_file), comment=comment, expected_version=expected_version
    )
    answer = admin.call(POLICY, "UpdatePolicy", request)
    admin.printer.message(answer, lambda: policyview.print_info([answer]))


@group.command("delete", examples="spire-hw-server policy delete web -comment retired")
@click.argument("name")
@_comment
@admin_flags
def delete(admin: Admin, name: str, comment: str) -> None:
    """Take a policy out of force; its versions stay readable."""
    request = pb.DeletePolicyRequest(name=name, comment=comment)

    async def work(session: Session) -> tuple[pb.PolicyInfo, int]:
        gone = await session.call(POLICY, "DeletePolicy", request)
        left = await session.call(POLICY, "ListPolicies", pb.ListPoliciesRequest())
        return gone, len(left.policies)

    answer, left = admin.run(work)

    def pretty() -> None:
        click.echo(f"Deleted policy {answer.name}")

    admin.printer.message(answer, pretty)
    if not left:
        complain("No policy is left: nodes are judged by the attestor's own settings alone.")


@group.command(
    "list",
    examples="""
    spire-hw-server policy list
    spire-hw-server policy list -output json
    """,
)
@admin_flags
def list_policies(admin: Admin) -> None:
    """List the policies in force, those of policy_dir too."""
    answer = admin.call(POLICY, "ListPolicies", pb.ListPoliciesRequest())

    def pretty() -> None:
        number = count_of(len(answer.policies), "policy", "policies")
        click.echo(f"Found {number}{':' if answer.policies else ''}")
        if answer.policies:
            click.echo()
            policyview.print_info(answer.policies)

    admin.printer.message(answer, pretty)


@group.command(
    "show",
    examples="""
    spire-hw-server policy show web
    spire-hw-server policy show web@3 -field text
    spire-hw-server policy show web -versions
    """,
)
@click.argument("name", metavar="NAME[@VERSION]")
@flag("versions", "List all versions instead, without their texts.", type=bool, default=False)
@admin_flags
def show(admin: Admin, name: str, versions: bool) -> None:
    """Print a policy as it was stored."""
    bare, version = parse_reference(name)
    if versions:
        listed = admin.call(POLICY, "ListVersions", pb.ListVersionsRequest(name=bare))
        admin.printer.message(listed, lambda: policyview.print_info(listed.versions))
        return
    answer = admin.call(POLICY, "GetPolicy", pb.GetPolicyRequest(name=bare, version=version))

    def pretty() -> None:
        policyview.print_info([answer.info])
        click.echo(answer.text, nl=not answer.text.endswith("\n"))

    admin.printer.message(answer, pretty)


@group.command(
    "validate",
    examples="""
    spire-hw-server policy validate policies/web.hcl policies/db.hcl
    """,
)
@click.argument("files", nargs=-1, metavar="FILE...")
@admin_flags
def validate(admin: Admin, files: tuple[str, ...]) -> None:
    """Check policy files without a server."""
    if not files:
        raise click.UsageError("a policy file is required")
    read = [(name, read_policy(Path(name))[0]) for name in files]

    def pretty() -> None:
        for name, policy in read:
            click.echo(f"{name}: policy {policy.reference} is valid")

    found = [
        {"file": name, "name": policy.name, "version": policy.version, "sha256": policy.sha256}
        for name, policy in read
    ]
    admin.printer.value({"policies": found}, pretty)


@group.command(
    "test",
    examples="""
    spire-hw-server policy test -evidence node.json -policyFile web.hcl
    spire-hw-server policy test -node spiffe://example.org/spire/agent/tpm/3f0c -policy web@3
    """,
)
@evidence_flags
@flag("policy", "Policy of the server: NAME or NAME@VERSION.", default="")
@_policy_file("Policy file; no server is asked when the evidence is a file, too.")
@admin_flags
@click.pass_context
def test(
    ctx: click.Context,
    /,
    admin: Admin,
    wanted: Wanted,
    policy: str,
    policy_file: str,
) -> None:
    """Explain line by line what a policy says to evidence; fails when it is not accepted."""
    if bool(policy) == bool(policy_file):
        raise click.UsageError("one of -policy and -policyFile is required")
    chosen = read_policy(Path(policy_file))[0] if policy_file else find_policy(admin, policy)
    judged = [(one, evaluate(chosen, one.evidence)) for one in wanted.find_some(admin)]

    def pretty() -> None:
        for number, (one, verdict) in enumerate(judged):
            click.echo("\n" if number else "", nl=False)
            policyview.print_verdict(one, chosen, verdict)

    results = [policyview.verdict_values(one, chosen, verdict) for one, verdict in judged]
    admin.printer.value({"results": results}, pretty)
    ctx.exit(ExitCode.DONE if all(v.holds for _, v in judged) else ExitCode.FAILED)


@group.command(
    "learn",
    examples="""
    spire-hw-server policy learn -node spiffe://example.org/spire/agent/tpm/3f0c -name web > web.hcl
    spire-hw-server policy learn -evidence a.json -evidence b.json -name web
    """,
)
@evidence_flags
@flag("name", "Name of the policy.", default="learnt")
@admin_flags
def learn(admin: Admin, wanted: Wanted, name: str) -> None:
    """Draft a policy from machines known to be good, for you to read and to change."""
    found = wanted.find_some(admin)
    text = draft(name, [one.evidence for one in found])
    admin.printer.value({"name": name, "text": text}, lambda: click.echo(text, nl=False))


@group.command(
    "diff",
    examples="""
    spire-hw-server policy diff web@3 web@4
    spire-hw-server policy diff web ./web.hcl -node spiffe://example.org/spire/agent/tpm/3f0c
    """,
)
@click.argument("before")
@click.argument("after")
@evidence_flags
@admin_flags
def diff(
    admin: Admin,
    before: str,
    after: str,
    wanted: Wanted,
) -> None:
    """Tell two policies apart (NAME, NAME@VERSION or a file), and whom the difference concerns."""
    one, other = find_policy(admin, before), find_policy(admin, after)
    differences = compare(one, other)
    found = wanted.find(admin)
    changes = [(shown, judge_both(one, other, shown.evidence)) for shown in found]

    def pretty() -> None:
        if not differences:
            click.echo("No difference.")
        policyview.print_differences(differences)
        if changes:
            click.echo()
        for shown, change in changes:
            policyview.print_change(shown, change)

    admin.printer.value(
        {
            "before": one.reference,
            "after": other.reference,
            "differences": policyview.difference_values(differences),
            "verdicts": [policyview.change_values(shown, change) for shown, change in changes],
        },
        pretty,
    )
