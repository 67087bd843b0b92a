"""A TPM in software, as far as a verifier can see one: it signs whatever it is told to.

Structures are built by hand over `cryptography`, so a test can have the honest ones and any
dishonest one beside them. Nothing here protects a key.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import struct
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.decrepit.ciphers.modes import CFB
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from spire_hw.key import PrivateKey, spki_der
from spire_hw.tpm import wire
from spire_hw.tpm.credential import kdfa, kdfe
from spire_hw.tpm.public import EK_TEMPLATES, EkTemplate, name_of, qualified_name
from spire_hw.tpm.wire import PcrSelection, encode_selections, sized

AK_ATTRIBUTES: Final = 0x00050472
SVID_KEY_ATTRIBUTES: Final = 0x00040472
PARENT_ATTRIBUTES: Final = 0x00030472
ENDORSEMENT: Final = wire.RH_ENDORSEMENT.to_bytes(4, "big")
OWNER: Final = wire.RH_OWNER.to_bytes(4, "big")
NULL: Final = wire.RH_NULL.to_bytes(4, "big")

_CURVES: Final[dict[str, tuple[ec.EllipticCurve, int]]] = {
    "secp256r1": (ec.SECP256R1(), wire.CURVE_P256),
    "secp384r1": (ec.SECP384R1(), wire.CURVE_P384),
    "secp521r1": (ec.SECP521R1(), wire.CURVE_P521),
}
_HASHES: Final[dict[int, hashes.HashAlgorithm]] = {
    wire.ALG_SHA1: hashes.SHA1(),  # noqa: S303 - verifiers must refuse it
    wire.ALG_SHA256: hashes.SHA256(),
    wire.ALG_SHA384: hashes.SHA384(),
    wire.ALG_SHA512: hashes.SHA512(),
}


@functools.cache
def rsa_key(bits: int, number: int = 0) -> rsa.RSAPrivateKey:
    """Return the RSA key of this size and number, the same for a whole process."""
    del number
    return rsa.generate_private_key(65537, bits)


def make_key(label: str, number: int = 0) -> PrivateKey:
    """Return a private key: `rsa2048` and the like (shared by number), or a fresh one on a curve."""
    if label.startswith("rsa"):
        return rsa_key(int(label[3:]), number)
    return ec.generate_private_key(_CURVES[label][0])


def encode_public(
    key: PrivateKey,
    attributes: int,
    *,
    name_alg: int = wire.ALG_SHA256,
    policy: bytes = b"",
    aes_bits: int = 0,
    scheme: tuple[int, int] | None = None,
    exponent: int = 0,
) -> bytes:
    """Return a TPMT_PUBLIC.

    Args:
        key: whose public half.
        attributes: TPMA_OBJECT.
        name_alg: hash of the Name.
        policy: authPolicy.
        aes_bits: child cipher, 0 for NULL.
        scheme: scheme and hash, None for NULL.
        exponent: the RSA exponent field.
    """
    kind = wire.ALG_RSA if isinstance(key, rsa.RSAPrivateKey) else wire.ALG_ECC
    out = struct.pack(">HHI", kind, name_alg, attributes) + sized(policy)
    if aes_bits:
        out += struct.pack(">HHH", wire.ALG_AES, aes_bits, wire.ALG_CFB)
    else:
        out += struct.pack(">H", wire.ALG_NULL)
    out += struct.pack(">H", wire.ALG_NULL) if scheme is None else struct.pack(">HH", *scheme)
    if isinstance(key, rsa.RSAPrivateKey):
        modulus = key.public_key().public_numbers().n.to_bytes(key.key_size // 8, "big")
        return out + struct.pack(">HI", key.key_size, exponent) + sized(modulus)
    x, y = coordinates(key)
    curve = _CURVES[key.curve.name][1]
    return out + struct.pack(">HH", curve, wire.ALG_NULL) + sized(x) + sized(y)


def coordinates(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    """Return x and y at field size."""
    size = (key.curve.key_size + 7) // 8
    numbers = key.public_key().public_numbers()
    return numbers.x.to_bytes(size, "big"), numbers.y.to_bytes(size, "big")


def default_scheme(key: PrivateKey, hash_alg: int = wire.ALG_SHA256) -> tuple[int, int]:
    """Return RSASSA or ECDSA with a hash."""
    is_rsa = isinstance(key, rsa.RSAPrivateKey)
    return (wire.ALG_RSASSA if is_rsa else wire.ALG_ECDSA, hash_alg)


@dataclass(frozen=True, slots=True)
class SoftKey:
    """An object of a software TPM."""

    private: PrivateKey
    public: bytes
    parent: bytes = ENDORSEMENT

    @property
    def name(self) -> bytes:
        """Return its Name."""
        return name_of(self.public)

    @property
    def qualified_name(self) -> bytes:
        """Return its qualified name; `parent` is the qualified name above it."""
        return qualified_name(self.parent, self.name)

    @property
    def spki(self) -> bytes:
        """Return the DER SubjectPublicKeyInfo."""
        return spki_der(self.private.public_key())


def template(label: str) -> EkTemplate:
    """Return the EK template with this label, such as `L-1`."""
    return next(t for t in EK_TEMPLATES if t.label == label)


def make_ek(label: str = "L-1", number: int = 0) -> SoftKey:
    """Return an endorsement key after a template."""
    t = template(label)
    private = make_key(t.key_type, number)
    public = encode_public(
        private, t.attributes, name_alg=t.name_alg, policy=t.auth_policy, aes_bits=t.aes_bits
    )
    return SoftKey(private, public)


def make_ak(
    kind: str = "secp256r1",
    *,
    attributes: int = AK_ATTRIBUTES,
    parent: bytes = ENDORSEMENT,
    hash_alg: int = wire.ALG_SHA256,
    scheme: tuple[int, int] | None = None,
    number: int = 100,
) -> SoftKey:
    """Return an attestation key."""
    private = make_key(kind, number)
    chosen = scheme or default_scheme(private, hash_alg)
    return SoftKey(private, encode_public(private, attributes, scheme=chosen), parent)


def make_svid_key(
    kind: str = "secp256r1", *, attributes: int = SVID_KEY_ATTRIBUTES, number: int = 200
) -> SoftKey:
    """Return a signing key as the TPM KeyManager makes it."""
    private = make_key(kind, number)
    return SoftKey(private, encode_public(private, attributes), OWNER)


def sign(key: PrivateKey, data: bytes, scheme: tuple[int, int]) -> bytes:
    """Return a TPMT_SIGNATURE over data."""
    kind, hash_alg = scheme
    algorithm = _HASHES[hash_alg]
    head = struct.pack(">HH", kind, hash_alg)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        size = (key.curve.key_size + 7) // 8
        r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(algorithm)))
        return head + sized(r.to_bytes(size, "big")) + sized(s.to_bytes(size, "big"))
    pad: padding.AsymmetricPadding = padding.PKCS1v15()
    if kind == wire.ALG_RSAPSS:
        pad = padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)
    return head + sized(key.sign(data, pad, algorithm))


@dataclass(slots=True)
class SoftTpm:
    """A machine's TPM: an endorsement key, an attestation key, PCRs and counters.

    `scramble` is what heads of statements add to counters and firmware version, as TPMs do for keys
    outside the endorsement hierarchy.
    """

    ek: SoftKey = field(default_factory=make_ek)
    ak: SoftKey = field(default_factory=make_ak)
    pcrs: dict[tuple[str, int], bytes] = field(default_factory=dict)
    clock_ms: int = 123_456
    reset_count: int = 2
    restart_count: int = 0
    safe: int = 1
    firmware_version: int = 0x2019102300163636
    ak_scheme: tuple[int, int] | None = None
    scramble: int = 0

    def __post_init__(self) -> None:
        """Give every PCR a value as if firmware had measured into it."""
        for bank in ("sha1", "sha256", "sha384", "sha512"):
            for n in range(wire.PCR_COUNT):
                if (bank, n) not in self.pcrs:
                    value = hashlib.new(bank, f"{bank} {n}".encode()).digest()
                    self.pcrs[bank, n] = value

    @property
    def scheme(self) -> tuple[int, int]:
        """Return the scheme the AK signs with."""
        return self.ak_scheme or default_scheme(self.ak.private)

    def attest(
        self,
        kind: int,
        body: bytes,
        extra: bytes,
        *,
        signer: bytes | None = None,
        magic: int = wire.MAGIC,
    ) -> bytes:
        """Return a TPMS_ATTEST."""
        qualified = self.ak.qualified_name if signer is None else signer
        head = struct.pack(">IH", magic, kind) + sized(qualified) + sized(extra)
        resets, restarts = (
            (count + self.scramble) % 2**32 for count in (self.reset_count, self.restart_count)
        )
        clock = struct.pack(">QIIB", self.clock_ms, resets, restarts, self.safe)
        firmware = (self.firmware_version + self.scramble) % 2**64
        return head + clock + struct.pack(">Q", firmware) + body

    def sign(self, data: bytes) -> bytes:
        """Return the AK's TPMT_SIGNATURE over data."""
        return sign(self.ak.private, data, self.scheme)

    def quote_body(self, selections: tuple[PcrSelection, ...]) -> bytes:
        """Return the body of a quote over present PCR values."""
        values = b"".join(self.pcrs[place] for place in wire.order_selection(selections))
        digest = hashlib.new(wire.HASHES[self.scheme[1]][0], values).digest()
        return encode_selections(selections) + sized(digest)

    def quote(self, selections: tuple[PcrSelection, ...], extra: bytes) -> tuple[bytes, bytes]:
        """Return a quote and its signature."""
        attest = self.attest(wire.ST_QUOTE, self.quote_body(selections), extra)
        return attest, self.sign(attest)

    def pcr_values(self, selection: PcrSelection) -> dict[str, dict[int, bytes]]:
        """Return the values a quote over one bank covers."""
        return {selection.bank: {n: self.pcrs[selection.bank, n] for n in selection.pcrs}}

    def certify(self, key: SoftKey, extra: bytes) -> tuple[bytes, bytes]:
        """Return a certify statement about a key, and its signature."""
        body = sized(key.name) + sized(key.qualified_name)
        attest = self.attest(wire.ST_CERTIFY, body, extra)
        return attest, self.sign(attest)

    def time(self, extra: bytes) -> tuple[bytes, bytes]:
        """Return a time statement, whose body has the true counters, and its signature."""
        clock = struct.pack(">QIIB", self.clock_ms, self.reset_count, self.restart_count, self.safe)
        body = struct.pack(">Q", self.clock_ms) + clock + struct.pack(">Q", self.firmware_version)
        attest = self.attest(wire.ST_TIME, body, extra)
        return attest, self.sign(attest)

    def creation_data(self, parent_name: bytes | None = None) -> bytes:
        """Return TPMS_CREATION_DATA of the AK; `parent_name` is needed unless it is a primary."""
        name = self.ak.parent if parent_name is None else parent_name
        alg = wire.ALG_NULL if parent_name is None else wire.ALG_SHA256
        digest = hashlib.sha256(b"").digest()
        head = encode_selections(()) + sized(digest) + struct.pack(">BH", 1, alg)
        return head + sized(name) + sized(self.ak.parent) + sized(b"")

    def creation(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the AK's statement about its own creation, and its signature."""
        body = sized(self.ak.name) + sized(hashlib.sha256(data).digest())
        attest = self.attest(wire.ST_CREATION, body, b"")
        return attest, self.sign(attest)

    def activate(self, credential: bytes, encrypted: bytes) -> bytes:
        """Open a credential for the AK, as TPM2_ActivateCredential does.

        Args:
            credential: TPM2B_ID_OBJECT.
            encrypted: TPM2B_ENCRYPTED_SECRET.

        Raises:
            ValueError: it is for another key, or was damaged.
        """
        name_alg = int.from_bytes(self.ek.public[2:4], "big")
        digest, size = wire.HASHES[name_alg]
        seed = self._seed(encrypted[2:], name_alg)
        blob = credential[2:]
        length = int.from_bytes(blob[:2], "big")
        mac, identity = blob[2 : 2 + length], blob[2 + length :]
        integrity = kdfa(digest, seed, "INTEGRITY", b"", b"", bits=size * 8)
        if not hmac.compare_digest(mac, hmac.digest(integrity, identity + self.ak.name, digest)):
            raise ValueError("integrity check failed (0x1DF)")
        bits = 128 if name_alg == wire.ALG_SHA256 else 256
        storage = kdfa(digest, seed, "STORAGE", self.ak.name, b"", bits=bits)
        decryptor = Cipher(algorithms.AES(storage), CFB(bytes(16))).decryptor()
        opened = decryptor.update(identity) + decryptor.finalize()
        return opened[2 : 2 + int.from_bytes(opened[:2], "big")]

    def _seed(self, encrypted: bytes, name_alg: int) -> bytes:
        algorithm = _HASHES[name_alg]
        private = self.ek.private
        if isinstance(private, rsa.RSAPrivateKey):
            oaep = padding.OAEP(padding.MGF1(algorithm), algorithm, b"IDENTITY\x00")
            return private.decrypt(encrypted, oaep)
        size = (private.curve.key_size + 7) // 8
        x, y = encrypted[2 : 2 + size], encrypted[4 + size :]
        peer = ec.EllipticCurvePublicKey.from_encoded_point(private.curve, b"\x04" + x + y)
        z = private.exchange(ec.ECDH(), peer)
        own = coordinates(private)[0]
        bits = algorithm.digest_size * 8
        return kdfe(algorithm.name, z, "IDENTITY", x, own, bits=bits)
