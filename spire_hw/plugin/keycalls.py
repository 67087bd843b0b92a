"""How often a KeyManager is asked for what, how long it takes and what goes wrong.

Names are upstream's; faults of devices count under their stable codes besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from typing_extensions import override

from spire_hw.errors import DeviceError
from spire_hw.plugin.info import Side
from spire_hw.telemetry.metrics import NO_METRICS, Timed, count_fault

if TYPE_CHECKING:
    from types import TracebackType

    from spire_hw.telemetry.metrics import Metrics

_SERVICE: Final = {Side.SERVER: "server_key_manager", Side.AGENT: "agent_key_manager"}
_GET: Final = {Side.SERVER: "get_public_key", Side.AGENT: "get_key"}
_LIST: Final = {Side.SERVER: "get_public_keys", Side.AGENT: "get_keys"}


class KeyCalls:
    """The measurements of one host's KeyManager; each method goes around one call."""

    def __init__(self, metrics: Metrics, side: Side = Side.SERVER) -> None:
        service = _SERVICE[side]
        self._metrics = metrics
        self._generate = (service, "generate_key")
        self._get = (service, _GET[side])
        self._list = (service, _LIST[side])
        self._sign = (service, "sign_data")

    def generate(self) -> Timed:
        """Go around `generate_key`."""
        return _KeyCall(self._metrics, self._generate)

    def get(self) -> Timed:
        """Go around `get_public_key`."""
        return _KeyCall(self._metrics, self._get)

    def list(self) -> Timed:
        """Go around `get_public_keys`."""
        return _KeyCall(self._metrics, self._list)

    def sign(self) -> Timed:
        """Go around a signature."""
        return _KeyCall(self._metrics, self._sign)


class _KeyCall(Timed):
    __slots__ = ()

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        if isinstance(error, DeviceError):
            count_fault(self._metrics, getattr(error, "reason", "device.failed"))


UNCOUNTED: Final = KeyCalls(NO_METRICS)
