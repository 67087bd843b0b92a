"""What the server tells of its keys: a line for each change, readiness red only when none signs."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from spire_hw.errors import UnavailableError
from spire_hw.log import get_logger
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth
from spire_hw_server.keywatch import KeyWatch

END = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)


class Device:
    """A KeyManager as far as its health goes."""

    def __init__(self) -> None:
        self.health = DeviceHealth(KeyHealth.GOOD)

    def key_health(self) -> DeviceHealth:
        return self.health


@pytest.mark.asyncio
async def test_only_keys_that_cannot_sign_are_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    device = Device()
    watch = KeyWatch(device, lambda: END, get_logger("test"))
    await watch.check()
    assert capsys.readouterr().out == ""
    device.health = DeviceHealth(KeyHealth.DEGRADED, "hsm.read_only", "cause and remedy")
    await watch.check()
    told = capsys.readouterr().out
    for part in ("level=warning", "hsm.read_only", "cause and remedy", END.isoformat()):
        assert part in told
    await watch.check()
    assert capsys.readouterr().out == ""
    device.health = DeviceHealth(KeyHealth.DOWN, "hsm.token_missing", "bring it back")
    with pytest.raises(UnavailableError, match=r"hsm\.token_missing: bring it back"):
        await watch.check()
    assert "level=error" in capsys.readouterr().out
    device.health = DeviceHealth(KeyHealth.GOOD)
    await watch.check()
    assert "can be used again" in capsys.readouterr().out


@pytest.mark.asyncio
async def test_a_key_manager_that_tells_nothing_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    await KeyWatch(object(), lambda: None, get_logger("test")).check()
    assert capsys.readouterr().out == ""
