"""The public area an endorsement key most likely has, from its bare public key.

Peers that send a certificate or key alone leave open which template made it. Templates of one key
type agree on name algorithm and cipher, which is all a credential is made by.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import rsa

from spire_hw.errors import InvalidInputError
from spire_hw.tpm import wire
from spire_hw.tpm.public import EK_TEMPLATES, key_label
from spire_hw.tpm.wire import sized

if TYPE_CHECKING:
    from spire_hw.key import PublicKey

_CURVES = {
    "secp256r1": wire.CURVE_P256,
    "secp384r1": wire.CURVE_P384,
    "secp521r1": wire.CURVE_P521,
}


def build_ek_area(key: PublicKey) -> bytes:
    """Return TPMT_PUBLIC bytes after the first TCG template for this type of key.

    Raises:
        InvalidInputError: no template is for such keys.

    Spec: TCG EK Credential Profile, Annex B.
    """
    template = next((t for t in EK_TEMPLATES if t.key_type == key_label(key)), None)
    if template is None:
        raise InvalidInputError(f"ek: key type is not supported: {key_label(key)}")
    kind = wire.ALG_RSA if isinstance(key, rsa.RSAPublicKey) else wire.ALG_ECC
    head = struct.pack(">HHI", kind, template.name_alg, template.attributes)
    head += sized(template.auth_policy)
    head += struct.pack(">HHH", wire.ALG_AES, template.aes_bits, wire.ALG_CFB)
    head += struct.pack(">H", wire.ALG_NULL)
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        modulus = numbers.n.to_bytes(key.key_size // 8, "big")
        exponent = 0 if numbers.e == 65537 else min(numbers.e, 0xFFFFFFFF)  # noqa: PLR2004
        return head + struct.pack(">HI", key.key_size, exponent) + sized(modulus)
    size = (key.key_size + 7) // 8
    point = key.public_numbers()
    x, y = point.x.to_bytes(size, "big"), point.y.to_bytes(size, "big")
    curve = _CURVES[key.curve.name]
    return head + struct.pack(">HH", curve, wire.ALG_NULL) + sized(x) + sized(y)
