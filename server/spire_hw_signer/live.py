"""Policy and keys as they are now, and how new ones take their place while the signer runs.

A policy that cannot be used changes nothing but raises an alarm. Which policy is in force stands in
the audit log before anything is done under it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Final

from spire_hw.errors import NotReadyError, SpireHwError
from spire_hw_signer.audit.record import cut
from spire_hw_signer.keys import OwnerKeys, open_owner
from spire_hw_signer.policyfile import describe, load_policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

    from spire_hw.log import Logger
    from spire_hw.telemetry.metrics import Metrics
    from spire_hw_signer.audit.log import AuditLog
    from spire_hw_signer.keys import Opener
    from spire_hw_signer.policy import Custody, Owner, Policy
    from spire_hw_signer.tlsfiles import TlsFiles

ORDER: Final = "order"
_RELOAD: Final = ("reload",)
_ALARM: Final = ("alarm",)


class Live:
    """What changes while the signer runs."""

    def __init__(
        self,
        *,
        policy_file: Path,
        data_dir: Path,
        opener: Opener,
        tls: TlsFiles | None,
        audit: AuditLog,
        metrics: Metrics,
        log: Logger,
        has_operators: bool = False,
    ) -> None:
        """Make it; `open` loads it.

        Args:
            policy_file: who may do what.
            data_dir: of the signer.
            opener: makes KeyManagers.
            tls: of the TCP door.
            audit: told of every policy before it is in force.
            metrics: counts what was read again, and alarms.
            log: where it is told as well.
            has_operators: whether operators have to agree to a change of policy; one by a signal is
                an alarm then.
        """
        self._file = policy_file
        self._data_dir = data_dir
        self._opener = opener
        self._tls = tls
        self._audit = audit
        self._metrics = metrics
        self._log = log
        self._has_operators = has_operators
        self._policy: Policy | None = None
        self._owners: dict[Owner, OwnerKeys] = {}
        self._custody: dict[Owner, Custody] = {}
        self._changing = asyncio.Lock()
        self._fault = ""

    @property
    def policy(self) -> Policy:
        """Return the policy in force."""
        if self._policy is None:
            raise NotReadyError("no policy was loaded yet")
        return self._policy

    @property
    def owners(self) -> Mapping[Owner, OwnerKeys]:
        """Return the keys of each owner that the policy names."""
        return self._owners

    @property
    def fault(self) -> str:
        """Return why the files of the last reload are not in force, "" when they are."""
        return self._fault

    async def open(self) -> None:
        """Load the policy and open the keys it names.

        Raises:
            SpireHwError: the policy has faults, or keys cannot be opened.
        """
        async with self._changing:
            await self._use(await asyncio.to_thread(load_policy, self._file), "start")

    async def reload(self, meant: str = "", *, by: str) -> bool:
        """Read policy and TLS files again; tell whether all of them are in force now.

        Args:
            meant: hash of the only policy that is taken, "" for any.
            by: what asked for it, `order` or a signal.
        """
        async with self._changing:
            faults = [f async for f in self._reload(meant, by)]
        self._fault = "; ".join(faults)
        return not faults

    async def _reload(self, meant: str, by: str) -> AsyncIterator[str]:
        steps: dict[str, Callable[[], Awaitable[None]]]
        steps = {"policy": partial(self._reload_policy, meant, by), "tls": self._reload_tls}
        for what, step in steps.items():
            try:
                await step()
            except SpireHwError as e:
                self._audit.note(f"{what}_refused", {"error": cut(e.message)})
                self._metrics.count(_RELOAD, labels={"what": what, "result": "failed"})
                self._log.error(
                    "Signer alarm: a file cannot be used, what was in force stays",
                    what=what,
                    error=e.message,
                )
                yield e.message
            else:
                self._metrics.count(_RELOAD, labels={"what": what, "result": "done"})

    async def _reload_policy(self, meant: str, by: str) -> None:
        policy = await asyncio.to_thread(load_policy, self._file)
        if meant not in {"", policy.hash}:
            raise NotReadyError(f"{self._file} has policy {policy.hash}, meant is {meant}")
        before = self.policy.hash
        await self._use(policy, by)
        if self._has_operators and by != ORDER and policy.hash != before:
            self._metrics.count(_ALARM, labels={"reason": "no_order"})
            self._log.error(
                "Signer alarm: the policy was changed without an order",
                by=by,
                policy=policy.hash,
                before=before,
            )

    async def _reload_tls(self) -> None:
        if self._tls is not None:
            await asyncio.to_thread(self._tls.load)
            self._audit.note("tls_loaded", {"not_after": self._tls.not_after.isoformat()})

    async def _use(self, policy: Policy, by: str) -> None:
        """Put a policy in force: its keys first, the log next, itself last."""
        wanted = policy.owners()
        opened: dict[Owner, OwnerKeys] = {}
        try:
            for owner, client in wanted.items():
                if owner not in self._owners:
                    opened[owner] = await open_owner(
                        owner, self._data_dir, client.custody, self._opener
                    )
                elif self._custody[owner] != client.custody:
                    await self._owners[owner].use(client.custody)
                    self._custody[owner] = client.custody
        except BaseException:
            for keys in opened.values():
                await keys.close()
            raise
        before = "" if self._policy is None else self._policy.hash
        self._audit.note("policy_loaded", {"policy": policy.hash, "before": before, "by": by})
        for text in describe(policy):
            self._log.warning(text)
        gone = [keys for owner, keys in self._owners.items() if owner not in wanted]
        kept = {owner: keys for owner, keys in self._owners.items() if owner in wanted}
        self._policy, self._owners = policy, {**kept, **opened}
        self._custody = {owner: client.custody for owner, client in wanted.items()}
        for keys in gone:
            async with keys.changing:
                await keys.close()
        self._log.info("Policy is in force", policy=policy.hash, clients=len(policy.clients))

    async def close(self) -> None:
        """Let go of all keys."""
        while self._owners:
            await self._owners.pop(next(iter(self._owners))).close()
