"""Whatever a plugin measures, another implementation reads what we expose."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from spire_hw.telemetry.exposition import encode
from spire_hw.telemetry.naming import Selection
from spire_hw.telemetry.registry import Registry

_NAMES = st.lists(st.text(max_size=20), min_size=1, max_size=3).map(tuple)
_LABELS = st.dictionaries(st.text(min_size=1, max_size=20), st.text(max_size=30), max_size=3)
_VALUES = st.floats(allow_nan=False)


@given(
    st.lists(
        st.tuples(st.sampled_from(["count", "gauge", "sample"]), _NAMES, _VALUES, _LABELS),
        max_size=10,
    )
)
def test_what_is_exposed_can_be_read(
    measured: list[tuple[str, tuple[str, ...], float, dict[str, str]]],
) -> None:
    registry = Registry(Selection("x"))
    for method, name, value, labels in measured:
        getattr(registry, method)(name, value, labels)
    readings = list(registry.read())
    families = list(text_string_to_metric_families(encode(readings).decode()))
    assert len(families) == len(readings)
    assert sum(len(f.samples) for f in families) == sum(
        5 if isinstance(value, tuple) else 1 for r in readings for _, value in r.series
    )
