"""Processes that are plugins: how they start, whom they serve, how they end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from spire_hw._pb import goplugin_pb2, plugin_config_pb2, plugin_init_pb2
from spire_hw._pb import plugin_agent_keymanager_pb2 as agent_pb
from spire_hw._pb import plugin_server_keymanager_pb2 as pb
from spire_hw.errors import DeniedError, ErrorKind, InvalidInputError, NotReadyError, SpireHwError
from spire_hw.goplugin.guest import _HostOnly
from spire_hw.goplugin.handshake import build_environment, parse_line
from spire_hw.plugin.info import PluginKind
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.rpc.health import health_methods
from spire_hw.rpc.server import RpcServer
from spire_hw.transport.unixfront import UnixFront

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

KM = PluginKind.KEY_MANAGER
CONFIG = "/spire.service.common.config.v1.Config/"
INIT = "/spire.service.private.init.v1.Init/"
SERVER_KM = "/spire.plugin.server.keymanager.v1.KeyManager/"
AGENT_KM = "/spire.plugin.agent.keymanager.v1.KeyManager/"
METRICS = "spire.hostservice.common.metrics.v1.Metrics"
STORE = "spire.hostservice.server.agentstore.v1.AgentStore"
PLUGIN = """\
import os
import sys
from pathlib import Path

from spire_hw.config.schema import Model, decode, faults
from spire_hw.goplugin.guest import serve
from spire_hw.plugin.info import PluginKind
from spire_hw_plugins.keymanager.software import SoftwareKeys


class Config(Model):
    word: str
    text: str = ""


class Plugin(SoftwareKeys):
    def __init__(self, host):
        super().__init__()
        print("a library that prints", flush=True)
        os.write(1, b"so does C\\n")
        self.host = host
        self.word = ""

    def validate(self, config):
        return faults(config, Config)

    async def configure(self, config):
        self.word = decode(config, Config).word
        self.load({})
        told = {"side": self.host.side.value, "alone": self.host.holds_data_dir}
        self.host.log.info("configured", word=self.word, n=1, pin="1234", **told)

    async def close(self):
        self.host.log.info("closed")


sys.exit(serve(PluginKind.KEY_MANAGER, Plugin, data_dir=Path(sys.argv[1])))
"""


class Guest:
    """A plugin process and a connection to it."""

    def __init__(self, process: asyncio.subprocess.Process, line: bytes) -> None:
        self.process = process
        self.path = Path(parse_line(line).address)
        self.channel: Channel = connect_unix(self.path, max_response_bytes=1 << 26)
        self._stream: Any = None

    async def greet(self, *services: str) -> list[str]:
        self._stream = self.channel.bidi("/plugin.GRPCBroker/StartStream", goplugin_pb2.ConnInfo)
        await self._stream.__aenter__()
        request = plugin_init_pb2.InitRequest(host_service_names=services)
        answer = await self.channel.unary(INIT + "Init", request, plugin_init_pb2.InitResponse, 30)
        return list(answer.plugin_service_names)

    async def configure(self, text: str, trust_domain: str = "example.org") -> None:
        core = plugin_config_pb2.CoreConfiguration(trust_domain=trust_domain)
        request = plugin_config_pb2.ConfigureRequest(
            core_configuration=core, hcl_configuration=text
        )
        answer = plugin_config_pb2.ConfigureResponse
        await self.channel.unary(CONFIG + "Configure", request, answer, 30)

    async def validate(self, text: str) -> plugin_config_pb2.ValidateResponse:
        core = plugin_config_pb2.CoreConfiguration(trust_domain="example.org")
        request = plugin_config_pb2.ValidateRequest(core_configuration=core, hcl_configuration=text)
        answer = plugin_config_pb2.ValidateResponse
        return await self.channel.unary(CONFIG + "Validate", request, answer, 30)

    async def generate(self) -> None:
        request = pb.GenerateKeyRequest(key_id="a", key_type="EC_P256")
        await self.channel.unary(SERVER_KM + "GenerateKey", request, pb.GenerateKeyResponse, 30)

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.__aexit__(None, None, None)
        await self.channel.close()

    async def shut_down(self) -> list[dict[str, Any]]:
        """End it well; return what it logged."""
        shutdown = "/plugin.GRPCController/Shutdown"
        with contextlib.suppress(SpireHwError):
            await self.channel.unary(shutdown, goplugin_pb2.Empty(), goplugin_pb2.Empty, 30)
        return await self.logged()

    async def logged(self) -> list[dict[str, Any]]:
        await self.close()
        out, err = await asyncio.wait_for(self.process.communicate(), 30)
        assert out == b""
        return [record(line) for line in err.splitlines()]


def record(line: bytes) -> dict[str, Any]:
    """Return one line of a plugin's standard error, {} for one that a library printed."""
    if not line.startswith(b"{"):
        return {}
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.fixture(autouse=True)
def sockets(tmp_path: Path) -> Iterator[Path]:
    """Yield `s` in the test's directory: a link to where the plugin's sockets go, on a short path."""
    with tempfile.TemporaryDirectory(prefix="shw") as short:
        link = tmp_path / "s"
        link.symlink_to(short)
        yield link


