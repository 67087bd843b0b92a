"""A token of its own with key managers on it, and the means to ill-treat both."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, TypeVar

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.log import get_logger
from spire_hw.pkcs11.pool.pin import Refusals
from spire_hw.pkcs11.pool.place import Pins
from spire_hw.pkcs11.pool.process import WORKER
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.keymanager import pkcs11
from spire_hw_sim.pkcs11faults import Faults
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import TracebackType

    from spire_hw.clock import Clock
    from spire_hw_sim.clock import SimClock

T = TypeVar("T")

PIN: Final = "secret-4321"
SPY: Final = Path("/usr/lib/x86_64-linux-gnu/pkcs11/pkcs11-spy.so")
_MEDDLER: Final = """
import sys, pkcs11
from pkcs11 import Attribute, KeyType, MechanismFlag, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters
PRIVATE, PUBLIC, DATA = ObjectClass.PRIVATE_KEY, ObjectClass.PUBLIC_KEY, ObjectClass.DATA
def find(**wanted):
    return list(session.get_objects({Attribute[n]: v for n, v in wanted.items()}))
def make(label, cka_id, **private):
    curve = {Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
    return session.create_domain_parameters(KeyType.EC, curve, local=True).generate_keypair(
        store=True, label=label, id=cka_id,
        capabilities=MechanismFlag.SIGN | MechanismFlag.VERIFY,
        private_template={Attribute[n]: v for n, v in private.items()})
session = pkcs11.lib(sys.argv[1]).get_token(token_label="spire").open(rw=True, user_pin=sys.argv[2])
exec(sys.stdin.read())
session.close()
"""


class TokenRig:
    """One SoftHSM token named `spire`; closes the key managers it made.

    Attributes:
        hsm: the store.
        pin_file: where the key managers find the PIN.
        clock: the key managers' clock.
        holds_data_dir: what key managers are told of their data directory.
    """

    def __init__(self, folder: Path, clock: Clock | None = None, *, tampered: bool = False) -> None:
        self.folder = folder
        self.hsm = SoftHsm(folder / "hsm")
        self.serial = self.hsm.init_token("spire", pin=PIN)
        self.pin_file = folder / "pin"
        self.clock = clock or SystemClock()
        self._faults = Faults(folder / "faults", self.hsm.module) if tampered else None
        self.write_pin(PIN)
        self._stack = AsyncExitStack()
        self._refusals = Refusals()
        self.holds_data_dir = True

    async def __aenter__(self) -> Self:
        """Return itself."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the key managers."""
        await self._stack.aclose()

    @property
    def faults(self) -> Faults:
        """Return what goes wrong in the workers of a tampered rig."""
        if self._faults is None:
            raise ValueError("the rig was not made with tampered=True")
        return self._faults

    def write_pin(self, pin: str) -> None:
        """Put a PIN into the PIN file."""
        self.pin_file.write_text(pin + "\n")
        self.pin_file.chmod(0o600)

    def forget_pins(self) -> None:
        """Have key managers that are made from now on know as little of PINs as another process."""
        self._refusals = Refusals()

    def config(self, **changes: object) -> Body:
        """Return a configuration; None takes a setting out."""
        values: dict[str, object] = {
            "module_path": self.hsm.module,
            "token_label": "spire",
            "pin_file": str(self.pin_file),
            "key_identifier_value": "server-1",
            "start_timeout": "30s",
            "generations_per_day": 0,
            "environment": self.hsm.environment,
        }
        return Body.from_dict({k: v for k, v in {**values, **changes}.items() if v is not None})

    def spied(self) -> dict[str, object]:
        """Return settings that put OpenSC's tracer between key manager and token."""
        environment = {
            **self.hsm.environment,
            "PKCS11SPY": self.hsm.module,
            "PKCS11SPY_OUTPUT": str(self.folder / "spy.log"),
        }
        return {"module_path": str(SPY), "environment": environment}

    def calls(self, name: str) -> int:
        """Return how often a function of the token was called, over all workers."""
        log = self.folder / "spy.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return sum(line.partition(": ")[2].strip() == name for line in lines)

    def build(self, data: str = "data") -> pkcs11.Pkcs11KeyManager:
        """Make a key manager with a data directory of that name."""
        data_dir = self.folder / data
        data_dir.mkdir(mode=0o700, exist_ok=True)
        manager = pkcs11.build(
            HostInfo(
                side=Side.SERVER,
                trust_domain=TrustDomain.parse("example.org"),
                data_dir=data_dir,
                log=get_logger("rig"),
                clock=self.clock,
                holds_data_dir=self.holds_data_dir,
            ),
            WORKER if self._faults is None else self._faults.command,
            Pins(self._refusals),
        )
        self._stack.push_async_callback(manager.close)
        return manager

    async def start(self, data_name: str = "data", /, **changes: object) -> pkcs11.Pkcs11KeyManager:
        """Make and configure a key manager."""
        manager = self.build(data_name)
        await manager.configure(self.config(**changes))
        return manager

    def meddle(self, statements: str) -> str:
        """Run statements over python-pkcs11 in another process, logged in; return what it prints."""
        done = subprocess.run(
            [sys.executable, "-c", _MEDDLER, self.hsm.module, PIN],
            input=statements,
            env={**os.environ, **self.hsm.environment},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout

    def objects(self) -> list[str]:
        """Return class, label and hex id of each half of a key on the token."""
        shown = self.meddle(
            "for o in find(CLASS=PRIVATE) + find(CLASS=PUBLIC):\n"
            "    print(o[Attribute.CLASS].name, o[Attribute.LABEL], o[Attribute.ID].hex())"
        )
        return sorted(shown.splitlines())


async def settled(manager: pkcs11.Pkcs11KeyManager) -> None:
    """Wait until replaced keys are gone from the token.

    Raises:
        TimeoutError: they do not go.
    """
    keyring = manager._keyring  # noqa: SLF001 - no host waits for that
    if keyring is None:
        raise ValueError("the key manager was not configured")
    async with asyncio.timeout(60):
        await keyring.disposal.wait_empty()


async def waited(clock: SimClock, call: Awaitable[T]) -> T:
    """Move a clock for as long as a call takes that waits for it.

    Raises:
        TimeoutError: it waits for something else.
    """
    work = asyncio.gather(call)
    async with asyncio.timeout(60):
        while not work.done():
            await clock.advance(timedelta(seconds=1))
            await asyncio.sleep(0.05)
    (result,) = await work
    return result
