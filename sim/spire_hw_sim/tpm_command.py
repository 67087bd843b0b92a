"""The few TPM commands a test bench gives as the machine's owner or vendor, as raw bytes.

They stand in for firmware, factory and a meddling administrator, so they share no code with the
device room they test.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from spire_hw.errors import DeviceError

# One command in, one response out.
Transport = Callable[[bytes], bytes]

OWNER, LOCKOUT, ENDORSEMENT, PLATFORM = 0x40000001, 0x4000000A, 0x4000000B, 0x4000000C

_PASSWORD_SESSION = 0x40000009
_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002
_CAP_HANDLES = 1
_RETRY = 0x922
_NV_CHUNK = 512

# Written by the platform, readable by platform, owner and with the index's own empty password,
# outside dictionary attack protection: what vendors set for certificates (TCG EK profile).
_VENDOR_NV = 0x42070001

# TPMT_PUBLIC template of a P-256 signing key without noDA.
_LOCKABLE_KEY = bytes.fromhex(
    "0023000b000400720000" + "0010" + "0018000b" + "00030010" + "00000000"
)

HASH_IDS = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}


@dataclass(frozen=True, slots=True)
class Commands:
    """Commands for one simulated TPM.

    Attributes:
        transport: sends a command, returns the response.
        passwords: hierarchy passwords that were set, by handle.
    """

    transport: Transport
    passwords: dict[int, bytes] = field(default_factory=dict)

    def shutdown(self) -> None:
        """Tell the TPM that power goes away."""
        self._run("Shutdown", 0x145, [], struct.pack(">H", 0))

    def pcr_extend(self, index: int, digests: dict[str, bytes]) -> None:
        """Extend a PCR in several banks at once."""
        body = struct.pack(">I", len(digests))
        for bank, digest in digests.items():
            body += struct.pack(">H", HASH_IDS[bank]) + digest
        self._run("PCR_Extend", 0x182, [index], body, authorised=1)

    def create_primary(
        self, hierarchy: int, template: bytes, password: bytes = b""
    ) -> tuple[int, bytes]:
        """Make a primary key from TPMT_PUBLIC bytes; return its handle and TPMT_PUBLIC."""
        sensitive = _sized(_sized(password) + _sized(b""))
        body = sensitive + _sized(template) + struct.pack(">HI", 0, 0)
        answer = self._run("CreatePrimary", 0x131, [hierarchy], body, authorised=1)
        handle, _, size = struct.unpack_from(">IIH", answer)
        return handle, answer[10 : 10 + size]

    def create_child(self, parent: int, parent_password: bytes, password: bytes) -> int:
        """Make and load a P-256 signing key that wrong passwords for it can lock; return it.

        Raises:
            DeviceError: the TPM refused.
        """
        self.passwords[parent] = parent_password
        try:
            sensitive = _sized(_sized(password) + _sized(b""))
            body = sensitive + _sized(_LOCKABLE_KEY) + _sized(b"") + bytes(4)
            answer = self._run("Create", 0x153, [parent], body, authorised=1)
            _, first = struct.unpack_from(">IH", answer)
            private = answer[4 : 6 + first]
            (second,) = struct.unpack_from(">H", answer, 6 + first)
            public = answer[6 + first : 8 + first + second]
            loaded = self._run("Load", 0x157, [parent], private + public, authorised=1)
        finally:
            del self.passwords[parent]
        return int.from_bytes(loaded[:4], "big")

    def sign_with_password(self, key: int, password: bytes) -> int:
        """Sign with a key under a password; return the response code."""
        scheme, no_ticket = bytes.fromhex("0018000b"), bytes.fromhex("8024400000070000")
        body = _sized(bytes(32)) + scheme + no_ticket
        self.passwords[key] = password
        code = _RETRY
        while code == _RETRY:  # the TPM writes its counters first
            try:
                self._run("Sign", 0x15D, [key], body, authorised=1)
                code = 0
            except DeviceError as e:
                code = e.code
        del self.passwords[key]
        return code

    def set_dictionary_attack_limit(self, tries: int) -> None:
        """Lock after so many wrong passwords, for an hour each."""
        body = struct.pack(">III", tries, 3600, 3600)
        self._run("DictionaryAttackParameters", 0x13A, [LOCKOUT], body, authorised=1)

    def read_public(self, handle: int) -> bytes:
        """Return the TPMT_PUBLIC of a loaded or persistent object."""
        answer = self._run("ReadPublic", 0x173, [handle], b"")
        (size,) = struct.unpack_from(">H", answer)
        return answer[2 : 2 + size]

    def flush(self, handle: int) -> None:
        """Unload a transient object or session."""
        self._run("FlushContext", 0x165, [], struct.pack(">I", handle))

    def persist(self, handle: int, persistent: int) -> None:
        """Keep a transient object of the owner or endorsement hierarchy under a fixed handle."""
        self._run(
            "EvictControl", 0x120, [OWNER, handle], struct.pack(">I", persistent), authorised=1
        )

    def clear(self) -> None:
        """Do what an administrator does in the firmware menu: TPM2_Clear."""
        self._run("Clear", 0x126, [PLATFORM], b"", authorised=1)

    def set_password(self, hierarchy: int, password: bytes) -> None:
        """Set the authorisation of a hierarchy."""
        self._run("HierarchyChangeAuth", 0x129, [hierarchy], _sized(password), authorised=1)
        self.passwords[hierarchy] = password

    def nv_store(self, index: int, data: bytes) -> None:
        """Define an NV index the vendor's way, or redefine it, and fill it."""
        if index in self.handles(0x01000000):
            self._run("NV_UndefineSpace", 0x122, [PLATFORM, index], b"", authorised=1)
        public = struct.pack(">IHIHH", index, HASH_IDS["sha256"], _VENDOR_NV, 0, len(data))
        self._run("NV_DefineSpace", 0x12A, [PLATFORM], _sized(b"") + _sized(public), authorised=1)
        for offset in range(0, len(data), _NV_CHUNK):
            body = _sized(data[offset : offset + _NV_CHUNK]) + struct.pack(">H", offset)
            self._run("NV_Write", 0x137, [PLATFORM, index], body, authorised=1)

    def handles(self, first: int) -> list[int]:
        """Return handles of one range: 0x80000000 transient, 0x02000000 loaded sessions."""
        body = struct.pack(">III", _CAP_HANDLES, first, 254)
        answer = self._run("GetCapability", 0x17A, [], body)
        (count,) = struct.unpack_from(">I", answer, 5)
        return list(struct.unpack_from(f">{count}I", answer, 9))

    def _run(
        self, name: str, code: int, handles: list[int], body: bytes, *, authorised: int = 0
    ) -> bytes:
        area = b"".join(struct.pack(">I", h) for h in handles)
        if authorised:
            auths = b"".join(self._password(h) for h in handles[:authorised])
            area += struct.pack(">I", len(auths)) + auths
        tag = _SESSIONS if authorised else _NO_SESSIONS
        command = struct.pack(">HII", tag, 10 + len(area) + len(body), code) + area + body
        answer = self.transport(command)
        _, _, rc = struct.unpack_from(">HII", answer)
        if rc:
            raise DeviceError(
                f"simulated TPM answered 0x{rc:x} to {name}",
                device="swtpm",
                operation=name,
                code=rc,
            )
        return answer[10:]

    def _password(self, handle: int) -> bytes:
        secret = self.passwords.get(handle, b"")
        return struct.pack(">IHBH", _PASSWORD_SESSION, 0, 1, len(secret)) + secret


def _sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data
