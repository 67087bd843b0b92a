"""Lists that are read in parts: by the number of the row the last part ended with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from spire_hw.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Row, Select

    from spire_hw_server.datastore.records import Page
    from spire_hw_server.datastore.sql.transaction import Transaction

_MAX_ROW: Final = 2**63 - 1
_MAX_TOKEN: Final = 19


def after_row(page: Page) -> int:
    """Return the row number a page starts after.

    Raises:
        InvalidInputError: the token is not one of ours, or the size is negative.
    """
    if page.size < 0:
        raise InvalidInputError("page size is negative")
    if not page.token:
        return 0
    token = page.token
    if (
        len(token) > _MAX_TOKEN
        or not (token.isascii() and token.isdigit())
        or int(token) > _MAX_ROW
    ):
        raise InvalidInputError("page token is not one of ours")
    return int(token)


def fetch_page(
    tx: Transaction, query: Select[Any], page: Page, column: str = "row_id"
) -> tuple[Sequence[Row[Any]], str]:
    """Return the rows of a page, and the token of the next one, "" when there is none.

    Args:
        tx: where to ask.
        query: what is listed, from `after_row` on, in the order of `column`.
        page: which part.
        column: the column of the query that numbers the rows.
    """
    if not page.size:
        return tx.connection.execute(query).all(), ""
    rows = tx.connection.execute(query.limit(page.size + 1)).all()
    if len(rows) <= page.size:
        return rows, ""
    rows = rows[: page.size]
    return rows, str(getattr(rows[-1], column))
