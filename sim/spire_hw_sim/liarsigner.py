"""A signer that can lie, lose answers and die: real TLS, real signatures, no policy and no token."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from spire_hw._pb import hw_signer_pb2 as pb
from spire_hw.aio.tasks import Tasks
from spire_hw.clock import SystemClock
from spire_hw.errors import NotFoundError, NotReadyError
from spire_hw.evidence.checkpoint import statement_of
from spire_hw.evidence.document import Document, KeyReport, sign
from spire_hw.jose.text import encode_json
from spire_hw.key import (
    HashAlgorithm,
    KeyType,
    PrivateKey,
    SignOptions,
    SoftwareSigner,
    default_hash,
    fingerprint,
    generate_private_key,
    sign_digest,
    spki_der,
)
from spire_hw.log import get_logger
from spire_hw.plugin.custody import Custody
from spire_hw.plugin.keymanager import KeyEvidence
from spire_hw.rpc.server import RpcServer
from spire_hw.rpc.service import bind
from spire_hw.transport.mutual import MutualFront, Pins
from spire_hw.x509.certificate import encode_pem
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from spire_hw.rpc.service import Call
    from spire_hw.transport.tls import TlsIdentity

_CUSTODY: Final = pb.DESCRIPTOR.services_by_name["Custody"]
DOMAIN: Final = "infra.example"
SIGNER_ID: Final = f"spiffe://{DOMAIN}/signer"
SERVER_ID: Final = f"spiffe://{DOMAIN}/spire-server-1"
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Signer"]
_GENESIS: Final = bytes(32)


@dataclass
class Lies:
    """What it does wrong; nothing unless told.

    Attributes:
        foreign_key: signs with a key nobody knows.
        foreign_fingerprint: says that key's fingerprint too.
        hidden: key ids it does not list.
        swapped: public keys it lists in place of its own.
        extra: ids of keys it lists and nobody asked for.
        lost_generations: answers to GenerateKey that it loses, with the connection.
        lost_signatures: answers to Sign that it loses, with the connection.
        refusal: what every signature is answered with.
        sign_s: how long a signature takes.
        rewind: records that its head is behind.
        fork: heads have another hash than they should.
        log_key: another key that signs its checkpoints.
        no_log_key: it shows none.
        checkpoint: changes one that was signed.
        custody: where it says that keys are.
        custody_of: fingerprint it says that of, in place of the key's.
        evidence: changes a document before it is signed with the log key.
    """

    foreign_key: bool = False
    foreign_fingerprint: bool = False
    hidden: set[str] = field(default_factory=set)
    swapped: dict[str, PrivateKey] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    lost_generations: int = 0
    lost_signatures: int = 0
    refusal: pb.Refusal | None = None
    sign_s: float = 0.0
    rewind: int = 0
    fork: bool = False
    log_key: PrivateKey | None = None
    no_log_key: bool = False
    checkpoint: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda body: body)
    custody: pb.KeyCustody = field(
        default_factory=lambda: pb.KeyCustody(
            custody="hsm reported",
            location="a drawer",
            token="the liar's",  # noqa: S106 - a label
            attributes={"LOCAL": "true"},
        )
    )
    custody_of: str = ""
    evidence: Callable[[Document], Document] = field(default=lambda document: document)


class Shelf:
    """The keys of a token, which several signers may share.

    Attributes:
        keys: by id, oldest first.
        generations: how many keys were made.
    """

    def __init__(self) -> None:
        self.keys: dict[str, PrivateKey] = {}
        self.generations = 0


class LiarSigner:
    """One signer on loopback; `start` and `stop` as often as wanted.

    Attributes:
        authority: signed its certificate, and its clients'.
        shelf: its keys.
        lies: what it does wrong, at any time.
        batches: number of items of each Sign call.
        request_ids: of every item and generation that was asked for, in order.
        executed: request ids whose signature or key was made.
        asked: a signature was asked for.
        hang: signatures wait for it, unless it is None.
        makes_no_keys: its device is one that another signer makes keys on.
        dies_after_generation: the next key is its last deed.
        callers: SPIFFE IDs of who asked for signatures, in order.
    """

    def __init__(
        self,
        authority: Authority | None = None,
        shelf: Shelf | None = None,
        spiffe_id: str = SIGNER_ID,
    ) -> None:
        self.authority = authority or Authority(DOMAIN)
        self.shelf = shelf or Shelf()
        self.lies = Lies()
        self.batches: list[int] = []
        self.request_ids: list[bytes] = []
        self.executed: list[bytes] = []
        self.port = 0
        self.identity = self.authority.identity(spiffe_id)
        self._answers: dict[bytes, PrivateKey] = {}
        self._log_key = ec.generate_private_key(ec.SECP256R1())
        self._foreign = ec.generate_private_key(ec.SECP256R1())
        self._seq, self._head = 0, _GENESIS
        self._server: RpcServer | None = None
        self._tasks = Tasks(self._failed)
        self.hang: asyncio.Event | None = None
        self.asked = asyncio.Event()
        self.dies_after_generation = self.makes_no_keys = False
        self.callers: list[str] = []

    @property
    def address(self) -> str:
        """Return where it listens, as in a configuration."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen; on the same port as before."""
        server = RpcServer([*bind(_SERVICE, self), *bind(_CUSTODY, self)], log=get_logger("liar"))
        front = MutualFront(
            "127.0.0.1",
            self.port,
            identity=self._identity,
            pins=lambda: Pins((self.authority.certificate,)),
            refused=lambda _ip, _reason: None,
        )
        server.add_front(front)
        await server.start()
        self.port = front.port
        self._server = server

    async def stop(self) -> None:
        """Go away; connections are cut."""
        server, self._server = self._server, None
        if server is not None:
            await server.close(0)

    def rewind_log(self, records: int) -> None:
        """Put an old log back."""
        self._seq -= records

    def _identity(self) -> TlsIdentity:
        return self.identity

    async def get_public_keys(self, request: Any, call: Call) -> pb.GetPublicKeysResponse:
        """Serve GetPublicKeys."""
        answer = pb.GetPublicKeysResponse(log_head=self._written(b"list"))
        for key_id, key in self.shelf.keys.items():
            if key_id not in self.lies.hidden:
                answer.public_keys.append(_message(key_id, self.lies.swapped.get(key_id, key)))
        for key_id in self.lies.extra:
            answer.public_keys.append(_message(key_id, self._foreign))
        return answer

    async def generate_key(self, request: Any, call: Call) -> pb.GenerateKeyResponse:
        """Serve GenerateKey."""
        self.request_ids.append(request.request_id)
        if self.makes_no_keys:
            raise NotReadyError("the signer could not do it: record 7 of its audit log tells why")
        made = self._answers.get(request.request_id)
        if made is None:
            made = generate_private_key(KeyType(request.key_type))
            self._answers[request.request_id] = made
            self.shelf.keys.pop(request.key_id, None)
            self.shelf.keys[request.key_id] = made
            self.shelf.generations += 1
            self.executed.append(request.request_id)
        head = self._written(request.request_id)
        if self.dies_after_generation:
            self._tasks.start("die", self.stop())
            await asyncio.Event().wait()
        if self.lies.lost_generations:
            self.lies.lost_generations -= 1
            await self._lose()
        return pb.GenerateKeyResponse(public_key=_message(request.key_id, made), log_head=head)

    async def sign(self, request: Any, call: Call) -> pb.SignResponse:
        """Serve Sign."""
        self.batches.append(len(request.items))
        self.asked.set()
        self.callers.append(str(getattr(call.peer, "spiffe_id", "")))
        self.request_ids += [item.request_id for item in request.items]
        if self.lies.sign_s:
            await asyncio.sleep(self.lies.sign_s)
        if self.hang is not None:
            await self.hang.wait()
        answer = pb.SignResponse(log_head=self._written(b"sign"))
        for item in request.items:
            answer.results.append(self._signed(item))
        if self.lies.lost_signatures:
            self.lies.lost_signatures -= 1
            await self._lose()
        return answer

    async def get_log_head(self, request: Any, call: Call) -> pb.GetLogHeadResponse:
        """Serve GetLogHead."""
        key, lies = self.lies.log_key or self._log_key, self.lies
        head = self._written(b"head")
        return pb.GetLogHeadResponse(
            log_head=head,
            checkpoint=await self._vouched(head, key),
            log_key=b"" if lies.no_log_key else spki_der(key.public_key()),
        )

    async def _vouched(self, head: pb.LogHead, key: PrivateKey) -> bytes:
        """Return a checkpoint for a head, as it would stand in the log."""
        body: dict[str, Any] = {
            "at": head.seq,
            "clock": "",
            "head": head.hash.hex(),
            "key": fingerprint(spki_der(key.public_key())),
            "log": "0" * 32,
            "taken": "2026-11-22T08:12:00.000000Z",
        }
        algorithm = default_hash(key.public_key())
        digest = algorithm.digest(statement_of(body))
        signature = await SoftwareSigner(key).sign(digest, SignOptions(algorithm))
        return encode_json(self.lies.checkpoint({**body, "signature": signature.hex()}))

    async def get_key_custody(self, request: Any, call: Call) -> pb.GetKeyCustodyResponse:
        """Serve GetKeyCustody."""
        return pb.GetKeyCustodyResponse(
            fingerprint=self.lies.custody_of or self._report(request.key_id).fingerprint,
            custody=self.lies.custody,
            log_head=self._written(b"custody"),
        )

    async def attest_own_key(self, request: Any, call: Call) -> pb.AttestOwnKeyResponse:
        """Serve AttestOwnKey."""
        signing = self.lies.log_key or self._log_key
        where = KeyEvidence("a drawer", {}, custody=Custody.HSM_REPORTED)
        document = Document(
            trust_domain="example.org",
            key=self._report(request.key_id),
            signer=KeyReport("audit-log", spki_der(signing.public_key()), where),
            nonce=request.nonce,
            made_at=SystemClock().now(),
        )
        return pb.AttestOwnKeyResponse(
            evidence=await sign(self.lies.evidence(document), SoftwareSigner(signing)),
            log_head=self._written(b"attest"),
        )

    def _report(self, key_id: str) -> KeyReport:
        key = self.shelf.keys.get(key_id)
        if key is None:
            raise NotFoundError("no such key")
        where = KeyEvidence("a drawer", {}, custody=Custody.HSM_REPORTED)
        return KeyReport(key_id, spki_der(key.public_key()), where)

    def _signed(self, item: Any) -> pb.SignResult:
        if self.lies.refusal is not None:
            return pb.SignResult(refusal=self.lies.refusal)
        key = self.shelf.keys.get(item.key_id)
        if key is None:
            return pb.SignResult(refusal=pb.Refusal(code=7, reason="key", message="not yours"))
        self.executed.append(item.request_id)
        options = SignOptions(HashAlgorithm(item.hash), item.HasField("pss"))
        which = item.WhichOneof("purpose")
        content = getattr(item, which)
        digest = content if which == "digest" else options.hash.digest(content)
        signing = self._foreign if self.lies.foreign_key else key
        named = self._foreign if self.lies.foreign_fingerprint else key
        return pb.SignResult(
            signature=sign_digest(signing, digest, options),
            fingerprint=fingerprint(spki_der(named.public_key())),
        )

    def _written(self, record: bytes) -> pb.LogHead:
        self._seq += 1
        self._head = hashlib.sha256(self._head + record).digest()
        shown = hashlib.sha256(b"fork" + self._head).digest() if self.lies.fork else self._head
        return pb.LogHead(seq=max(1, self._seq - self.lies.rewind), hash=shown)

    async def _lose(self) -> None:
        """Cut the connection instead of answering."""
        self._tasks.start("restart", self._restart())
        await asyncio.Event().wait()

    async def _restart(self) -> None:
        await self.stop()
        await self.start()

    def _failed(self, name: str, error: BaseException) -> None:
        get_logger("liar").error("task failed", task=name, exc_info=error)


