"""What is measured comes out as a Prometheus client reads it, within bounds."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from spire_hw.errors import ErrorKind, NotFoundError, SpireHwError
from spire_hw.telemetry.exposition import encode
from spire_hw.telemetry.metrics import NO_METRICS, Labelled, Timed, count_fault, status_of
from spire_hw.telemetry.naming import Selection, clean, family_name
from spire_hw.telemetry.process import read_process
from spire_hw.telemetry.registry import Registry


class _Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _registry(selection: Selection | None = None, **settings: object) -> Registry:
    return Registry(selection or Selection("spire_server"), **settings)  # type: ignore[arg-type]


def _samples(registry: Registry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return what another implementation reads; it calls every counter `…_total` itself."""
    text = encode(registry.read()).decode()
    return {
        (s.name.removesuffix("_total"), tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_what_shares_a_registry_is_told_apart_by_a_label() -> None:
    registry = _registry()
    for owner, value in (("a.org/one", 1), ("a.org/two", 2)):
        metrics = Labelled(registry, {"owner": owner})
        metrics.gauge(("hsm", "waiting"), value, {"hsm": "t"})
        metrics.count(("hsm", "fault"), by=value)
        metrics.sample(("hsm", "taken"), value)
    found = _samples(registry)
    for owner, value in (("a_org_one", 1), ("a_org_two", 2)):
        label = ("owner", owner)
        assert found["spire_server_hsm_waiting", (("hsm", "t"), label)] == value
        assert found["spire_server_hsm_fault", (label,)] == value
        assert found["spire_server_hsm_taken_sum", (label,)] == value


def test_counters_and_gauges_are_read_under_upstreams_names() -> None:
    registry = _registry(constant={"host": "node-1.example.org"})
    registry.count(("ca", "manager", "x509_ca", "activate"))
    registry.count(("ca", "manager", "x509_ca", "activate"), 2)
    registry.gauge(("manager", "x509_ca", "rotate", "ttl"), 3.5, {"trust_domain_id": "a.org"})
    found = _samples(registry)
    host = ("host", "node-1.example.org")
    assert found["spire_server_ca_manager_x509_ca_activate", (host,)] == 3
    labels = (host, ("trust_domain_id", "a_org"))
    assert found["spire_server_manager_x509_ca_rotate_ttl", labels] == 3.5


def test_text_declares_the_type_without_a_suffix_of_the_format() -> None:
    registry = _registry()
    registry.count(("svid", "rotate"))
    text = encode(registry.read()).decode()
    assert "# TYPE spire_server_svid_rotate counter\nspire_server_svid_rotate 1\n" in text


def test_a_call_counter_counts_and_times_with_the_status_of_grpc() -> None:
    registry = _registry()
    with Timed(registry, ("svid", "rotate")):
        pass
    with pytest.raises(NotFoundError), Timed(registry, ("svid", "rotate"), {"a": "b"}):
        raise NotFoundError("gone")
    found = _samples(registry)
    assert found["spire_server_svid_rotate", (("status", "OK"),)] == 1
    failed = (("a", "b"), ("status", "NotFound"))
    assert found["spire_server_svid_rotate", failed] == 1
    assert found["spire_server_svid_rotate_elapsed_time_count", failed] == 1
    quantile = (("quantile", "0.5"), ("status", "OK"))
    median = found["spire_server_svid_rotate_elapsed_time", quantile]
    assert median >= 0


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_error_has_a_status_word(kind: ErrorKind) -> None:
    assert status_of(SpireHwError("x", kind=kind)).isalpha()


def test_a_cancelled_call_and_a_bug_are_told_apart() -> None:
    assert status_of(asyncio.CancelledError()) == "Canceled"
    assert status_of(GeneratorExit()) == "Canceled"
    assert status_of(ValueError()) == "Unknown"
    assert status_of(None) == "OK"


def test_quantiles_are_of_the_last_values_and_forget_old_ones() -> None:
    now = _Time()
    registry = _registry(monotonic=now)
    for value in range(1, 101):
        registry.sample(("x",), value)
    found = _samples(registry)
    assert found["spire_server_x", (("quantile", "0.5"),)] == 50
    assert found["spire_server_x", (("quantile", "0.9"),)] == 90
    assert found["spire_server_x", (("quantile", "0.99"),)] == 99
    now.now += 601
    later = _samples(registry)
    assert math.isnan(later["spire_server_x", (("quantile", "0.5"),)])
    assert later["spire_server_x_count", ()] == 100
    assert later["spire_server_x_sum", ()] == 5050


def test_a_distribution_keeps_a_bounded_number_of_values() -> None:
    registry = _registry()
    for value in range(10_000):
        registry.sample(("x",), value)
    found = _samples(registry)
    assert found["spire_server_x", (("quantile", "0.5"),)] >= 9_700
    assert found["spire_server_x_count", ()] == 10_000


def test_series_without_end_are_dropped_and_counted() -> None:
    registry = _registry(max_series=50)
    for number in range(500):
        registry.count(("x",), labels={"peer": f"p{number}"})
    found = _samples(registry)
    assert len(found) <= 50
    assert found["spire_server_telemetry_dropped", ()] == 500 - 49


def test_one_name_is_of_one_kind() -> None:
    registry = _registry()
    registry.count(("x",))
    registry.gauge(("x",), 7)
    found = _samples(registry)
    assert found["spire_server_x", ()] == 1
    assert found["spire_server_telemetry_dropped", ()] == 1


def test_a_part_of_a_distribution_is_no_name_for_something_else() -> None:
    registry = _registry()
    registry.sample(("x",), 1)
    registry.count(("x", "count"))
    registry.gauge(("y_sum",), 1)
    registry.sample(("y",), 1)
    found = _samples(registry)
    assert found["spire_server_x_count", ()] == 1
    assert found["spire_server_y_sum", ()] == 1
    assert found["spire_server_telemetry_dropped", ()] == 2


def test_labels_that_are_prometheus_own_get_other_names() -> None:
    registry = _registry()
    given = {"__name__": "a", "quantile": "b", "0": "c", "_:": "d"}
    registry.sample(("x",), 1, given)
    ((_, pairs),) = [k for k in _samples(registry) if k[0] == "spire_server_x_count"]
    assert dict(pairs) == {"_name__": "a", "exported_quantile": "b", "_0": "c", "_": "d"}


def test_forgotten_series_are_gone_and_can_come_back() -> None:
    registry = _registry()
    registry.gauge(("custody",), 1, {"id": "a"})
    registry.forget(("custody",))
    registry.gauge(("custody",), 1, {"id": "b"})
    assert [k for k in _samples(registry) if k[0].endswith("custody")] == [
        ("spire_server_custody", (("id", "b"),))
    ]


def test_gauges_are_set_right_before_they_are_read() -> None:
    registry = _registry()
    registry.before_reading(lambda: registry.gauge(("connections",), 4))
    assert _samples(registry)["spire_server_connections", ()] == 4


def test_whatever_a_plugin_names_stays_a_name_and_a_label() -> None:
    registry = _registry()
    registry.count(("a b", 'x"}\n# TYPE y counter', "é"), labels={'l"\n': 'v"\n\\'})
    families = list(text_string_to_metric_families(encode(registry.read()).decode()))
    assert {f.name for f in families} == {
        "spire_server_a_b_x_____TYPE_y_counter__",
        "spire_server_telemetry_dropped",
    }


def test_faults_of_devices_have_one_counter_with_the_code_as_label() -> None:
    registry = _registry()
    count_fault(registry, "hsm.token_missing")
    assert _samples(registry)["spire_server_hsm_fault", (("code", "token_missing"),)] == 1


def test_the_longest_prefix_decides_and_labels_can_be_left_out() -> None:
    registry = _registry(
        Selection(
            "spire_server",
            allowed=("spire_server.rpc.svid",),
            blocked=("spire_server.rpc",),
            blocked_labels=frozenset({"peer"}),
        )
    )
    registry.count(("rpc", "svid"), labels={"peer": "x", "status": "OK"})
    registry.count(("rpc", "bundle"))
    registry.count(("other",))
    names = {name for name, _ in _samples(registry)}
    assert names == {
        "spire_server_rpc_svid",
        "spire_server_other",
        "spire_server_telemetry_dropped",
    }
    assert ("spire_server_rpc_svid", (("status", "OK"),)) in _samples(registry)


def test_only_allowed_labels_are_kept_where_some_are_named() -> None:
    assert Selection("x", allowed_labels=frozenset({"a"})).takes_label("a")
    assert not Selection("x", allowed_labels=frozenset({"a"})).takes_label("b")
    assert not Selection("x", allowed_labels=frozenset()).takes_label("a")


def test_threads_lose_no_count() -> None:
    registry = _registry()

    def work() -> None:
        for _ in range(2000):
            registry.count(("x",))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _samples(registry)["spire_server_x", ()] == 8000


def test_the_process_tells_its_memory_and_descriptors() -> None:
    text = encode(read_process()).decode()
    found = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert found["process_resident_memory_bytes"] > 1 << 20
    assert found["process_open_fds"] >= 3
    assert found["process_start_time_seconds"] > 0


def test_what_takes_nothing_down_takes_everything() -> None:
    NO_METRICS.count(("x",))
    NO_METRICS.gauge(("x",), 1)
    NO_METRICS.sample(("x",), 1)
    with Timed(NO_METRICS, ("x",)):
        pass


def test_labels_are_spelt_as_upstream_spells_them() -> None:
    assert clean("spiffe://example.org/x") == "spiffe_example_org_x"
    assert clean("a._b") == "a_b"
    assert family_name("p", ("a.b", "c-d")) == "p_a_b_c_d"
