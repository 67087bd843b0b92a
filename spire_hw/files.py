"""Files read within a bound, and replaced whole.

Errors name the file and the cause. What a file is for can be put in front of its path, such as
`password file` or the key of the configuration that names it.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")
_UNITS: Final = ((20, "MiB"), (10, "KiB"))


class NoFileError(NotReadyError):
    """There is no such file."""


class NotWrittenError(SpireHwError):
    """A file cannot be written."""


def read_bounded(
    path: Path, limit: int, what: str = "", *, pipes: bool = False, links: bool = True
) -> bytes:
    """Return all that a file holds.

    Args:
        path: the file.
        limit: bytes it may have; never more than one beyond is read.
        what: what the file is, in front of its path in errors.
        pipes: take what is no regular file too, and wait for whoever writes into it: for files
            that are named on a command line, such as `<(command)`. Without it such a file is
            refused at once.
        links: follow a symbolic link in the last place.

    Raises:
        NoFileError: it does not exist.
        NotReadyError: it cannot be read, or is no regular file.
        InvalidInputError: it is larger.
    """
    name = _name(path, what)
    extra = (0 if pipes else os.O_NONBLOCK) | (0 if links else os.O_NOFOLLOW)
    try:
        with open(path, "rb", opener=lambda file, flags: os.open(file, flags | extra)) as stream:
            if not pipes and not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise NotReadyError(f"{name} cannot be read: it is not a regular file")
            content = stream.read(limit + 1)
    except FileNotFoundError as e:
        raise NoFileError(f"{name} cannot be read: {e.strerror}") from e
    except PermissionError as e:
        text = f"{e.strerror}; it has to be readable for user id {os.geteuid()}"
        raise NotReadyError(f"{name} cannot be read: {text}") from e
    except OSError as e:
        raise NotReadyError(f"{name} cannot be read: {e.strerror}") from e
    except ValueError as e:  # a NUL in the name
        raise NotReadyError(f"{what} {str(path)!r} cannot be read: {e}".lstrip()) from e
    if len(content) > limit:
        raise InvalidInputError(f"{name} is larger than {_size(limit)}")
    return content


def parse_file(
    path: Path, limit: int, parse: Callable[[bytes], T], what: str = "", *, pipes: bool = False
) -> T:
    """Return what a parser makes of a file; what it has to say gets the file's name in front.

    Args:
        path: the file.
        limit: bytes it may have.
        parse: takes all of them.
        what: as in `read_bounded`.
        pipes: as in `read_bounded`.

    Raises:
        NotReadyError: as `read_bounded`.
        InvalidInputError: the file is larger, or the parser raised that.
    """
    content = read_bounded(path, limit, what, pipes=pipes)
    try:
        return parse(content)
    except InvalidInputError as e:
        raise InvalidInputError(f"{_name(path, what)}: {e.message}") from e


def create_file(path: Path, content: bytes, what: str = "", *, mode: int = 0o600) -> None:
    """Write a file that is not there yet; arguments as in `replace_file`.

    Raises:
        NotWrittenError: it is there, or cannot be written.
    """
    try:
        _create(path, content, mode)
        _sync(path.parent)
    except OSError as e:
        raise _not_written(path, what, e) from e


def replace_file(
    path: Path, content: bytes, what: str = "", *, mode: int = 0o600, shared: bool = False
) -> None:
    """Write a file so that a crash leaves the old or the new content, and all of it.

    The new content is on the disk once this returns.

    Args:
        path: the file; a symbolic link in its place is replaced, not followed.
        content: what it will hold.
        what: what the file is, in front of its path in errors.
        mode: permissions, whatever the umask.
        shared: several processes may write it at the same time. Without it the draft beside the
            file has one name, `.<name>.new`, so that what a killed process left is not kept.

    Raises:
        NotWrittenError: it cannot be written; the file is the old one, or the new one that a
            power cut may take back.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4) if shared else 'new'}")
    try:
        if not shared:
            draft.unlink(missing_ok=True)
        _create(draft, content, mode)
        draft.replace(path)
        _sync(path.parent)
    except OSError as e:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise _not_written(path, what, e) from e


def _create(path: Path, content: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fchmod(stream.fileno(), mode)
        os.fsync(stream.fileno())


def _not_written(path: Path, what: str, e: OSError) -> NotWrittenError:
    return NotWrittenError(f"{_name(path, what)} cannot be written: {e.strerror}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(path: Path, what: str) -> str:
    return f"{what} {path}" if what else str(path)


def _size(limit: int) -> str:
    for bits, unit in _UNITS:
        if limit and not limit % (1 << bits):
            return f"{limit >> bits} {unit}"
    return f"{limit} bytes"
