"""A whole signer for tests: real keys on a token or a disk, real TLS, its own authority for both ends.

async with SignerRig(tmp_path) as rig:
channel = await rig.channel()
key = await rig.generate("x509-CA-A")
"""

from __future__ import annotations

import os
import secrets
import ssl
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final, Self

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw._pb import hw_signer_pb2
from spire_hw.config import hcl
from spire_hw.key import KeyType
from spire_hw.rpc.client import Channel, connect, connect_unix
from spire_hw.spiffeid import SpiffeId
from spire_hw.transport.dialer import Dialer
from spire_hw.x509.certificate import encode_pem
from spire_hw_signer.app import Signer
from spire_hw_signer.config import build_settings
from spire_hw_sim.pki import Authority
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from spire_hw.clock import Clock
    from spire_hw.transport.tls import TlsIdentity

PIN: Final = "1234"
TOKEN: Final = "signer"  # noqa: S105 - a label
INFRA: Final = "infra.example"
TRUST_DOMAIN: Final = "example.org"
CLIENT_ID: Final = f"spiffe://{INFRA}/spire-server-1"
SIGNER_ID: Final = f"spiffe://{INFRA}/signer"
TIMEOUT_S: Final = 20.0
SERVICE: Final = "/spire_hw.signer.v1.Signer/"
KEYS: Final = '["x509-CA-A", "x509-CA-B", "JWT-Signer-A", "JWT-Signer-B"]'


def client_policy(
    identity: str = CLIENT_ID,
    *,
    trust_domain: str = TRUST_DOMAIN,
    server: str = "s1",
    without: tuple[str, ...] = (),
    **more: str,
) -> str:
    """Return a client's block of a policy file.

    Args:
        identity: the client.
        trust_domain: whose keys it uses.
        server: likewise.
        without: keys of the usual block that are left out.
        more: further keys, or others for those of the usual block, as HCL.
    """
    values = {
        "trust_domain": f'"{trust_domain}"',
        "server": f'"{server}"',
        "keys": KEYS,
        "types": '{ "*" = ["ec-p256", "ec-p384", "rsa-2048"] }',
        "sign_rate": '{ "*" = "20000/s burst 40000" }',
        "generate": '{ per_key_min_interval = "0s" per_day = 1000 }',
        "active_window": '"10m"',
        "x509": '{ max_ca_ttl = "168h" max_svid_ttl = "24h" }',
        "jwt": '{ max_ttl = "1h" }',
        **more,
    }
    lines = [f"  {key} = {value}" for key, value in values.items() if key not in without]
    return "\n".join([f'client "{identity}" {{', *lines, "}", ""])


