"""Column types that compare text byte by byte in every dialect.

Collations fold case (MariaDB's default), ignore trailing blanks (all PAD SPACE ones) or refuse
NUL (PostgreSQL). IDs have none of these by their grammar and stay readable text in an ASCII
binary collation; whatever an operator may have typed is kept as bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Integer, LargeBinary, String, Text
from sqlalchemy.dialects import mysql
from sqlalchemy.types import TypeDecorator, TypeEngine
from typing_extensions import override

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect


class Ascii(TypeDecorator[str]):
    """Text whose grammar is ASCII without blanks: SPIFFE IDs, entry IDs, serial numbers."""

    impl = String
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.length = length

    @override
    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return VARCHAR, in a binary collation where the database's own may fold."""
        if dialect.name == "mysql":
            return dialect.type_descriptor(
                mysql.VARCHAR(self.length, charset="ascii", collation="ascii_bin")
            )
        if dialect.name == "postgresql":
            return dialect.type_descriptor(String(self.length, collation="C"))
        return dialect.type_descriptor(String(self.length))

    @override
    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Refuse what the column cannot hold, the same way in every dialect."""
        if value is not None and (not value.isascii() or "\0" in value or len(value) > self.length):
            raise ValueError(f"not an ASCII text of at most {self.length} characters")
        return value


class Exact(TypeDecorator[str]):
    """Any Unicode text, kept as its UTF-8 bytes; `size` is their greatest number."""

    impl = LargeBinary
    cache_ok = True

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size

    @override
    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return VARBINARY where it exists, else the unbounded binary type."""
        if dialect.name == "mysql":
            return dialect.type_descriptor(mysql.VARBINARY(self.size))
        return dialect.type_descriptor(LargeBinary())

    @override
    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """Return the bytes to store."""
        if value is None:
            return None
        data = value.encode()
        if len(data) > self.size:
            raise ValueError(f"text is longer than {self.size} bytes")
        return data

    @override
    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        """Return the text that was stored."""
        return None if value is None else bytes(value).decode()


class Digest(TypeDecorator[bytes]):
    """A SHA-256 digest."""

    impl = LargeBinary
    cache_ok = True

    @override
    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return BINARY(32) where it exists, else the unbounded binary type."""
        if dialect.name == "mysql":
            return dialect.type_descriptor(mysql.BINARY(32))
        return dialect.type_descriptor(LargeBinary())

    @override
    def process_result_value(self, value: bytes | None, dialect: Dialect) -> bytes | None:
        """Return plain bytes; some drivers hand out views."""
        return None if value is None else bytes(value)


def row_number() -> TypeEngine[int]:
    """Return the type of row numbers; SQLite counts up by itself for INTEGER only."""
    return BigInteger().with_variant(Integer(), "sqlite")


def seconds() -> TypeEngine[int]:
    """Return the type of times, kept as seconds since 1970 UTC."""
    return BigInteger()


def json_text() -> TypeEngine[str]:
    """Return the type of ASCII JSON up to 16 MiB."""
    return Text().with_variant(mysql.MEDIUMTEXT(charset="ascii", collation="ascii_bin"), "mysql")


def blob() -> TypeEngine[bytes]:
    """Return the type of bytes up to 16 MiB."""
    return LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql")
