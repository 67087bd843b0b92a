"""What the log tells under a code is counted; measurements of plugins arrive."""

from __future__ import annotations

from datetime import timedelta

import pytest

from spire_hw.errors import DeviceError, UnavailableError
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.plugin.info import Side
from spire_hw.plugin.keycalls import KeyCalls
from spire_hw.plugin.metrics import PluginMetrics
from spire_hw.telemetry.exposition import encode
from spire_hw.telemetry.logged import count_log_lines
from spire_hw.telemetry.naming import Selection
from spire_hw.telemetry.registry import Registry
from spire_hw_sim.clock import SimClock


def registry() -> Registry:
    return Registry(Selection("x"))


def text(found: Registry) -> str:
    return encode(found.read()).decode()


def test_lines_with_a_code_are_counted_until_told_to_stop() -> None:
    found, log = registry(), get_logger("hsm")
    stop = count_log_lines(found)
    log.warning("hsm.read_only", hsm="a/b")
    log.warning("hsm.read_only")
    log.error("hsm.task_failed")
    log.warning("The token is away")
    log.warning("hsm.read only")
    stop()
    log.warning("hsm.read_only")
    said = text(found)
    assert 'x_hsm_event{code="read_only",level="warning"} 2\n' in said
    assert 'x_hsm_event{code="task_failed",level="error"} 1\n' in said
    assert said.count("x_hsm_event{") == 2


def test_a_second_program_in_the_process_is_not_stopped_by_the_first() -> None:
    first, second = registry(), registry()
    stop_first = count_log_lines(first)
    stop_second = count_log_lines(second)
    stop_first()
    get_logger("hsm").warning("hsm.read_only")
    stop_second()
    assert "x_hsm_event" in text(second)
    assert "x_hsm_event" not in text(first)


def test_calls_of_a_key_manager_and_the_faults_of_its_device() -> None:
    found = registry()
    calls = KeyCalls(found, Side.AGENT)
    for call in (calls.generate, calls.get, calls.list, calls.sign):
        with call():
            pass
    with pytest.raises(TokenError), calls.sign():
        raise TokenError("gone", reason="hsm.token_missing", operation="sign")
    with pytest.raises(DeviceError), calls.sign():
        raise DeviceError("odd", device="d", operation="o")
    with pytest.raises(UnavailableError), calls.sign():
        raise UnavailableError("away")
    said = text(found)
    for name in ("generate_key", "get_key", "get_keys", "sign_data"):
        assert f'x_agent_key_manager_{name}{{status="OK"}} 1\n' in said
    assert 'x_hsm_fault{code="token_missing"} 1\n' in said
    assert 'x_device_fault{code="failed"} 1\n' in said
    assert 'x_agent_key_manager_sign_data{status="Internal"} 2\n' in said
    assert 'x_agent_key_manager_sign_data{status="Unavailable"} 1\n' in said


@pytest.mark.asyncio
async def test_measurements_of_plugins_reach_the_hosts_metrics() -> None:
    found, clock = registry(), SimClock()
    metrics = PluginMetrics(get_logger("test"), clock, found)
    await metrics.incr_counter(["mine", "calls"], 2, {"a": "b"})
    await metrics.incr_counter(["mine", "calls"], -5, {"a": "b"})
    await metrics.set_gauge(["mine", "size"], 7)
    await metrics.add_sample(["mine", "took"], 3)
    await metrics.measure_since(["mine", "waited"], clock.now() - timedelta(seconds=2))
    await metrics.emit_key(["mine", "key"], 1)
    said = text(found)
    assert 'x_mine_calls{a="b"} 2\n' in said
    assert "x_mine_size 7\n" in said
    assert "x_mine_took_sum 3\n" in said
    assert 'x_mine_waited{quantile="0.5"} 2000\n' in said
    assert "mine_key" not in said
