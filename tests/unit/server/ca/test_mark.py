from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import EncodingError, SpireHwError
from spire_hw_server.ca.mark import FILE_NAME, AuthorityMark

if TYPE_CHECKING:
    from pathlib import Path


def test_nothing_stored_is_no_id(tmp_path: Path) -> None:
    assert AuthorityMark(tmp_path).load() == ()


def test_ids_are_stored_and_replaced(tmp_path: Path) -> None:
    mark = AuthorityMark(tmp_path)
    mark.store(("a",))
    mark.store(("b", "a"))
    assert AuthorityMark(tmp_path).load() == ("b", "a")
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "text", ["", "junk", "[]", "{}", '{"x509_authority_ids": "a"}', '{"x509_authority_ids": [1]}']
)
def test_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(EncodingError):
        AuthorityMark(tmp_path).load()


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text('{"x509_authority_ids": []}')
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "other")
    with pytest.raises(SpireHwError, match="cannot be read"):
        AuthorityMark(tmp_path).load()


def test_a_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(SpireHwError, match="cannot be written"):
        AuthorityMark(tmp_path / "absent").store(("a",))
