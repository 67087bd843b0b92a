"""Endorsement keys and certificates, attestation keys and the proof of their creation."""

from __future__ import annotations

from typing import Final

from tests.hostile.cases.case import IA, PD, UN, Case

_PEM: Final = "tpm/envelope:ek_bundle_is_refused"
_DENIED: Final = "tpm/endorsement:certificate_is_denied"
_MALFORMED: Final = "tpm/endorsement:certificate_is_malformed"
_KEYS: Final = "tpm/endorsement:weak_or_odd_key_in_a_certificate_is_refused"
_TEMPLATE: Final = "tpm/endorsement:public_area_of_no_ek_template_is_refused"
_AREAS: Final = "tpm/attestation_key:public_area_is_refused"
_BITS: Final = "tpm/attestation_key:attributes_are_demanded"
_SCHEMES: Final = "tpm/attestation_key:scheme_is_demanded"
_ECC: Final = "tpm/attestation_key:signature_of_an_ecc_ak_is_refused"
_RSA: Final = "tpm/attestation_key:signature_of_an_rsa_ak_is_refused"
_POLICY: Final = "tpm/ek_policy:policy"
_MISMATCH: Final = r"ek: .* are different keys \[ek_key_mismatch\]"
_UNTRUSTED: Final = r"\[ek_untrusted\]"

