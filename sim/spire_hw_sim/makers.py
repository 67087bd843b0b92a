"""TPM manufacturers with chains and certificates shaped like real ones, oddities included.

Each shape was read from certificates that makers publish or that their TPMs hold; keys and names
are our own. What one shape has odd, the others do not, so a fault points at its cause.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from spire_hw_sim import ekca
from spire_hw_sim.ekca import EkCa, Spec, ca_spec, ek_spec, tlv
from spire_hw_sim.softtpm import make_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw.key import PublicKey

_INFO_ACCESS: Final = "1.3.6.1.5.5.7.1.1"
_CA_ISSUERS: Final = "1.3.6.1.5.5.7.48.2"
_POLICIES: Final = "2.5.29.32"
_DIRECTORY_ATTRIBUTES: Final = "2.5.29.9"
_SPECIFICATION: Final = "2.23.133.2.16"
_FAMILY: Final = b"2.0"


@dataclass(frozen=True, slots=True)
class Maker:
    """A manufacturer.

    Attributes:
        root: its root CA.
        between: the CAs below, the one that certifies endorsement keys last.
        bend: makes a regular endorsement certificate one of its own.
        published: its root as it is published, which may have bytes behind it.
        in_nv: its TPMs hold the CAs between as well.
    """

    root: EkCa
    between: tuple[EkCa, ...]
    bend: Callable[[Spec], None]
    published: bytes
    in_nv: bool = False

    @property
    def chain(self) -> tuple[bytes, ...]:
        """Return the CAs between, as a TPM holds them: the nearest first."""
        return tuple(ca.certificate for ca in reversed(self.between))

    def certify(self, key: PublicKey) -> bytes:
        """Return an endorsement certificate for a key."""
        spec = ek_spec(key)
        self.bend(spec)
        return self.between[-1].issue(spec)


@functools.cache
def make_maker(shape: str) -> Maker:
    """Return the manufacturer of a shape, the same for a whole process."""
    return _BUILDERS[shape]()


def _san(value: bytes) -> bytes:
    return ekca.extension(ekca.SAN, value, critical=True)


def _replace(spec: Spec, kind: str, value: bytes) -> None:
    needle = ekca.oid(kind)
    spec.extensions = [value if needle in one else one for one in spec.extensions]


def _one_set() -> Maker:
    """All three attributes in one SET, not in order; P-521 over P-384."""
    root = _root("Set", "secp521r1", "sha512")
    leaf_ca = _below(root, "Set LeafCA", "secp384r1", 1, hash_name="sha512")

    def bend(spec: Spec) -> None:
        name = ekca.tpm_name("id:4E544300", "NPCT75x", "id:00070002", one_set=True)
        _replace(spec, ekca.SAN, _san(ekca.san(name)))
        spec.hash = "sha384"

    return Maker(root, (leaf_ca,), bend, root.certificate)


def _oaep() -> Maker:
    """RSA keys under the RSAES-OAEP identifier, authorities with purposes and policies."""
    root = _root("Oaep", "rsa3072", "sha256")
    own = _below(
        root,
        "Oaep Manufacturing CA 035",
        "rsa2048",
        0,
        extensions=[
            ekca.extension(
                _INFO_ACCESS,
                tlv(
                    0x30,
                    tlv(0x30, ekca.oid(_CA_ISSUERS), tlv(0x86, b"http://pki.example.org/r.crt")),
                ),
            ),
            ekca.crl_points("http://pki.example.org/r.crl"),
            ekca.extension(_POLICIES, tlv(0x30, tlv(0x30, ekca.oid("1.2.276.0.68.1.20.1")))),
            ekca.eku(ekca.EK_PURPOSE),
        ],
    )

    def bend(spec: Spec) -> None:
        head = ekca.oid("1.2.840.113549.1.1.1") + b"\x05\x00"
        if head in spec.spki:
            inner = spec.spki[spec.spki.index(b"\x03\x82") :]
            spec.spki = tlv(0x30, tlv(0x30, ekca.oid(ekca.RSAES_OAEP), b"\x30\x00"), inner)
        name = ekca.tpm_name("id:49465800", "SLB 9670", "id:0755")
        _replace(spec, ekca.SAN, _san(ekca.san(name)))
        spec.serial = -0x1FD07D58

    return Maker(root, (own,), bend, root.certificate)


def _padded_serials() -> Maker:
    """Serials with zeros in front, authorities without extended purposes, UTCTime."""
    root = _root("Pad", "secp384r1", "sha384")
    own = _below(
        root,
        "Pad EK Intermediate CA 05",
        "rsa2048",
        0,
        hash_name="sha384",
        serial=b"\x02\x04\0\0\0\6",
    )

    def bend(spec: Spec) -> None:
        spec.serial = b"\x02\x05\x00\x00\x00\x01\x02"
        spec.not_before = tlv(0x17, b"200101000000Z")
        spec.not_after = tlv(0x17, b"351231000000Z")
        name = ekca.tpm_name("id:53544D20", "ST33HTPHAHC0", "id:00010102")
        _replace(spec, ekca.SAN, _san(ekca.san(name)))

    return Maker(root, (own,), bend, root.certificate)


def _on_die() -> Maker:
    """Four CAs, the lower ones made by firmware and held in the TPM; NULL behind ECDSA."""
    root = _root("Die", "secp384r1", "sha384", null_parameters=True)
    upper = _below(
        root, "Die Intermediate", "secp384r1", None, hash_name="sha384", null_parameters=True
    )
    kernel = _below(upper, "Die Kernel CA", "secp384r1", None, hash_name="sha384")
    own = _below(kernel, "Die EK CA", "secp384r1", 0, hash_name="sha384")

    def bend(spec: Spec) -> None:
        name = ekca.tpm_name("id:494E5443", "ADL", "id:00020000")
        _replace(spec, ekca.SAN, _san(ekca.san(name)))
        specification = tlv(0x30, tlv(0x0C, _FAMILY), ekca.integer(0), ekca.integer(138))
        attributes = tlv(0x30, tlv(0x30, ekca.oid(_SPECIFICATION), tlv(0x31, specification)))
        spec.extensions += [
            ekca.extension(_DIRECTORY_ATTRIBUTES, attributes),
            ekca.crl_points("https://tsci.example.org/content/OnDieCA/crls/1.crl"),
        ]
        spec.hash = "sha384"

    return Maker(
        root,
        (upper, kernel, own),
        bend,
        root.certificate + b"\0\0",
        in_nv=True,
    )


def _foreign_root() -> Maker:
    """A root of a public CA above the maker's own, subject beside the alternative name."""
    root = _root("Foreign Root", "rsa3072", "sha384")
    own_root = _below(root, "Own Root", "rsa3072", 1, hash_name="sha384")
    own = _below(own_root, "Own EK CA 06", "rsa3072", 0)

    def bend(spec: Spec) -> None:
        spec.subject = ekca.name(("2.5.4.10", "Own"), ("2.5.4.3", "TPM EK"))
        name = ekca.tpm_name("id:53544D20", "ST33KTPM2XSPI", "id:00090100")
        _replace(spec, ekca.SAN, ekca.extension(ekca.SAN, ekca.san(name)))
        _replace(spec, ekca.EKU, ekca.extension(_POLICIES, tlv(0x30, tlv(0x30, ekca.oid("1.2.3")))))

    return Maker(root, (own_root, own), bend, root.certificate)