class SignerRig:
    """A signer with all its files below a directory, and those who call it.

    Attributes:
        authority: signed the certificates of both ends.
        identity: the client's.
        hsm: the token's store, None with keys on disk.
        policy_file: who may do what; see `write_policy`.
        config_file: signer.conf, for signers in processes of their own.
        signer: the running signer in this process.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keys: str = "pkcs11",
        hsm: SoftHsm | None = None,
        authority: Authority | None = None,
        name: str = "signer-1",
        policy: str | None = None,
        more: str = "",
        data: str = "",
        clock: Clock | None = None,
    ) -> None:
        """Write the files.

        Args:
            folder: short enough for a socket path.
            keys: `pkcs11`, `tpm` or `disk`.
            hsm: a store with a token that is shared with another signer.
            authority: shared with another signer.
            name: of the signer.
            policy: text of the policy file; one client with the usual rights without it.
            more: further keys of the signer section.
            data: further keys of the KeyManager.
            clock: the signer's time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.clock = clock
        self.authority = authority or Authority(INFRA)
        self.identity = self.authority.identity(CLIENT_ID)
        self.hsm = hsm
        if keys == "pkcs11" and hsm is None:
            self.hsm = SoftHsm(folder / "hsm")
            self.hsm.init_token(TOKEN, pin=PIN)
        self.policy_file = folder / "signer-policy.conf"
        self.config_file = folder / "signer.conf"
        self.admin_socket = folder / "admin.sock"
        self.socket = folder / "client.sock"
        self.write_policy(client_policy() if policy is None else policy)
        self._write_tls()
        self.config_file.write_text(self._config(keys, name, more, data))
        self.signer = self._signer()
        self._running = False
        self._stack = AsyncExitStack()
        self._usual: Channel | None = None

    async def __aenter__(self) -> Self:
        """Start the signer."""
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up and stop the signer."""
        await self._stack.aclose()
        await self.stop()

    @property
    def port(self) -> int:
        """Return the TCP port."""
        return self.signer.port

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the environment of a signer in a process of its own."""
        return {**os.environ, **({} if self.hsm is None else self.hsm.environment)}

    @property
    def command(self) -> list[str]:
        """Return the command line of a signer in a process of its own."""
        return [sys.executable, "-m", "spire_hw_signer", "run", "-config", str(self.config_file)]

    async def start(self) -> None:
        """Start the signer."""
        await self.signer.start()
        self._running = True

    async def stop(self) -> None:
        """Stop the signer as SIGTERM does."""
        if self._running:
            self._running = False
            await self.signer.close()

    async def restart(self) -> None:
        """Stop it and start another one with the same files."""
        await self.hang_up()
        await self.stop()
        self.signer = self._signer()
        await self.start()

    async def hang_up(self) -> None:
        """Close the usual connection."""
        if self._usual is not None:
            await self._usual.close()
            self._usual = None

    def write_policy(self, text: str) -> None:
        """Replace the policy file; the signer is not told."""
        self.policy_file.write_text(text)

    async def channel(self, identity: TlsIdentity | None = None, port: int = 0) -> Channel:
        """Return a new connection; the usual client's unless told otherwise."""
        dialer = Dialer(
            "127.0.0.1",
            port or self.port,
            server_id=SpiffeId.parse(SIGNER_ID),
            bundle=self.authority.bundle,
            identity=identity or self.identity,
            least=ssl.TLSVersion.TLSv1_3,
        )
        made = await connect(dialer)
        self._stack.push_async_callback(made.close)
        return made

    def local_channel(self) -> Channel:
        """Return a connection to the unix socket of clients."""
        made = connect_unix(self.socket)
        self._stack.push_async_callback(made.close)
        return made

    async def call(
        self,
        method: str,
        request: Any,
        *,
        channel: Channel | None = None,
        timeout_s: float | None = TIMEOUT_S,
    ) -> Any:
        """Call a method of the signer, over the usual connection unless told otherwise."""
        if channel is None:
            if self._usual is None:
                self._usual = await self.channel()
            channel = self._usual
        kind = getattr(hw_signer_pb2, f"{method}Response")
        return await channel.unary(SERVICE + method, request, kind, timeout_s=timeout_s)

    async def generate(
        self,
        key_id: str,
        key_type: KeyType = KeyType.EC_P256,
        *,
        request_id: bytes = b"",
        channel: Channel | None = None,
    ) -> Any:
        """Have a key made; returns the whole answer."""
        request = hw_signer_pb2.GenerateKeyRequest(
            request_id=request_id or secrets.token_bytes(16),
            key_id=key_id,
            key_type=key_type.name,
        )
        return await self.call("GenerateKey", request, channel=channel)

    async def sign(
        self,
        key_id: str,
        *,
        request_id: bytes = b"",
        hash_number: int = 5,
        channel: Channel | None = None,
        **purpose: bytes,
    ) -> Any:
        """Have one item signed; returns its result.

        Args:
            key_id: with which key.
            request_id: 16 random bytes without it.
            hash_number: Go's number of the hash.
            channel: over which connection.
            purpose: `x509=`, `csr=`, `jwt=` or `digest=`.
        """
        item = hw_signer_pb2.SignItem(
            request_id=request_id or secrets.token_bytes(16),
            key_id=key_id,
            hash=hash_number,
            **purpose,  # type: ignore[arg-type]  # one of four fields, all bytes
        )
        request = hw_signer_pb2.SignRequest(items=[item])
        response = await self.call("Sign", request, channel=channel)
        return response.results[0]

    def _signer(self) -> Signer:
        body = hcl.parse(self.config_file.read_text(), str(self.config_file))
        return Signer(build_settings(body), clock=self.clock)

    def _write_tls(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self.authority.leaf(key.public_key(), SIGNER_ID)
        (self.folder / "signer.pem").write_bytes(encode_pem([leaf, *self.authority.chain]))
        (self.folder / "ca.pem").write_bytes(encode_pem([self.authority.der]))
        (self.folder / "signer.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    def _config(self, keys: str, name: str, more: str, data: str) -> str:
        folder = self.folder
        if self.hsm is not None:
            pin_file = folder / "pin"
            pin_file.write_text(PIN)
            pin_file.chmod(0o600)
            data += f"""
      module_path = "{self.hsm.module}"
      token_label = "{TOKEN}"
      pin_file    = "{pin_file}"
      environment {{ SOFTHSM2_CONF = "{self.hsm.conf}" }}"""
        return f"""
signer {{
  name              = "{name}"
  bind_address      = "127.0.0.1"
  bind_port         = 0
  socket_path       = "{self.socket}"
  admin_socket_path = "{self.admin_socket}"
  data_dir          = "{folder}/data"
  policy_file       = "{self.policy_file}"
  tls {{
    cert_file       = "{folder}/signer.pem"
    key_file        = "{folder}/signer.key"
    client_ca_files = ["{folder}/ca.pem"]
  }}
  {more}
}}
plugins {{
  KeyManager "{keys}" {{
    plugin_data {{{data}
    }}
  }}
}}
"""
