"""What all tests share."""

from __future__ import annotations

_READABLE_BYTES = 12


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a test by its parameter, not by bytes: keys and signatures differ in every process.

    Workers of pytest-xdist have to collect the same names.
    """
    if isinstance(val, bytes | bytearray) and len(val) > _READABLE_BYTES:
        return argname
    return None
