import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from spire_hw.errors import EncodingError, InvalidInputError, NotReadyError
from spire_hw.files import (
    NoFileError,
    NotWrittenError,
    create_file,
    parse_file,
    read_bounded,
    replace_file,
)


def test_a_file_may_have_as_much_as_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12345")
    assert read_bounded(file, 5) == b"12345"
    with pytest.raises(InvalidInputError) as caught:
        read_bounded(file, 4, "the list")
    assert caught.value.message == f"the list {file} is larger than 4 bytes"


@pytest.mark.parametrize(
    ("limit", "words"),
    [(1 << 20, "1 MiB"), (4 << 10, "4 KiB"), (1025, "1025 bytes"), (0, "0 bytes")],
)
def test_limits_are_told_in_round_units(tmp_path: Path, limit: int, words: str) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(limit + 1))
    with pytest.raises(InvalidInputError, match=f"^{file} is larger than {words}$"):
        read_bounded(file, limit)


def test_what_grows_without_end_is_not_read_to_its_end() -> None:
    with pytest.raises(InvalidInputError, match=r"/dev/zero is larger than 4 KiB"):
        read_bounded(Path("/dev/zero"), 4096, pipes=True)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoFileError) as caught:
        read_bounded(tmp_path / "none", 1, "key file")
    assert caught.value.message == (
        f"key file {tmp_path}/none cannot be read: No such file or directory"
    )


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link", "/dev/zero"):
        with pytest.raises(NotReadyError, match="cannot be read: it is not a regular file"):
            read_bounded(tmp_path / name, 10)
    with pytest.raises(NotReadyError, match="cannot be read: Is a directory"):
        read_bounded(tmp_path, 10)
    with pytest.raises(NotReadyError, match="cannot be read: Is a directory"):
        read_bounded(tmp_path, 10, pipes=True)


def test_a_socket_is_no_file(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{short}/s")
        with pytest.raises(NotReadyError, match="cannot be read: No such device or address"):
            read_bounded(Path(short, "s"), 10)


def test_pipes_are_waited_for_when_they_are_wanted(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(b"late",))
    writer.start()
    assert read_bounded(fifo, 10, pipes=True) == b"late"
    writer.join()


def test_links_are_followed_unless_forbidden(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    assert read_bounded(tmp_path / "link", 1) == b"x"
    with pytest.raises(NotReadyError, match="cannot be read: Too many levels of symbolic links"):
        read_bounded(tmp_path / "link", 1, links=False)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(NotReadyError, match=r"list 'a\\x00b' cannot be read: embedded null byte"):
        read_bounded(Path("a\0b"), 1, "list")


def test_who_may_not_read_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch(mode=0)
    before = os.geteuid()
    os.seteuid(before or 65534)  # root reads everything
    try:
        text = f"Permission denied; it has to be readable for user id {os.geteuid()}"
        with pytest.raises(NotReadyError, match=f"cannot be read: {text}"):
            read_bounded(file, 1)
    finally:
        os.seteuid(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("shared", [False, True])
def test_replacing_leaves_nothing_else_behind(tmp_path: Path, shared: bool) -> None:
    file = tmp_path / "a"
    replace_file(file, b"first", shared=shared)
    assert (file.read_bytes(), mode_of(file)) == (b"first", 0o600)
    replace_file(file, b"second", mode=0o644, shared=shared)
    assert (file.read_bytes(), mode_of(file)) == (b"second", 0o644)
    assert list(tmp_path.iterdir()) == [file]


def test_the_mode_does_not_hang_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        replace_file(tmp_path / "a", b"", mode=0o755)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == 0o755


def test_what_is_there_is_not_created(tmp_path: Path) -> None:
    create_file(tmp_path / "a", b"first", mode=0o640)
    assert ((tmp_path / "a").read_bytes(), mode_of(tmp_path / "a")) == (b"first", 0o640)
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("a", "link"):
        with pytest.raises(
            NotWrittenError, match=f"request .*{name} cannot be written: File exists"
        ):
            create_file(tmp_path / name, b"second", "request")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("shared", [False, True])
def test_links_are_replaced_and_not_followed(tmp_path: Path, shared: bool) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"old")
    for name in ("a", ".a.new"):
        (tmp_path / name).symlink_to(victim)
    replace_file(tmp_path / "a", b"new", shared=shared)
    assert victim.read_bytes() == b"old"
    assert not (tmp_path / "a").is_symlink()
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_draft_of_a_killed_process_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / ".a.new").write_bytes(b"half")
    replace_file(tmp_path / "a", b"whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.parametrize("shared", [False, True])
def test_what_cannot_be_written_is_as_it_was(tmp_path: Path, shared: bool) -> None:
    taken = tmp_path / "a"
    taken.mkdir()
    with pytest.raises(NotWrittenError, match=r"key file .*a cannot be written: Is a directory"):
        replace_file(taken, b"x", "key file", shared=shared)
    assert list(tmp_path.iterdir()) == [taken]
    with pytest.raises(NotWrittenError, match="cannot be written: No such file or directory"):
        replace_file(tmp_path / "none" / "a", b"x", shared=shared)


def test_many_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    contents = [bytes([n]) * 100_000 for n in range(8)]
    writers = [
        threading.Thread(target=replace_file, args=(file, c), kwargs={"shared": True})
        for c in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_parser_says_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"12")
    assert parse_file(file, 2, int) == 12

    def refuse(content: bytes) -> int:
        raise EncodingError("list", f"{len(content)} bytes make no list", 1)

    for what, head in (("", f"{file}"), ("lists at", f"lists at {file}")):
        with pytest.raises(InvalidInputError) as caught:
            parse_file(file, 2, refuse, what)
        assert caught.value.message == f"{head}: list at byte 1: 2 bytes make no list"
        with pytest.raises(InvalidInputError) as caught:
            parse_file(file, 1, int, what)
        assert caught.value.message == f"{head} is larger than 1 bytes"
    with pytest.raises(NotReadyError, match="/dev/null cannot be read: it is not a regular file"):
        parse_file(Path("/dev/null"), 1, len)
    assert parse_file(Path("/dev/null"), 1, len, pipes=True) == 0
