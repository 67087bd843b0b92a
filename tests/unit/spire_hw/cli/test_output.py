from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click
import pytest

from spire_hw._pb import types_pb2
from spire_hw.cli.output import (
    Printer,
    count_of,
    dump,
    epoch,
    go_time,
    pick,
    relative,
    rfc3339,
    table,
    to_dict,
)
from spire_hw.errors import InvalidInputError

NOW = datetime(2026, 11, 22, 5, 0, tzinfo=UTC)


def test_json_is_the_message_with_proto_names_unset_fields_and_no_nulls() -> None:
    agent = types_pb2.Agent(
        attestation_type="tpm", selectors=[types_pb2.Selector(type="a", value="b")]
    )
    assert dump(to_dict(agent)) == (
        '{"agent_version":"","attestation_type":"tpm","banned":false,"can_reattest":false,'
        '"selectors":[{"type":"a","value":"b"}],"x509svid_expires_at":"0","x509svid_serial_number":""}'
    )


def test_a_field_is_printed_bare(capsys: pytest.CaptureFixture[str]) -> None:
    agent = types_pb2.Agent(attestation_type="tpm", banned=True)
    for field, printed in (("attestation_type", "tpm"), ("banned", "true"), ("selectors", "[]")):
        Printer(field=field).message(agent, lambda: click.echo("not this"))
        assert capsys.readouterr().out == f"{printed}\n"


def test_a_field_that_is_not_there_lists_what_is() -> None:
    with pytest.raises(InvalidInputError, match=r'no field "c".*there is: a, b'):
        pick({"a": 1, "b": [2]}, "c")
    with pytest.raises(InvalidInputError):
        pick({"b": [2]}, "b.1")
    assert pick({"b": [{"c": 2}]}, "b.0.c") == 2


def test_text_layouts() -> None:
    assert table([("SPIFFE ID", "x"), ("Banned", "true")], 18) == (
        "SPIFFE ID         : x\nBanned            : true\n"
    )
    assert [count_of(n, "entry", "entries") for n in (0, 1, 2)] == [
        "0 entries",
        "1 entry",
        "2 entries",
    ]


def test_times() -> None:
    assert go_time(1_790_000_000, utc=True) == "2026-09-21 14:13:20 +0000 UTC"
    assert rfc3339(0) == "1970-01-01T00:00:00Z"
    assert epoch(2**62).year == 9999


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (11520, "in 3 h 12 min (2026-11-22 08:12 UTC)"),
        (-176400, "2 d 1 h ago (2026-11-20 04:00 UTC)"),
        (120, "in 2 min (2026-11-22 05:02 UTC)"),
        (5, "in 5 s (2026-11-22 05:00 UTC)"),
        (-5, "5 s ago (2026-11-22 04:59 UTC)"),
        (0, "now (2026-11-22 05:00 UTC)"),
        (0.9, "now (2026-11-22 05:00 UTC)"),
    ],
)
def test_relative_times_for_people(seconds: float, words: str) -> None:
    assert relative(NOW + timedelta(seconds=seconds), NOW) == words
