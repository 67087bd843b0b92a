"""What `doctor` makes of a program that runs."""

from __future__ import annotations

import socket

import pytest

from spire_hw.cli.checks import check_port, is_answering
from spire_hw.cli.findings import Finding, Level, ok, problem, warning


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (ok("socket", "it answers"), Level.OK),
        (problem("socket.not_serving", "it runs and says NOT_SERVING", "read"), Level.OK),
        (problem("socket.dead", "nobody answers", "start it"), Level.PROBLEM),
        (warning("socket.missing", "there is no socket", "start it"), Level.PROBLEM),
    ],
)
def test_a_port_belongs_to_a_program_that_runs_even_when_it_is_not_well(
    found: Finding, level: Level
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (finding,) = check_port("127.0.0.1", port, is_running=is_answering([found]))
    assert finding.level is level
