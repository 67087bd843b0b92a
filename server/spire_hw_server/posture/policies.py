"""The policies in force: files of a directory and rows of the datastore, as one checked set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spire_hw.aio.watch import Watch
from spire_hw.posture.policyset import PolicySet

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from spire_hw.clock import Clock
    from spire_hw.log import Logger
    from spire_hw.posture.policy import Policy
    from spire_hw_server.datastore.interface import Datastore


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
        self._watch = Watch(PolicySet())

    @property
    def watch(self) -> Watch[PolicySet]:
        """Return the set in force, for those who judge stored evidence again when it changes."""
        return self._watch

    @property
    def current(self) -> PolicySet:
        """Return the set in force."""
        return self._watch.value

    def policy_for(self, selectors: Collection[str]) -> Policy | None:
        """Return the policy for a node; see `PolicySet.policy_for`."""
        return self._watch.value.policy_for(selectors)

    async def start(self) -> None:
        """Read everything, then follow changes in the background.

        Raises:
            ConfigError: a file or row that is no policy, with every fault.
            InvalidInputError: policies that contradict each other.
            NotReadyError: the directory or a file cannot be read.
        """
        raise NotImplementedError

    async def reload(self) -> None:
        """Read everything anew, the directory too.

        Raises:
            SpireHwError: as `start`; the set before stays in force.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """Stop following."""
        raise NotImplementedError
