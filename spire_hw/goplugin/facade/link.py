"""The way to one external plugin: its calls, with errors and answers held to our own rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, NoReturn, Self, TypeVar

from google.protobuf.message import Message

from spire_hw.errors import DeniedError, ErrorKind, SpireHwError
from spire_hw.rpc.status import from_code

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from types import TracebackType

    from spire_hw.plugin.info import PluginKind
    from spire_hw.rpc.client import Bidi, Channel

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Metadata = Sequence[tuple[str, str]]

# The largest message either end takes. Upstream's hosts and plugins take 2 GiB of each other; the
# largest thing that is sent, a bundle, stays far below this.
MAX_MESSAGE_BYTES: Final = 64 << 20

CALL_TIMEOUT_S: Final = 30.0
_MAX_TEXT: Final = 1024
_NO_METADATA: Final[Metadata] = ()


@dataclass(frozen=True, slots=True)
class Link:
    """Where an external plugin is, and how errors name it.

    Attributes:
        kind: what it is.
        name: as configured.
        channel: returns the connection as it is now; raises UnavailableError while the plugin is
            not running.
    """

    kind: PluginKind
    name: str
    channel: Callable[[], Channel]

    @property
    def prefix(self) -> str:
        """Return how messages name it, such as `keymanager(tpm)`."""
        return f"{self.kind.value.lower()}({self.name})"

    async def unary(
        self,
        path: str,
        request: Message,
        response_type: type[M],
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> M:
        """Call a method.

        Args:
            path: `/package.Service/Method`.
            request: its request.
            response_type: of the answer.
            timeout_s: deadline.

        Raises:
            SpireHwError: what the plugin answered, its kind kept, its text made fit to be shown,
                with the plugin's name in front.
        """
        with self.naming():
            return await self.channel().unary(path, request, response_type, timeout_s)

    async def stream(
        self, path: str, request: Message, response_type: type[M]
    ) -> AsyncGenerator[M, None]:
        """Call a method that answers more than once; errors as in `unary`."""
        with self.naming():
            answers = self.channel().server_stream(path, request, response_type)
            try:
                async for answer in answers:
                    yield answer
            finally:
                await answers.aclose()

    def bidi(
        self, path: str, response_type: type[M], metadata: Metadata = _NO_METADATA
    ) -> LinkBidi[M]:
        """Open a call with streams both ways; an async context manager, errors as in `unary`."""
        return LinkBidi(self, lambda: self.channel().bidi(path, response_type, metadata=metadata))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Put the plugin's name in front of errors of calls to it."""
        try:
            yield
        except SpireHwError as e:
            raise self.named(e) from e

    def named(self, error: SpireHwError) -> SpireHwError:
        """Return an error of the plugin as it goes on to our callers.

        Kind and class are kept. The wire detail of a refusal is not: agents act on it, and it is
        this server's alone to give.
        """
        text = _shown(error.message)
        head = f"{self.prefix}: "
        if not text.startswith(head):
            text = head + text
        if error.kind is ErrorKind.PERMISSION_DENIED:
            return DeniedError(text)
        return from_code(error.kind.value, text)

    @contextmanager
    def checking(self, what: str) -> Iterator[None]:
        """Turn what is found wrong with an answer into an error of the plugin's.

        Args:
            what: of what the answer is, such as `public key`.
        """
        try:
            yield
        except SpireHwError as e:
            raise self._wrong(f"{what}: {e.message}") from e

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error for an answer that no plugin may give.

        Raises:
            SpireHwError: INTERNAL.
        """
        raise self._wrong(reason)

    def bounded(self, what: str, values: Sequence[T], most: int) -> Sequence[T]:
        """Return a list of an answer when it is not over-long."""
        if len(values) > most:
            self.refuse(f"{len(values)} {what} in one answer, at most {most} are accepted")
        return values

    def _wrong(self, reason: str) -> SpireHwError:
        text = f"{self.prefix}: the plugin's answer is not acceptable: {_shown(reason)}"
        return SpireHwError(text, kind=ErrorKind.INTERNAL)


class LinkBidi(Generic[M]):
    """One call with streams both ways to an external plugin; see `spire_hw.rpc.client.Bidi`."""

    def __init__(self, link: Link, opened: Callable[[], Bidi[M]]) -> None:
        self._link = link
        self._opened = opened
        self._stack = AsyncExitStack()
        self._call: Bidi[M]

    async def __aenter__(self) -> Self:
        with self._link.naming():
            self._call = await self._stack.enter_async_context(self._opened())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def send(self, message: Message) -> None:
        """Send one message."""
        with self._link.naming():
            await self._call.send(message)

    async def receive(self) -> M | None:
        """Return the next message, None when the plugin has ended the call well."""
        with self._link.naming():
            return await self._call.receive()


def _shown(text: str) -> str:
    """Return a plugin's text on one line, fit for logs and terminals."""
    if len(text) > _MAX_TEXT:
        text = text[: _MAX_TEXT - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " for c in text)
