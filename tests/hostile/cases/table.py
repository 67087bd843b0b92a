"""All numbered cases, in their order."""

from __future__ import annotations

from typing import Final

from tests.hostile.cases import evidence, keys, logs, nodes, stream

CASES: Final = tuple(
    sorted(
        (*stream.CASES, *keys.CASES, *evidence.CASES, *logs.CASES, *nodes.CASES),
        key=lambda case: case.number,
    )
)