@asynccontextmanager
async def running(tmp_path: Path, command: Sequence[str] = ()) -> AsyncIterator[Guest]:
    script, sockets = tmp_path / "plugin.py", (tmp_path / "s").readlink()
    script.write_text(PLUGIN)
    environment = build_environment(KM, os.environ, socket_dir=str(sockets))
    environment.pop("PYTHONUNBUFFERED", None)
    process = await asyncio.create_subprocess_exec(
        *command,
        sys.executable,
        str(script),
        str(tmp_path / "data"),
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        guest = Guest(process, await asyncio.wait_for(process.stdout.readline(), 60))
        yield guest
        await guest.close()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.asyncio
async def test_a_plugin_lives_from_line_to_shutdown_and_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        assert guest.path.is_relative_to((tmp_path / "s").readlink())
        assert [mode(path) for path in (guest.path.parent, guest.path)] == [0o700, 0o600]
        names = await guest.greet(METRICS, STORE)
        assert names == [
            "spire.plugin.server.keymanager.v1.KeyManager",
            "spire.service.common.config.v1.Config",
        ]
        for service in ("", "plugin"):
            health = await guest.channel.unary(
                "/grpc.health.v1.Health/Check",
                health_pb2.HealthCheckRequest(service=service),
                health_pb2.HealthCheckResponse,
                30,
            )
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        await guest.configure('word = "x"')
        await guest.generate()
        deinit = plugin_init_pb2.DeinitRequest()
        await guest.channel.unary(INIT + "Deinit", deinit, plugin_init_pb2.DeinitResponse, 30)
        with pytest.raises(NotReadyError):
            await guest.generate()
        logged = await guest.shut_down()
        assert guest.process.returncode == 0
    assert list((tmp_path / "s").iterdir()) == []
    assert mode(tmp_path / "data") == 0o700
    assert [entry["@message"] for entry in logged if entry][-2:] == ["configured", "closed"]


@pytest.mark.asyncio
async def test_log_lines_are_as_go_hosts_read_them(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS)
        await guest.configure('word = "x"')
        logged = await guest.shut_down()
    found = next(entry for entry in logged if entry.get("@message") == "configured")
    assert found["@level"] == "info"
    assert found["@module"] == "keymanager"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found["@timestamp"])
    assert (found["word"], found["side"], found["n"]) == ("x", "agent", 1)
    assert found["pin"] == "[redacted]"
    for entry in filter(None, logged):
        assert all(type(value) is str for key, value in entry.items() if key.startswith("@"))


