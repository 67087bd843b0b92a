from __future__ import annotations

import contextlib
import hashlib
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import EncodingError
from spire_hw.posture import digestlist
from spire_hw.posture.digestlist import Listed, ListFaultsError

if TYPE_CHECKING:
    from pathlib import Path

ONE = "ab" * 32


def test_what_sha256sum_writes_is_read(tmp_path: Path) -> None:
    names = ["plain", "with blank", "back\\slash", "new\nline", "é"]
    for name in names:
        (tmp_path / name).write_text(name)
    made = subprocess.run(  # noqa: S603
        ["/usr/bin/sha256sum", *names], cwd=tmp_path, capture_output=True, check=True
    )
    assert digestlist.parse(made.stdout) == [
        Listed(hashlib.sha256(name.encode()).digest(), name.encode()) for name in names
    ]


def test_comments_blank_lines_and_bare_digests_are_fine() -> None:
    text = f"# kernels\n\n{ONE}\r\n{ONE.upper()}  /a\n{ONE} */b\n"
    raw = bytes.fromhex(ONE)
    found = digestlist.parse(text.encode())
    assert found == [Listed(raw, b""), Listed(raw, b"/a"), Listed(raw, b"/b")]


@pytest.mark.parametrize(
    "line",
    [
        "xyz",
        ONE + "  ",
        ONE + " /a",
        ONE + "  a\0b",
        ONE[:-1],
        ONE + "ab",
        " " + ONE,
        "SHA256 (a) = " + ONE,
        "\\" + ONE + "  a\\tb",
        "\\" + ONE + "  a\\",
        ONE[:62] + "  /short",
    ],
)
def test_lines_that_are_none_are_refused_with_their_number(line: str) -> None:
    with pytest.raises(ListFaultsError) as caught:
        digestlist.parse(f"{ONE}  /a\n{line}\n".encode())
    assert [number for number, _ in caught.value.lines] == [2]


def test_digests_of_another_size_are_refused() -> None:
    with pytest.raises(ListFaultsError, match="64 digits, expected 40 or 96"):
        digestlist.parse(ONE.encode(), {48, 20})


def test_faults_that_are_named_are_bounded() -> None:
    with pytest.raises(ListFaultsError) as caught:
        digestlist.parse(b"x\n" * 100_000)
    assert len(caught.value.lines) == 20


def test_size_is_bounded() -> None:
    with pytest.raises(EncodingError, match="larger than"):
        digestlist.parse(b"\n" * (digestlist.MAX_BYTES + 1))


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=30).filter(lambda p: b"\0" not in p))
def test_what_is_written_reads_back(digest: bytes, path: bytes) -> None:
    assert digestlist.parse(digestlist.encode_line(digest, path)) == [Listed(digest, path)]


@given(st.binary(max_size=200))
def test_nothing_but_our_error_escapes(data: bytes) -> None:
    with contextlib.suppress(EncodingError):
        assert all(listed.digest for listed in digestlist.parse(data))