CASES: Final = (
    Case(
        26,
        "no endorsement key",
        IA,
        "EK is missing|no endorsement key in the request",
        (_PEM,),
    ),
    Case(
        27,
        "several certificates or keys, or text between",
        IA,
        "expected one certificate and at most one public key|text beside",
        (_PEM,),
    ),
    Case(28, "a private key", IA, "ek: unexpected PEM block", (_PEM,)),
    Case(
        29,
        "a certificate that is not DER",
        IA,
        "ek: certificate",
        ("tpm/endorsement:certificate_that_is_not_der_is_refused",),
    ),
    Case(
        30,
        "a genuine certificate, a key of software",
        IA,
        _MISMATCH,
        ("tpm/endorsement:genuine_certificate_with_a_software_key_is_refused",),
    ),
    Case(
        31,
        "a public area of another key",
        IA,
        _MISMATCH,
        ("tpm/endorsement:public_area_of_another_key_is_refused",),
    ),
    Case(32, "a public area of no template", IA, r"\[ek_template\]", (_TEMPLATE,)),
    Case(
        33,
        "a signing key as endorsement key",
        (*IA, *PD),
        r"\[ek_signing_key\]|\[ek_key_usage\]",
        (_TEMPLATE, f"{_DENIED}[signing certificate]"),
    ),
    Case(
        34,
        "an unknown manufacturer",
        PD,
        r"ek: issuer is not trusted \[ek_untrusted\]",
        ("tpm/endorsement:unknown_manufacturer_is_denied",),
    ),
    Case(
        35,
        "a root of the same name",
        PD,
        r"signature does not verify with the trusted issuer \[ek_untrusted\]",
        ("tpm/endorsement:home_made_root_of_the_same_name_is_denied",),
    ),
    Case(
        36,
        "a leaf as issuer",
        PD,
        r"issuer is not a CA certificate \[ek_issuer\]",
        ("tpm/endorsement:leaf_as_issuer_is_denied",),
    ),
    Case(
        37,
        "an issuer that may not sign",
        PD,
        r"\[ek_issuer\]",
        (
            "tpm/endorsement:exceeded_path_length_is_denied",
            "tpm/endorsement:issuer_without_cert_sign_or_constraints_is_denied",
        ),
    ),
    Case(
        38,
        "a chain too long, a circle of issuers",
        (*IA, *PD),
        rf"chain is longer than 6|{_UNTRUSTED}",
        (
            "tpm/endorsement:chain_of_seven_is_refused",
            "tpm/endorsement:circle_of_issuers_ends",
            "tpm/endorsement:path_deeper_than_six_is_denied",
        ),
    ),
    Case(
        39,
        "a root sent along",
        PD,
        _UNTRUSTED,
        ("tpm/endorsement:root_sent_by_the_node_is_not_trusted",),
    ),
    Case(40, "a certificate out of its time", PD, r"\[ek_expired\]", (_DENIED,)),
    Case(
        41,
        "an issuer out of its time",
        PD,
        r"\[ek_issuer_expired\]",
        ("tpm/endorsement:issuer_that_was_expired_at_issuance_is_denied",),
    ),
    Case(42, "dates that are none", IA, "ek: .*validity dates", (_MALFORMED,)),
    Case(43, "a leaf that says it is a CA", PD, r"\[ek_ca\]", (_DENIED,)),
    Case(
        44,
        "an unknown critical extension",
        PD,
        r"\[ek_critical_extension\]",
        (_DENIED, "tpm/endorsement:unknown_critical_extension_of_an_issuer_is_denied"),
    ),
    Case(45, "a certificate for something else", PD, r"\[ek_extended_key_usage\]", (_DENIED,)),
    Case(
        46,
        "a key usage that does not fit",
        PD,
        r"\[ek_key_usage\]",
        (_DENIED, "tpm/endorsement:key_agreement_on_an_rsa_key_is_denied"),
    ),
    Case(47, "two makers or models", IA, "ek: TPM \\w+ is ambiguous|ambiguous", (_MALFORMED,)),
    Case(
        48,
        "names that are no names",
        IA,
        "is not id: and 8|characters that are not allowed",
        (_MALFORMED,),
    ),
    Case(
        49,
        "a flipped bit, two algorithms",
        (*IA, *PD),
        rf"{_UNTRUSTED}|inside and outside differ",
        ("tpm/endorsement:flipped_signature_bit_is_denied", _MALFORMED),
    ),
    Case(
        50,
        "SHA-1 and MD5",
        PD,
        r"\[ek_signature_algorithm\]",
        (_DENIED, "tpm/endorsement:md5_link_is_denied"),
    ),
    Case(51, "RSA of another length", IA, "RSA-\\d+ is not supported", (_KEYS,)),
    Case(52, "another exponent", IA, "RSA exponent must be 65537", (_KEYS,)),
    Case(
        53,
        "an odd modulus",
        IA,
        "modulus|RSA",
        (f"{_KEYS}[even modulus|small factor|negative modulus|top bit clear]",),
    ),
    Case(
        54,
        "a point off the curve",
        IA,
        "not on P-256|canonical",
        (f"{_KEYS}[off the curve|infinity|zero]",),
    ),
    Case(
        55,
        "coordinates of another form",
        IA,
        "not in range|canonical|coordinate must be 32 bytes",
        (
            f"{_KEYS}[x not below p|short|long]",
            "tpm/endorsement:coordinates_of_a_public_area_have_one_length",
        ),
    ),
    Case(
        56,
        "points and curves of another form",
        IA,
        rf"canonical|{_MISMATCH}",
        (
            f"{_KEYS}[compressed|hybrid]",
            f"{_MALFORMED}[explicit curve]",
            "tpm/endorsement:compressed_public_key_is_refused",
        ),
    ),
    Case(
        57,
        "keys of another kind",
        IA,
        "key type",
        (
            f"{_KEYS}[P-192|SM2]",
            f"{_MALFORMED}[Ed25519|secp256k1]",
            "tpm/revocation:key_of_another_kind_is_refused",
            "tpm/endorsement:public_area_of_another_type_is_refused",
        ),
    ),
    Case(
        58,
        "unusual OAEP parameters",
        IA,
        "RSAES-OAEP parameters are not supported",
        ("tpm/endorsement:unusual_oaep_parameters_are_refused",),
    ),
    Case(
        59,
        "a key that is not listed",
        PD,
        r"\[ek_unlisted\]",
        (_POLICY, "tpm/endorsement:unlisted_key_is_denied"),
    ),
    Case(
        60,
        "one of two conditions",
        PD,
        r"\[ek_(unlisted|untrusted|no_certificate)\]",
        (_POLICY,),
    ),
    Case(
        61,
        "a revoked certificate",
        PD,
        r"ek: certificate is revoked \[ek_revoked\]",
        (
            _POLICY,
            "tpm/revocation:revoked_key_is_denied_and_others_are_not",
            "tpm/revocation:revoked_intermediate_is_denied",
        ),
    ),
    Case(
        62,
        "an unknown state of revocation",
        UN,
        r"ek: revocation state is not known \[ek_revocation_unknown\]",
        (_POLICY, "tpm/revocation:unknown_state_may_be_tried_again"),
    ),
    Case(
        63,
        "addresses of our own network",
        PD,
        _UNTRUSTED,
        ("tpm/revocation:addresses_in_a_certificate_are_not_followed",),
    ),
    Case(
        64,
        "an issuer's address that misbehaves",
        UN,
        "",
        (),
        "issuers are never fetched; case 63 shows that no connection is made",
    ),
    Case(
        65,
        "the chain of another TPM",
        PD,
        _UNTRUSTED,
        ("tpm/revocation:chain_of_another_tpm_does_not_help",),
    ),
    Case(
        66,
        "bytes around the area",
        IA,
        "ak: .*(extra bytes|public area)",
        (f"{_AREAS}[size prefix|one byte after|60 KiB after]",),
    ),
    Case(
        67,
        "an area that was cut",
        IA,
        "ends early|public area",
        ("tpm/sweeps:every_cut_of_the_ak_area_is_refused",),
    ),
    Case(
        68,
        "a key that signs anything",
        IA,
        r"ak: key is not restricted.*\[ak_attributes\]",
        (_BITS,),
    ),
    Case(
        69,
        "a key from outside",
        IA,
        r"ak: key was not made in this TPM.*\[ak_attributes\]",
        (_BITS,),
    ),
    Case(70, "a key that can leave", IA, r"ak: key can leave its TPM.*\[ak_attributes\]", (_BITS,)),
    Case(71, "other attributes", IA, r"are not those of an AK.*\[ak_attributes\]", (_BITS,)),
    Case(
        72,
        "another name algorithm",
        IA,
        r"name algorithm|\[ak_name_alg\]",
        (_AREAS, "tpm/attestation_key:sha1_name_is_refused"),
    ),
    Case(
        73,
        "a key of another kind",
        IA,
        "key type 0x|curve 0x|is not supported|RSA modulus has",
        (_AREAS,),
    ),
    Case(
        74,
        "another scheme",
        IA,
        r"\[ak_scheme\]|key derivation scheme",
        (
            _SCHEMES,
            f"{_AREAS}[KDF not NULL]",
            "tpm/attestation_key:ecdaa_scheme_is_refused",
            "tpm/attestation_key:symmetric_cipher_on_an_ak_is_refused",
        ),
    ),
    Case(
        75,
        "a malformed key",
        IA,
        "exponent must be|small factor|not on P-256|coordinate is not in range",
        (_AREAS,),
    ),
    Case(
        76,
        "a coordinate with a zero more or less",
        IA,
        "coordinate must be 32 bytes",
        (_AREAS, "tpm/attestation_key:dropped_leading_zero_is_refused"),
    ),
    Case(
        77,
        "one key in two places",
        IA,
        r"\[keys_equal\]",
        (
            "tpm/attestation_key:ak_equal_to_the_csr_key_is_refused",
            "tpm/attestation_key:ak_equal_to_the_ek_is_refused",
        ),
    ),
    Case(
        78,
        "changed creation data",
        IA,
        r"\[creation_(hash|malformed)\]",
        ("tpm/attestation_key:changed_creation_data_is_refused",),
    ),
    Case(
        79,
        "the creation of another key",
        IA,
        r"\[creation_(name|signature)\]",
        ("tpm/attestation_key:creation_of_another_key_is_refused",),
    ),
    Case(
        80,
        "another statement",
        IA,
        r"attestation type \w{4}, expected 801A \[creation_type\]",
        ("tpm/attestation_key:other_statement_in_place_of_creation_is_refused",),
    ),
    Case(
        81,
        "a signature of another family",
        IA,
        r"\[creation_scheme\]",
        (f"{_ECC}[RSA signature|HMAC|ECDAA]", f"{_RSA}[ECDSA r and s|PSS in place of PKCS#1]"),
    ),
    Case(82, "another hash", IA, r"\[creation_scheme\]", (f"{_ECC}[SHA-1|SHA-384|unknown hash]",)),
    Case(
        83,
        "a malformed signature",
        IA,
        r"\[creation_(scheme|signature)\]",
        (
            f"{_ECC}[r zero|s zero|r not below n|33 bytes|size 65535|seven bytes|extra byte]",
            f"{_RSA}[short|long]",
        ),
    ),
    Case(
        84,
        "activation as TPM 1.2 has it",
        IA,
        "ak: TPM 1.2 format is not supported",
        ("tpm/attestation_key:tpm12_activation_is_refused",),
    ),
    Case(
        85,
        "another hierarchy",
        PD,
        r"\[ak_hierarchy\]",
        ("tpm/attestation_key:other_hierarchy_is_denied",),
    ),
    Case(
        86,
        "a qualified name of nowhere",
        IA,
        r"\[ak_qualified_name\]",
        (
            "tpm/attestation_key:random_qualified_name_is_refused",
            "tpm/attestation_key:child_of_an_announced_parent_is_placed",
        ),
    ),
    Case(
        87,
        "another node's attestation key",
        PD,
        r"ak: key belongs to another node \[ak_reused\]",
        ("server/attestation:a_key_of_another_node",),
    ),
)