@pytest.mark.asyncio
async def test_who_shares_a_data_directory_is_told(tmp_path: Path) -> None:
    async def alone(guest: Guest) -> object:
        await guest.greet(METRICS)
        await guest.configure('word = "x"')
        logged = await guest.shut_down()
        return next(e["alone"] for e in logged if e.get("@message") == "configured")

    async with running(tmp_path) as first:
        async with running(tmp_path) as second:
            assert await alone(second) is False
        assert await alone(first) is True
    async with running(tmp_path) as again:
        assert await alone(again) is True


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("services", "served"),
    [([METRICS], ["agent"]), ([METRICS, STORE], ["server"]), ([], ["server", "agent"])],
)
async def test_what_a_host_offers_tells_which_host_it_is(
    services: list[str], served: list[str], tmp_path: Path
) -> None:
    async with running(tmp_path) as guest:
        names = await guest.greet(*services)
        kinds = [name for name in names if name.endswith(".KeyManager")]
        assert kinds == [f"spire.plugin.{side}.keymanager.v1.KeyManager" for side in served]
        if services:
            await guest.configure('word = "x"')
        else:
            with pytest.raises(NotReadyError, match="-side"):
                await guest.configure('word = "x"')


@pytest.mark.asyncio
async def test_both_sides_have_the_same_keys_and_nothing_works_before_configure(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS)
        asked = agent_pb.GetPublicKeysRequest()
        answer = agent_pb.GetPublicKeysResponse
        with pytest.raises(NotReadyError, match="not configured"):
            await guest.channel.unary(AGENT_KM + "GetPublicKeys", asked, answer, 30)
        await guest.configure('word = "x"')
        found = await guest.channel.unary(AGENT_KM + "GetPublicKeys", asked, answer, 30)
        assert list(found.public_keys) == []
        with pytest.raises(NotReadyError, match="not configured"):
            await guest.generate()  # the server's service, under an agent


@pytest.mark.asyncio
async def test_configurations_are_checked_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS, STORE)
        verdict = await guest.validate('wrod = "x"')
        assert not verdict.valid
        assert any('unknown key "wrod"' in note for note in verdict.notes)
        assert (await guest.validate('"word" = "x"')).valid
        assert not (await guest.validate('"a quoted literal"')).valid
        for text in ("", 'word = "x"\nmore = 1', '"literal"', "word = "):
            with pytest.raises(InvalidInputError):
                await guest.configure(text)
        with pytest.raises(InvalidInputError, match="trust domain"):
            await guest.configure('word = "x"', trust_domain="spiffe://example.org")
        await guest.configure('word = "x"\ntext = <<EOF\nlast item\nEOF')
        await guest.generate()
        with pytest.raises(InvalidInputError, match="trust domain cannot change"):
            await guest.configure('word = "y"', trust_domain="other.org")
        with pytest.raises(InvalidInputError):
            await guest.configure("nonsense = 1")
        await guest.configure('{"word": "y"}')
        await guest.generate()
        core = plugin_config_pb2.ConfigureRequest(hcl_configuration="")
        answer = plugin_config_pb2.ConfigureResponse
        with pytest.raises(InvalidInputError, match="core configuration is missing"):
            await guest.channel.unary(CONFIG + "Configure", core, answer, 30)
        words = [entry.get("word") for entry in await guest.shut_down() if entry]
        assert [word for word in words if word] == ["x", "y"]


@pytest.mark.asyncio
async def test_messages_of_many_mebibytes_are_taken(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS, STORE)
        await guest.configure('word = "' + "x" * (512 << 10) + '"')
        request = pb.GetPublicKeyRequest(key_id="k" * (6 << 20))
        with pytest.raises(SpireHwError) as caught:
            await guest.channel.unary(
                SERVER_KM + "GetPublicKey", request, pb.GetPublicKeyResponse, 60
            )
        assert caught.value.kind is ErrorKind.NOT_FOUND


@pytest.mark.asyncio
async def test_streams_of_the_host_stay_open_until_the_end(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS, STORE)
        printed = guest.channel.server_stream(
            "/plugin.GRPCStdio/StreamStdio", empty_pb2.Empty(), goplugin_pb2.StdioData
        )
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(printed), 0.1)
        await guest.configure('word = "x"')
        await guest.generate()


