"""A whole trust domain in one process: a real server and real agents over real sockets."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from google.protobuf.empty_pb2 import Empty

from spire_hw._pb import server_agent_pb2, server_bundle_pb2, server_entry_pb2, types_pb2
from spire_hw.bundle.document import encode_pem
from spire_hw.config.hcl import parse
from spire_hw.rpc.client import Channel, connect_unix
from spire_hw.rpc.convert import bundle_from_pb
from spire_hw.rpc.status import item_error
from spire_hw_agent.app import Agent
from spire_hw_agent.config import build_settings as agent_settings
from spire_hw_server.app import Server
from spire_hw_server.config import build_settings as server_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from spire_hw.bundle.bundle import Bundle
    from spire_hw.clock import Clock
    from spire_hw.spiffeid import SpiffeId

TRUST_DOMAIN = "sim.example"
_ENTRY = "/spire.api.server.entry.v1.Entry/"
_AGENT = "/spire.api.server.agent.v1.Agent/"
_BUNDLE = "/spire.api.server.bundle.v1.Bundle/"


_PLUGINS = """
KeyManager "disk" { plugin_data { directory = "HOME" } }
NodeAttestor "join_token" { plugin_data {} }
"""

M = TypeVar("M", bound="Message")


class World:
    """Server, agents and the directory they live in.

    Attributes:
        directory: short, so that socket paths fit; removed at the end.
        server: the running server.
        admin: a channel to its admin socket.
    """

    server: Server
    admin: Channel

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        server_keys: str = "",
        server_plugins: str = 'KeyManager "disk" { plugin_data { keys_path = "HOME/keys.json" } }',
        server_rest: str = "",
    ) -> None:
        """Describe the world.

        Args:
            clock: everybody's time.
            server_keys: more keys of `server { }`, as HCL text.
            server_plugins: KeyManager and NodeAttestor blocks; `HOME` in them is
                the world's directory.
            server_rest: more sections of the server's file.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="shw-"))
        self.clock = clock
        self._server_keys = server_keys
        self._server_plugins = server_plugins.replace("HOME", str(self.directory))
        self._server_rest = server_rest
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self.start_server()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop everything and remove the directory."""
        await self._stack.aclose()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- server --------------------------------------------------------------------

    async def start_server(self, port: int = 0) -> None:
        """Start the server; again after `stop_server`, on the port given."""
        text = f"""
        server {{
          trust_domain = "{TRUST_DOMAIN}"
          bind_address = "127.0.0.1"
          bind_port    = {port}
          socket_path  = "{self.directory}/s.sock"
          data_dir     = "{self.directory}/server"
          {self._server_keys}
        }}
        plugins {{
          DataStore "sql" {{
            plugin_data {{
              database_type = "sqlite3"
              connection_string = "{self.directory}/server/db.sqlite3"
            }}
          }}
          {self._server_plugins}
        }}
        {self._server_rest}
        """
        self.server = Server(server_settings(parse(text)), clock=self.clock)
        await self.server.start()
        self.admin = connect_unix(self.directory / "s.sock")
        self._server_stack = AsyncExitStack()
        self._server_stack.push_async_callback(self.server.close)
        self._server_stack.push_async_callback(self.admin.close)
        self._stack.push_async_callback(self._server_stack.aclose)

    async def stop_server(self) -> int:
        """Stop the server; return the port it had."""
        port = self.server.port
        await self._server_stack.aclose()
        return port

    def forget_server(self) -> None:
        """Lose all of a stopped server's state: the next one has other keys."""
        shutil.rmtree(self.directory / "server")
        (self.directory / "keys.json").unlink(missing_ok=True)

    async def bundle_pem(self) -> bytes:
        """Return the trust bundle as a file that agents can be given."""
        return encode_pem(await self.bundle())

    async def call(self, path: str, request: Message, response_type: type[M]) -> M:
        """Call the admin socket."""
        return await self.admin.unary(path, request, response_type, timeout_s=30)

    async def bundle(self) -> Bundle:
        """Return the trust bundle as the server publishes it."""
        answer = await self.call(
            _BUNDLE + "GetBundle", server_bundle_pb2.GetBundleRequest(), types_pb2.Bundle
        )
        return bundle_from_pb(answer)

    async def join_token(self, ttl_s: int = 600) -> str:
        """Generate a join token."""
        request = server_agent_pb2.CreateJoinTokenRequest(ttl=ttl_s)
        answer = await self.call(_AGENT + "CreateJoinToken", request, types_pb2.JoinToken)
        return answer.value

    async def create_entry(
        self,
        path: str,
        *,
        parent: SpiffeId,
        selectors: Sequence[str] = (),
        **fields: Any,
    ) -> str:
        """Register a workload; return the entry id.

        Args:
            path: of the SPIFFE ID, `/web`.
            parent: usually an agent's ID.
            selectors: those of this process's user by default.
            fields: more members of the entry message.
        """
        texts = selectors or (f"unix:uid:{os.getuid()}",)
        pairs = [t.partition(":") for t in texts]
        entry = types_pb2.Entry(
            spiffe_id=types_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=path),
            parent_id=types_pb2.SPIFFEID(trust_domain=parent.trust_domain.name, path=parent.path),
            selectors=[types_pb2.Selector(type=t, value=v) for t, _, v in pairs],
            **fields,
        )
        answer = await self.call(
            _ENTRY + "BatchCreateEntry",
            server_entry_pb2.BatchCreateEntryRequest(entries=[entry]),
            server_entry_pb2.BatchCreateEntryResponse,
        )
        error = item_error(answer.results[0].status)
        if error is not None:
            raise error
        return answer.results[0].entry.id

    async def delete_entry(self, entry_id: str) -> None:
        """Delete an entry."""
        await self.call(
            _ENTRY + "BatchDeleteEntry",
            server_entry_pb2.BatchDeleteEntryRequest(ids=[entry_id]),
            server_entry_pb2.BatchDeleteEntryResponse,
        )

    async def evict(self, agent: SpiffeId) -> None:
        """Forget an agent; it may attest again."""
        request = server_agent_pb2.DeleteAgentRequest(id=_id(agent))
        await self.call(_AGENT + "DeleteAgent", request, Empty)

    async def ban(self, agent: SpiffeId) -> None:
        """Ban an agent."""
        request = server_agent_pb2.BanAgentRequest(id=_id(agent))
        await self.call(_AGENT + "BanAgent", request, Empty)

    # -- agents --------------------------------------------------------------------

    async def agent(
        self,
        name: str = "a",
        *,
        join_token: str | None = None,
        plugins: str = _PLUGINS,
        keys: str = "",
        rest: str = "",
        sync_interval: str = "200ms",
    ) -> Agent:
        """Build an agent; start it with `async with` or `start`.

        Args:
            name: directory of its state; the same name is the same node again.
            join_token: a fresh one is generated when None and the agent has no SVID yet.
            plugins: KeyManager and NodeAttestor blocks.
            keys: more keys of `agent { }`.
            rest: more sections of the file.
            sync_interval: longer where simulated time makes leaps.
        """
        home = self.directory / name
        home.mkdir(exist_ok=True)
        bootstrap = home / "bootstrap.pem"
        if not bootstrap.exists():
            bootstrap.write_bytes(await self.bundle_pem())
        if join_token is None and "join_token" in plugins and not (home / "data").exists():
            join_token = await self.join_token()
        token = f'join_token = "{join_token}"' if join_token else ""
        text = f"""
        agent {{
          trust_domain      = "{TRUST_DOMAIN}"
          server_address    = "127.0.0.1"
          server_port       = {self.server.port}
          data_dir          = "{home}/data"
          socket_path       = "{self.socket(name)}"
          trust_bundle_path = "{bootstrap}"
          {token}
          {keys}
          experimental {{ sync_interval = "{sync_interval}" }}
        }}
        plugins {{
          {plugins.replace("HOME", str(home))}
          WorkloadAttestor "unix" {{ plugin_data {{}} }}
        }}
        {rest}
        """
        return Agent(agent_settings(parse(text)), clock=self.clock)

    def socket(self, name: str = "a") -> Path:
        """Return the Workload API socket of an agent."""
        return self.directory / f"{name}.sock"

    def workload(self, name: str = "a") -> Channel:
        """Return a channel to an agent's Workload API; this process is the workload."""
        return connect_unix(self.socket(name))


def _id(spiffe_id: SpiffeId) -> types_pb2.SPIFFEID:
    return types_pb2.SPIFFEID(trust_domain=spiffe_id.trust_domain.name, path=spiffe_id.path)
