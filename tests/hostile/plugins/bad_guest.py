"""A plugin that can misbehave: `bad_guest.py MODE`; `good` keeps keys in memory as it should.

A program of its own, run by the tests as an external KeyManager of a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty

from spire_hw._pb import (
    goplugin_pb2,
    plugin_config_pb2,
    plugin_init_pb2,
    plugin_server_keymanager_pb2,
)
from spire_hw.clock import SystemClock
from spire_hw.errors import InvalidInputError, NotReadyError, SpireHwError, UnavailableError
from spire_hw.goplugin.facade import keymanager
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.rpc.client import connect_unix
from spire_hw.rpc.server import RpcLimits, RpcServer
from spire_hw.rpc.service import bind
from spire_hw.spiffeid import TrustDomain
from spire_hw.transport.unixfront import UnixFront
from spire_hw_plugins.keymanager.memory import MemoryKeyManager

MODE = sys.argv[1]
LINE_FD = os.dup(1)
KEY_MANAGER = "spire.plugin.server.keymanager.v1.KeyManager"
CONFIG = "spire.service.common.config.v1.Config"
HUGE = 100 << 20
HELD: list[Any] = []


def say(text: str) -> None:
    os.write(LINE_FD, text.encode())


def log(**fields: object) -> None:
    sys.stderr.write(json.dumps(fields) + "\n")
    sys.stderr.flush()


class Broker:
    def __init__(self) -> None:
        self.address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start_stream(self, requests: Any, call: Any) -> Any:
        if MODE == "broker_ends":
            return
        async for request in requests:
            if not self.address.done():
                self.address.set_result(request.address)
        if MODE == "never_sent":
            yield goplugin_pb2.ConnInfo()


class Controller:
    async def shutdown(self, request: Any, call: Any) -> Any:
        if MODE == "ignores_shutdown":
            await asyncio.sleep(3600)
        os._exit(0)


class Stdio:
    async def stream_stdio(self, request: Any, call: Any) -> Any:
        while MODE == "stdio_flood":
            yield goplugin_pb2.StdioData(channel=2, data=b"flood\n" * 150)
        yield goplugin_pb2.StdioData(channel=1, data=b"printed to stdout\n")
        await asyncio.Event().wait()


class Init:
    def __init__(self, broker: Broker) -> None:
        self.broker = broker

    async def init(self, request: Any, call: Any) -> Any:
        match MODE:
            case "dies_in_init":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs_in_init":
                await asyncio.sleep(3600)
            case "fails_in_init":
                raise UnavailableError("no init today")
            case "wrong_kind":
                name = "spire.plugin.server.nodeattestor.v1.NodeAttestor"
                return plugin_init_pb2.InitResponse(plugin_service_names=[name, CONFIG])
            case "many_services":
                names = [f"x{i}" for i in range(100_000)]
                return plugin_init_pb2.InitResponse(plugin_service_names=names)
            case "no_config":
                return plugin_init_pb2.InitResponse(plugin_service_names=[KEY_MANAGER])
        await self.broker.address
        names = [KEY_MANAGER, CONFIG]
        if MODE == "more_services":
            names.append("strange.v1.Service\n\x1b[2J")
        return plugin_init_pb2.InitResponse(plugin_service_names=names)

    async def deinit(self, request: Any, call: Any) -> Any:
        if MODE == "hangs_in_deinit":
            await asyncio.sleep(3600)
        return plugin_init_pb2.DeinitResponse()


class Config:
    def __init__(self, plugin: MemoryKeyManager, broker: Broker) -> None:
        self.plugin = plugin
        self.broker = broker

    async def configure(self, request: Any, call: Any) -> Any:
        text = request.hcl_configuration
        log(**{"@level": "info", "@message": "configured", "text": text})
        if MODE == "hangs_in_configure":
            time.sleep(3600)  # noqa: ASYNC251 - that is what is wrong with it
        if MODE == "locked_once_restarted":
            tries = Path(text.split('"')[1])
            before = tries.read_text()  # noqa: ASYNC240
            tries.write_text(before + "x")  # noqa: ASYNC240
            if before:
                raise NotReadyError("PIN refused")
        if "bad" in text:
            raise InvalidInputError("bad is \x1b[31mbad\n")
        if MODE == "leaks":
            path = await self.broker.address
            for _ in range(300):
                held = socket.socket(socket.AF_UNIX)
                held.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    held.connect(path)
                HELD.append(held)
            HELD.extend(open(os.devnull) for _ in range(200))  # noqa: SIM115, ASYNC230, PTH123
        if MODE == "dies_later":
            asyncio.get_running_loop().call_later(0.05, os._exit, 9)
        if MODE == "asks_host":
            path = await self.broker.address
            async with connect_unix(path) as channel:
                await channel.unary(
                    "/spire.hostservice.server.agentstore.v1.AgentStore/GetAgentInfo",
                    b"",
                    Empty,
                    10,
                )
        from spire_hw.config.hcl import Body  # noqa: PLC0415

        await self.plugin.configure(Body.empty())
        return plugin_config_pb2.ConfigureResponse()

    async def validate(self, request: Any, call: Any) -> Any:
        notes = ["bad is bad"] if "bad" in request.hcl_configuration else []
        return plugin_config_pb2.ValidateResponse(valid=not notes, notes=notes)


class KeyManager(keymanager.KeyManagerService):
    async def sign_data(self, request: Any, call: Any) -> Any:
        match MODE:
            case "dies_in_call" | "locked_once_restarted":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hangs_in_call":
                time.sleep(3600)  # noqa: ASYNC251
            case "slow_in_call":
                await asyncio.sleep(3600)
            case "huge_answer":
                return plugin_server_keymanager_pb2.SignDataResponse(signature=bytes(HUGE))
            case "empty_signature":
                return plugin_server_keymanager_pb2.SignDataResponse(key_fingerprint="x")
            case "other_fingerprint":
                made = await super().sign_data(request, call)
                made.key_fingerprint = "00" * 32
                return made
            case "garbage_answer":
                return b"\xff\xff\xff"
        return await super().sign_data(request, call)

    async def get_public_keys(self, request: Any, call: Any) -> Any:
        pb = plugin_server_keymanager_pb2
        match MODE:
            case "malformed_key":
                key = pb.PublicKey(id="x509-CA-A", type="EC_P256", pkix_data=b"nonsense")
                return pb.GetPublicKeysResponse(public_keys=[key])
            case "many_keys":
                keys = [pb.PublicKey(id=str(i)) for i in range(10_000)]
                return pb.GetPublicKeysResponse(public_keys=keys)
        return await super().get_public_keys(request, call)


def prepare() -> None:
    """Do what is wrong before it listens."""
    match MODE:
        case "log_flood":
            threading.Thread(target=flood, daemon=True).start()
        case "hostile_log":
            for line in (
                b'{"@level": 1, "@message": {"a": 1}, "@timestamp": null}\n',
                b'{"@level": "info", "@message": "forged\\n' + b'level=error", "event": 1,'
                b' "exc_info": true, "subsystem_name": "server", "\\u001b[2J": [[[[[[[[]]]]]]]]}\n',
                b"[" * 200_000 + b"\n",
                b'{"@message": ' + b"[" * 100_000 + b"\n",
                b"\xff\xfe\x00\n",
                b"x" * 1_000_000 + b"\n",
                b'{"@level": "info", "@message": "pin", "user_pin": "4321"}\n',
            ):
                os.write(2, line)
        case "children":
            # One in the group, one in a session of its own, one that will be a zombie.
            subprocess.Popen(["sleep", "3600"])  # noqa: S607
            subprocess.Popen(["setsid", "sleep", "3600"])  # noqa: S607
            subprocess.Popen(["true"])  # noqa: S607


def flood() -> None:
    while True:
        os.write(2, b"[ERROR] flood\n" * 4096)


async def main() -> None:
    prepare()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    host = HostInfo(
        Side.SERVER, TrustDomain("example.org"), Path("/"), get_logger("guest"), SystemClock()
    )
    plugin, broker = MemoryKeyManager(host), Broker()
    go = goplugin_pb2.DESCRIPTOR.services_by_name
    init = plugin_init_pb2.DESCRIPTOR.services_by_name["Init"]
    config = plugin_config_pb2.DESCRIPTOR.services_by_name["Config"]
    key_manager = plugin_server_keymanager_pb2.DESCRIPTOR.services_by_name["KeyManager"]
    methods = [
        *bind(go["GRPCController"], Controller()),
        *bind(config, Config(plugin, broker)),
        *bind(key_manager, KeyManager(plugin, plugin_server_keymanager_pb2)),
    ]
    if MODE != "no_broker":
        methods += bind(go["GRPCBroker"], broker)
    if MODE != "no_stdio":
        methods += bind(go["GRPCStdio"], Stdio())
    if MODE != "no_init":
        methods += bind(init, Init(broker))
    server = RpcServer(methods, limits=RpcLimits(max_request_bytes=1 << 26), show_internal=True)
    path = Path(os.environ["PLUGIN_UNIX_SOCKET_DIR"]) / "plugin.sock"
    server.add_front(UnixFront(path, 0o600))
    await server.start()
    say(f"1|1|unix|{path}|grpc|\n")
    if MODE == "closes_socket":
        await asyncio.sleep(1)
        await server.close(0)
    await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except SpireHwError as e:
        sys.exit(e.message)