def _root(text: str, key: str, hash_name: str, *, null_parameters: bool = False) -> EkCa:
    private = make_key(key, 71)
    spec = ca_spec(f"{text} Root CA", private.public_key())
    spec.hash, spec.null_parameters = hash_name, null_parameters
    return EkCa.root(f"{text} Root CA", private, spec)


def _below(
    above: EkCa,
    text: str,
    key: str,
    path_length: int | None,
    *,
    hash_name: str = "sha256",
    serial: int | bytes | None = None,
    extensions: list[bytes] | None = None,
    null_parameters: bool = False,
) -> EkCa:
    private = make_key(key, 72)
    spec = ca_spec(text, private.public_key(), path_length)
    spec.hash, spec.null_parameters = hash_name, null_parameters
    spec.extensions += extensions or []
    if serial is not None:
        spec.serial = serial
    return above.child(text, private, spec)


_BUILDERS: Final = {
    "one set": _one_set,
    "OAEP": _oaep,
    "padded serials": _padded_serials,
    "on die": _on_die,
    "foreign root": _foreign_root,
}
# Every shape with the endorsement keys its maker certifies, as labels of templates.
SHAPES: Final = {
    "one set": ("L-1", "L-2", "H-3"),
    "OAEP": ("L-1", "L-2"),
    "padded serials": ("L-1", "L-2", "H-1", "H-2"),
    "on die": ("L-1", "L-2", "H-3", "H-6"),
    "foreign root": ("L-1", "L-2"),
}
