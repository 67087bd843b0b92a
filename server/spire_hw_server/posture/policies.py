"""The policies in force: files of a directory and rows of the datastore, as one checked set."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from spire_hw.aio.watch import Watch
from spire_hw.errors import ConfigError, InvalidInputError, SpireHwError
from spire_hw.posture.policyfile import parse_policy
from spire_hw.posture.policyset import PolicySet
from spire_hw_server.datastore.follow import Follower
from spire_hw_server.datastore.records import ChangeKind
from spire_hw_server.posture.policyfiles import read_policies

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.policy import Policy
    from spire_hw_server.datastore.interface import Datastore
    from spire_hw_server.datastore.records import Change, StoredPolicy


@dataclass(frozen=True, slots=True)
class Held:
    """A policy in force and where it is from.

    Attributes:
        policy: the value.
        file: its path, "" for the datastore.
        text: with all files, for one that is a file.
        row: for one of the datastore.
    """

    policy: Policy
    file: str = ""
    text: str = ""
    row: StoredPolicy | None = None


class Policies:
    """Keeps the set in force in step with the datastore; its owner starts and closes it.

    Args:
        store: holds policies made with the CLI.
        policy_dir: every `*.hcl` in it is a policy; None for none.
        clock: time.
        log: where a set that cannot be used is reported; the one before stays in force.
        poll_s: seconds between looks at what other servers did.
        full_reload_s: seconds after which everything is read anew.
    """

    def __init__(
        self,
        *,
        store: Datastore,
        policy_dir: Path | None,
        clock: Clock,
        log: Logger,
        poll_s: float = 5.0,
        full_reload_s: float = 86400.0,
    ) -> None:
        self._store = store
        self._policy_dir = policy_dir
        self._log = log
        self._watch = Watch(PolicySet())
        self._files: tuple[Held, ...] = ()
        self._rows: dict[str, Held] = {}
        self._held: Mapping[str, Held] = MappingProxyType({})
        self._started = False
        self._follower = Follower(
            store,
            self,
            name="policies",
            clock=clock,
            log=log,
            poll_s=poll_s,
            full_reload_s=full_reload_s,
        )

    @property
    def watch(self) -> Watch[PolicySet]:
        """Return the set in force, for those who judge stored evidence again when it changes."""
        return self._watch

    @property
    def current(self) -> PolicySet:
        """Return the set in force."""
        return self._watch.value

    @property
    def held(self) -> Mapping[str, Held]:
        """Return the policies in force by name, with their origin."""
        return self._held

    def policy_for(self, selectors: Collection[str]) -> Policy | None:
        """Return the policy for a node; see `PolicySet.policy_for`."""
        return self._watch.value.policy_for(selectors)

    def check(self, policy: Policy) -> None:
        """Make sure that a policy can be in force beside the others.

        Raises:
            InvalidInputError: it is a file already, or there is another for the same nodes.
        """
        held = self._held.get(policy.name)
        if held is not None and held.file:
            raise InvalidInputError(f'policy "{policy.name}" is the file {held.file}: change that')
        others = [p for p in self.current if p.name != policy.name]
        PolicySet.of([*others, policy])

    async def start(self) -> None:
        """Read everything, then follow changes in the background.

        Raises:
            ConfigError: a file or row that is no policy, with every fault.
            InvalidInputError: policies that contradict each other.
            NotReadyError: the directory or a file cannot be read.
        """
        await self._read_files()
        await self._follower.start()
        self._started = True

    async def reload(self) -> None:
        """Read everything anew, the directory too; what cannot be used is logged.

        The set before stays in force then.
        """
        before = self._files
        try:
            await self._read_files()
            await self._read_rows()
        except SpireHwError as e:
            self._files = before
            self._log.error("Policies cannot be used, those before stay in force", error=str(e))

    async def refresh(self) -> None:
        """Put in force what was stored through this server before the call.

        Raises:
            SpireHwError: the store cannot be read.
        """
        await self._follower.refresh()

    async def close(self) -> None:
        """Stop following."""
        await self._follower.close()

    async def load(self) -> None:
        """Read the datastore anew; called by the follower."""
        try:
            await self._read_rows()
        except InvalidInputError as e:
            if not self._started:
                raise
            self._log.error("Policies cannot be used, those before stay in force", error=str(e))

    async def apply(self, changes: Sequence[Change]) -> None:
        """Read what changed; called by the follower."""
        if any(change.kind is ChangeKind.POLICY for change in changes):
            await self.load()

    async def _read_files(self) -> None:
        if self._policy_dir is not None:
            found = await asyncio.to_thread(read_policies, self._policy_dir)
            self._files = tuple(Held(policy, str(path), text) for path, policy, text in found)

    async def _read_rows(self) -> None:
        rows = await self._store.list_policies()
        made = await asyncio.to_thread(_parse_rows, rows, dict(self._rows))
        _check_names(self._files, made)
        held = [*self._files, *made]
        policies = PolicySet.of(one.policy for one in held)
        self._rows = {one.policy.name: one for one in made}
        self._held = MappingProxyType({one.policy.name: one for one in held})
        if policies != self._watch.value:
            self._watch.set(policies)
            names = ", ".join(policy.reference for policy in policies)
            self._log.info("Policies are in force", policies=names or "none")


def _parse_rows(rows: Iterable[StoredPolicy], known: Mapping[str, Held]) -> list[Held]:
    """Return the policies of rows; those that are known already are not parsed again.

    Raises:
        InvalidInputError: rows that are no policies, with every fault of each.
    """
    found = []
    faults = []
    for row in rows:
        before = known.get(row.name)
        if before is not None and before.row == row:
            found.append(before)
            continue
        try:
            policy = parse_policy(row.text, f"policy {row.name}@{row.version}", version=row.version)
        except ConfigError as e:
            faults.append(e)
            continue
        if policy.name != row.name or policy.sha256 != row.sha256:
            message = f'policy "{row.name}" version {row.version} of the datastore was changed'
            raise InvalidInputError(message)
        found.append(Held(policy, row=row))
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise InvalidInputError("\n".join(e.message for e in faults))
    return found


def _check_names(files: Iterable[Held], rows: Iterable[Held]) -> None:
    names = {one.policy.name: one.file for one in files}
    for row in rows:
        if row.policy.name in names:
            file = names[row.policy.name]
            raise InvalidInputError(
                f'policy "{row.policy.name}" is both the file {file} and in the datastore:'
                f" remove the file, or start without it and `policy delete {row.policy.name}`"
            )
