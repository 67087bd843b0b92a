from pathlib import Path

import pytest

from spire_hw.bootid import is_boot_id, read_boot_id

ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


def test_this_boot_has_one() -> None:
    found = read_boot_id()
    assert found is not None
    assert is_boot_id(found)
    assert read_boot_id() == found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (f"{ID}\n".encode(), ID),
        (ID.upper().encode(), None),
        (f"{ID}0".encode(), None),
        (ID.replace("-", "").encode(), None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_only_that_form_is_taken(tmp_path: Path, content: bytes, found: str | None) -> None:
    (tmp_path / "boot_id").write_bytes(content)
    assert read_boot_id(tmp_path / "boot_id") == found


def test_a_kernel_without_one(tmp_path: Path) -> None:
    assert read_boot_id(tmp_path / "none") is None