@pytest.mark.asyncio
async def test_ctrl_c_is_the_hosts_business_and_sigterm_ends_it_well(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS, STORE)
        await guest.configure('word = "x"')
        guest.process.send_signal(signal.SIGINT)
        await guest.generate()
        guest.process.send_signal(signal.SIGTERM)
        logged = await guest.logged()
        assert guest.process.returncode == 0
    assert logged[-1]["@message"] == "closed"
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.asyncio
async def test_a_plugin_ends_when_its_host_is_killed(tmp_path: Path) -> None:
    between = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], stdin=0).returncode)"
    async with running(tmp_path, [sys.executable, "-c", between]) as guest:
        await guest.greet(METRICS, STORE)
        await guest.configure('word = "x"')
        plugin = await asyncio.to_thread(child_of, guest.process.pid)
        pidfd = os.pidfd_open(plugin)
        guest.process.kill()
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert await asyncio.to_thread(poll.poll, 30_000)
        os.close(pidfd)
    assert list((tmp_path / "s").iterdir()) == []


def is_there(path: Path) -> bool:
    return path.exists()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.asyncio
async def test_a_plugin_ends_when_its_host_has_gone_behind_a_wrapper(tmp_path: Path) -> None:
    between = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], stdin=0).returncode)"
    async with running(tmp_path, [sys.executable, "-c", between]) as guest:
        await guest.greet(METRICS, STORE)
        await guest.configure('word = "x"')
        logged = await guest.logged()  # hangs up, says nothing, and waits for the process
        assert guest.process.returncode == 0
    assert logged[-1]["@message"] == "closed"


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.mark.asyncio
async def test_what_a_killed_plugin_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        guest.process.kill()
        await guest.process.wait()
        assert is_there(guest.path)
        left = guest.path
    async with running(tmp_path) as guest:
        assert not is_there(left)
        assert is_there(guest.path)


@pytest.mark.asyncio
async def test_a_plugin_that_was_not_configured_is_the_same_at_the_next_try(tmp_path: Path) -> None:
    async with running(tmp_path) as guest:
        await guest.greet(METRICS, STORE)
        for _ in range(3):
            with pytest.raises(InvalidInputError):
                await guest.configure("")
        with pytest.raises(InvalidInputError, match="trust domain cannot change"):
            await guest.configure('word = "x"', trust_domain="other.org")
        with pytest.raises(NotReadyError, match="not configured"):
            await guest.generate()
        await guest.configure('word = "x"')
        await guest.generate()
        await guest.close()
        guest.process.send_signal(signal.SIGTERM)
        _, err = await asyncio.wait_for(guest.process.communicate(), 30)
    assert err.count(b"a library that prints") == 1
    assert err.count(b'"closed"') == 1


def run_by_hand(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "plugin.py"
    script.write_text(PLUGIN)
    return subprocess.run(  # noqa: S603
        [sys.executable, str(script), str(tmp_path / "data")],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_run_by_hand_it_says_where_it_belongs(tmp_path: Path) -> None:
    found = run_by_hand(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert 'plugins { KeyManager "name" { plugin_cmd = ... } }' in found.stderr
    assert not (tmp_path / "data").exists()


def test_a_socket_directory_that_does_not_work_is_named(tmp_path: Path) -> None:
    cookie = {"KeyManager": "KeyManager"}
    long = tmp_path / ("d" * 100)
    long.mkdir()
    for directory, words in ((str(long), "over 107 bytes"), ("/proc/nowhere", "set TMPDIR")):
        found = run_by_hand(tmp_path, **cookie, PLUGIN_UNIX_SOCKET_DIR=directory)
        assert found.returncode == 1
        assert found.stdout == ""
        assert words in json.loads(found.stderr.splitlines()[-1])["error"]


@pytest.mark.asyncio
@pytest.mark.parametrize("stranger", [True, False])
async def test_nobody_but_the_hosts_user_may_call(stranger: bool, tmp_path: Path) -> None:
    async def healthy() -> bool:
        return True

    path = tmp_path / "s.sock"
    uid = os.geteuid() + (1 if stranger else 0)
    server = RpcServer(health_methods(healthy), [_HostOnly(uid)])
    server.add_front(UnixFront(path, 0o600))
    await server.start()
    request, answer = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse
    async with connect_unix(path) as channel:
        call = channel.unary("/grpc.health.v1.Health/Check", request, answer, 30)
        if stranger:
            with pytest.raises(DeniedError, match="only the host"):
                await call
        else:
            assert (await call).status == health_pb2.HealthCheckResponse.SERVING
    await server.close(0)