def _message(key_id: str, key: PrivateKey) -> pb.PublicKey:
    public = key.public_key()
    kinds = {91: pb.EC_P256, 120: pb.EC_P384, 294: pb.RSA_2048, 550: pb.RSA_4096}
    spki = spki_der(public)
    return pb.PublicKey(
        id=key_id, type=kinds[len(spki)], pkix_data=spki, fingerprint=fingerprint(spki)
    )


@dataclass(frozen=True)
class ClientFiles:
    """What a client of a signer has on its disk.

    Attributes:
        ca: signed the signer's certificate.
        cert: the client's chain.
        key: the client's key.
    """

    ca: Path
    cert: Path
    key: Path

    def config(self, *addresses: str, **more: object) -> dict[str, object]:
        """Return plugin_data for signers at some addresses."""
        return {
            "addresses": list(addresses),
            "signer_ca": str(self.ca),
            "signer_id": SIGNER_ID,
            "cert": str(self.cert),
            "key": str(self.key),
            **more,
        }


def write_client(
    authority: Authority,
    directory: Path,
    spiffe_id: str = SERVER_ID,
    *,
    end: datetime | None = None,
    issuer: Authority | None = None,
) -> ClientFiles:
    """Write the files of a client; again, to renew them.

    Args:
        authority: signed the signer's certificate, and the client's unless there is an issuer.
        directory: where they go.
        spiffe_id: the client's.
        end: of the client's certificate.
        issuer: signs the client's certificate.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = ClientFiles(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")
    identity = (issuer or authority).identity(spiffe_id, end=end)
    assert identity.private_key is not None  # noqa: S101 - made above
    key = identity.private_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    files.ca.write_bytes(encode_pem([authority.der]))
    files.cert.write_bytes(encode_pem(identity.chain_der))
    files.key.write_bytes(key)
    files.key.chmod(0o600)
    return files
