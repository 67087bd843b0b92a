from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from typing_extensions import override

from spire_hw import log
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.log import Format, Level, LogSettings, Output

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class FixedClock:
    def now(self) -> datetime:
        return datetime(2026, 11, 22, 5, 6, 7, 120000, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        raise AssertionError(f"nobody sleeps {seconds} s here")


def make(**settings: object) -> tuple[Output, io.StringIO]:
    stream = io.StringIO()
    return Output(LogSettings(**settings), clock=FixedClock(), stream=stream), stream  # type: ignore[arg-type]


def test_text_lines_are_those_of_upstream() -> None:
    output, stream = make()
    logger = output.logger("ca_manager").bind(plugin_name="tpm")
    logger.info("Prepared authority", ttl="1h", slot="A", empty="", count=3, ok=True, none=None)
    logger.warning("plain", path="/a/b_c.d-e@f^g+h", spaced="a b", colon="a:b", items=["x", "y"])
    assert stream.getvalue().splitlines() == [
        (
            'time="2026-11-22T05:06:07.12Z" level=info msg="Prepared authority" count=3 empty= '
            'none="<nil>" ok=true plugin_name=tpm slot=A subsystem_name=ca_manager ttl=1h'
        ),
        (
            'time="2026-11-22T05:06:07.12Z" level=warning msg=plain colon="a:b" items="[x y]" '
            'path=/a/b_c.d-e@f^g+h plugin_name=tpm spaced="a b" subsystem_name=ca_manager'
        ),
    ]


def test_json_lines_are_those_of_upstream() -> None:
    output, stream = make(format=Format.JSON)
    output.logger("api").error("<failed>", count=3, ok=False, deep={"b": 1, "a": None})
    assert stream.getvalue() == (
        '{"count":3,"deep":{"a":null,"b":1},"level":"error","msg":"\\u003cfailed\\u003e","ok":false,'
        '"subsystem_name":"api","time":"2026-11-22T05:06:07.12Z"}\n'
    )


@pytest.mark.parametrize("form", list(Format))
def test_nobody_can_forge_a_line(form: Format) -> None:
    output, stream = make(format=form)
    evil = 'x\ntime="2020" level=error msg="forged"\r\x1b[31m\u2028\x85\x00"'
    output.logger("api").info(evil, **{"value": evil, "key\nlevel=panic": evil, "time": evil})
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    for char in "\r\x1b\u2028\x85\x00":
        assert char not in text
    if form is Format.JSON:
        held = json.loads(text)
        assert held["msg"] == evil
        assert held["time"] == "2026-11-22T05:06:07.12Z"
        assert held["fields.time"] == evil
        assert held["key_level_panic"] == evil


@pytest.mark.parametrize(
    "key",
    ["pin", "user_pin", "join_token", "token", "password", "clientSecret", "private_key", "jwt",
     "svid_token", "privateKey", "jwt_svid", "token_value", "PASSWORD"],
)  # fmt: skip
def test_secrets_are_withheld_by_their_key(key: str) -> None:
    output, stream = make()
    output.logger("api").info("x", **{key: "hush-hush", "deep": {key: ["hush-hush"]}})
    assert "hush-hush" not in stream.getvalue()
    assert "[redacted]" in stream.getvalue()


@pytest.mark.parametrize(
    "key", ["token_label", "pin_file", "jwt_svid_ttl", "spiffe_id", "shipping", "jwt_authority_id"]
)
def test_keys_that_only_sound_like_secrets_are_shown(key: str) -> None:
    output, stream = make()
    output.logger("api").info("x", **{key: "open"})
    assert f"{key}=open" in stream.getvalue()


def test_secrets_are_withheld_by_their_looks() -> None:
    output, stream = make()
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJzcGlmZmUifQ.c2lnbmF0dXJl"  # noqa: S105 - made up
    pem = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----"
    output.logger("api").info(
        f"got {token}", a=f"Bearer {token}", b=pem, c="pkcs11:t?pin-value=1234"
    )
    text = stream.getvalue()
    for secret in (token, "MHcCAQEE", "1234", "c2lnbmF0dXJl"):
        assert secret not in text


def test_bytes_and_sizes() -> None:
    output, stream = make()
    output.logger("api").info("x", raw=b"secret", long="y" * 100_000, deep=[[[[[[[[["z"]]]]]]]]])
    text = stream.getvalue()
    assert 'raw="<6 bytes>"' in text
    assert len(text) < 20_000
    assert "secret" not in text


def test_a_value_that_cannot_be_shown_does_not_stop_the_caller() -> None:
    class Broken:
        @override
        def __str__(self) -> str:
            raise ValueError("no")

    output, stream = make()
    output.logger("api").info("x", value=Broken(), nan=float("nan"))
    assert "cannot be shown" in stream.getvalue()


def test_levels_can_be_changed_while_running() -> None:
    output, stream = make(level=Level.WARN)
    logger = output.logger("api")
    logger.info("no")
    output.level = Level.DEBUG
    logger.debug("yes")
    output.reset_level()
    logger.info("no")
    assert [line.split("msg=")[1].split()[0] for line in stream.getvalue().splitlines()] == ["yes"]


@pytest.mark.parametrize(
    ("text", "level"),
    [("INFO", Level.INFO), ("warn", Level.WARN), ("Warning", Level.WARN), ("trace", Level.TRACE)],
)
def test_level_names(text: str, level: Level) -> None:
    assert Level.parse(text) is level


def test_an_unknown_level_lists_the_known() -> None:
    with pytest.raises(InvalidInputError, match="panic, fatal, error, warn, info, debug, trace"):
        Level.parse("loud")


def test_exceptions_become_error_and_stack_on_one_line() -> None:
    output, stream = make()
    try:
        int("bad\nthing")
    except ValueError:
        output.logger("api").exception("Failed")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "invalid literal for int()" in text
    assert "ValueError" in text


def test_source_location_names_the_caller() -> None:
    output, stream = make(source_location=True)
    output.logger("api").info("here")
    assert "test_source_location_names_the_caller" in stream.getvalue()
    assert 'file="test_log.py:' in stream.getvalue()


def test_a_file_is_reopened_for_logrotate(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    output = Output(LogSettings(file=path), clock=FixedClock())
    output.logger("api").info("one")
    path.rename(tmp_path / "x.log.1")
    output.logger("api").info("two")
    output.reopen()
    output.logger("api").info("three")
    output.close()
    assert (tmp_path / "x.log.1").read_text().count("\n") == 2
    assert "three" in path.read_text()
    assert path.stat().st_mode & 0o007 == 0


def test_a_file_that_cannot_be_reopened_stays_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    output = Output(LogSettings(file=folder / "x.log"), clock=FixedClock())
    folder.rename(tmp_path / "moved")
    output.reopen()
    output.logger("api").info("still here")
    output.close()
    text = (tmp_path / "moved" / "x.log").read_text()
    assert "Failed to rotate log" in text
    assert "still here" in text


def test_a_file_that_cannot_be_opened_is_said_at_start(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be opened"):
        Output(LogSettings(file=tmp_path / "no" / "x.log"))


def test_lost_lines_are_counted() -> None:
    class Flaky(io.StringIO):
        broken = True

        @override
        def write(self, text: str) -> int:
            if self.broken:
                raise OSError("disk full")
            return super().write(text)

    stream = Flaky()
    output = Output(LogSettings(), clock=FixedClock(), stream=stream)
    output.logger("api").info("lost")
    output.logger("api").info("lost")
    stream.broken = False
    output.logger("api").info("back")
    assert "count=2" in stream.getvalue()
    assert stream.getvalue().count("\n") == 2


@pytest.fixture
def process_output() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log.configure(LogSettings(level=Level.INFO), clock=FixedClock(), stream=stream)
    yield stream
    log.unconfigure()


def test_the_standard_library_is_routed_through(process_output: io.StringIO) -> None:
    logging.getLogger("alembic.runtime").warning("Running %s", "upgrade")
    logging.getLogger("grpc").debug("not this")
    (ours,) = [h for h in logging.getLogger().handlers if type(h).__module__ == log.__name__]
    ours.handle(logging.LogRecord("odd", 30, __file__, 1, "%d", ("not a number",), None))
    lines = process_output.getvalue().splitlines()
    assert lines[0].endswith('level=warning msg="Running upgrade" subsystem_name=alembic.runtime')
    assert "arguments do not fit" in lines[1]
    assert len(lines) == 2


def test_loggers_made_before_follow_the_configuration(process_output: io.StringIO) -> None:
    logger = log.get_logger("early").bind(a=1)
    log.configure(LogSettings(format=Format.JSON), clock=FixedClock(), stream=process_output)
    logger.info("x")
    assert json.loads(process_output.getvalue())["subsystem_name"] == "early"


@pytest.mark.asyncio
async def test_sigusr2_reopens_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    output = Output(LogSettings(file=path), clock=FixedClock())
    loop = asyncio.get_running_loop()
    output.reopen_on_signal(loop)
    try:
        path.rename(tmp_path / "old")
        os.kill(os.getpid(), signal.SIGUSR2)
        async with asyncio.timeout(10):
            while not path.exists():  # noqa: ASYNC110 - the handler runs in this loop
                await asyncio.sleep(0)
    finally:
        loop.remove_signal_handler(signal.SIGUSR2)
        output.close()


def test_late_loggers_write_what_loggers_write(process_output: io.StringIO) -> None:
    log.configure(LogSettings(format=Format.JSON), clock=FixedClock(), stream=process_output)
    logger = log.get_logger("x").bind(a=1)
    asked = []

    def tell() -> dict[str, int]:
        asked.append(1)
        return {"b": 2}

    late = log.LateLogger(logger, tell)
    further = late.bind(c=3, b=4)
    assert not asked
    further.info("hello")
    late.warning("bye", c=5)
    assert len(asked) == 1
    first, second = map(json.loads, process_output.getvalue().splitlines())
    assert (first["msg"], first["a"], first["b"], first["c"]) == ("hello", 1, 4, 3)
    assert (second["msg"], second["a"], second["b"], second["c"]) == ("bye", 1, 2, 5)
