from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.errors import ConfigError, ErrorKind, InvalidInputError, NotReadyError
from spire_hw.posture.policy import NodeGroup
from spire_hw.posture.policyfile import (
    digest,
    load_policy,
    pack,
    parse_policy,
    stated_version,
)
from spire_hw.posture.verdict import Action
from tests.unit.spire_hw.posture.samples import policy

ONE, TWO = "ab" * 32, "cd" * 32
PIN = f'pcrs {{ sha256 {{ "4" = ["{ONE}"] }} }}'


def faults(text: str, files: dict[str, bytes] | None = None) -> list[tuple[int, str]]:
    held = files or {}

    def read(name: str, /) -> bytes:
        if name not in held:
            raise NotReadyError(f"no file {name}")
        return held[name]

    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "p.hcl", read=read)
    return [(fault.line, fault.message) for fault in caught.value.faults]


def test_least_policy_denies_what_it_does_not_name() -> None:
    made = parse_policy(f'policy "web" {{ {PIN} }}')
    assert (made.name, made.version, made.nodes) == ("web", 1, ())
    assert made.pcrs == {("sha256", 4): frozenset({bytes.fromhex(ONE)})}
    assert made.tpm.key_in_tpm
    assert made.boot is None
    assert made.ima is None
    assert made.request().pcrs == (("sha256", (4,)),)
    assert not made.request().boot_log


def test_every_key_arrives() -> None:
    text = f"""
policy "all.1" {{
  version = 7
  description = "everything"
  nodes {{ selectors = ["tpm:manufacturer:id:4E544300", "model:NPCT75x"] }}
  nodes {{ ek_hashes = ["{ONE}", "@list"] }}
  tpm {{
    roots = ["{ONE}"]
    manufacturers = ["id:4E544300"]
    models = ["NPCT75x"]
    key_in_tpm = false
    counters = true
    firmware_floor "id:4E544300" {{ version = "7.2.3.1" }}
    firmware_floor "*" {{ version = "0x0007000200030001" }}
  }}
  bank = "sha384"
  pcrs {{ sha256 {{ "0" = ["{ONE}", "{TWO}"] }} }}
  pcr_set "one" {{ sha256 {{ "4" = ["{ONE}"] "7" = ["@list"] }} }}
  quote {{ sha256 = [5] }}
  boot {{
    secure_boot = "any"
    allow_debug_mode = true
    allow_dma_protection_off = true
    allow_empty_secure_boot = true
    allow_early_authority = true
    variables {{ PK = ["{ONE}"] KEK = ["{TWO}"] db = ["{ONE}"] dbx = ["{TWO}"] }}
    db = ["{ONE}"]
    dbx_floor = ["{TWO}"]
    sbat_floor = 2023012900
    authorities = ["{ONE}"]
    images = ["{ONE[:32] * 3}"]
    revoked_images = ["{ONE[:32] * 3}"]
    option_roms = ["{ONE[:32] * 3}"]
    commands = ["linux *"]
    files = ["{ONE[:32] * 3}"]
    uki = ["{ONE[:32] * 3}"]
    mok = "present"
    mok_digests = ["{ONE[:32] * 3}"]
    firmware_versions = ["1.2"]
    firmware_floor = "1.1"
    workarounds = ["exit_boot_services"]
  }}
  ima {{
    allow = ["{ONE}  /usr/bin/a b", "{TWO}", "@list"]
    exclude = ["/tmp/", "/a b"]
    algorithms = ["sha256"]
    violations = 3
    allow_padded_sha1 = true
  }}
  drift {{ pcr_mismatch = "ban" dbx_old = "accept" }}
}}
"""
    made = parse_policy(text, read=lambda _: f"{TWO}  /x\n".encode())
    one, two, wide = bytes.fromhex(ONE), bytes.fromhex(TWO), bytes.fromhex(ONE[:32] * 3)
    assert made.reference == "all.1@7"
    assert made.nodes == (
        NodeGroup(frozenset({"manufacturer:id:4E544300", "model:NPCT75x"})),
        NodeGroup(ek_hashes=frozenset({ONE, TWO})),
    )
    assert made.tpm.roots == {ONE}
    assert made.tpm.firmware_floors == {"id:4E544300": 0x0007000200030001, "*": 0x0007000200030001}
    assert (made.tpm.key_in_tpm, made.tpm.counters) == (False, True)
    assert made.pcr_sets[0].values == {
        ("sha256", 4): frozenset({one}),
        ("sha256", 7): frozenset({two}),
    }
    boot = made.boot
    assert boot is not None
    assert boot.tolerate == {"empty_secure_boot", "early_authority"}
    assert boot.variables == {
        "PK": frozenset({ONE}),
        "KEK": frozenset({TWO}),
        "db": frozenset({ONE}),
        "dbx": frozenset({TWO}),
    }
    assert boot.images == boot.revoked_images == boot.option_roms == boot.files == {wide}
    assert boot.uki == {wide.hex()}
    assert (boot.debug_mode, boot.dma_protection, boot.secure_boot) == (True, False, "any")
    ima = made.ima
    assert ima is not None
    assert ima.files == {
        b"/usr/bin/a b": (one,),
        b"/usr/bin/a_b": (one,),
        b"/x": (two,),
    }
    assert ima.anywhere == {two}
    assert ima.exclude.texts == (b"/tmp/", b"/a b", b"/a_b")
    assert made.drift == {"pcr_mismatch": Action.BAN, "dbx_old": Action.ACCEPT}
    request = made.request(reset_count=3)
    assert request.pcrs == (
        ("sha256", (0, 4, 5, 7)),
        ("sha384", (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14)),
    )
    assert (request.boot_log, request.counters, request.reset_count) == (True, True, None)
    assert request.tolerate == {"empty_secure_boot", "early_authority", "padded_sha1"}
    assert request.ima is not None
    assert (request.ima.count, request.ima.pcr) == (0, bytes(48))


def test_all_faults_are_told_at_once_with_their_lines() -> None:
    text = f"""policy "Web" {{
  color = 1
  nodes {{ selectors = ["manufaturer:x"] }}
  nodes {{ }}
  pcrs {{ sha256 {{
    "4" = ["{ONE}ab", "zz"]
    "10" = ["{ONE}"]
    "16" = []
    "24" = []
  }} }}
  boot {{
    images = ["@missing", "@bad"]
    secure_boot = "maybe"
  }}
  ima {{ keyring = ["key.pem", "@bad"] }}
  drift {{
    log_missing = "accept"
    pcr_mismach = "ban"
  }}
}}
file "x" {{ }}
file "y" {{ base64 = "?" }}
"""
    found = faults(text, {"bad": b"what\n" + ONE.encode() + b"\nwhat"})
    words = [
        (1, "a policy's name"),
        (2, 'unknown key "color"'),
        (3, '"manufaturer:x" begins with none of'),
        (4, "nodes { } names no nodes"),
        (6, "66 digits, expected 64"),
        (6, '"zz": expected a digest'),
        (7, "use ima { }"),
        (8, '"16": names nothing'),
        (8, "can be reset"),
        (9, 'unknown key "24"'),
        (12, "no file missing"),
        (12, "bad:1: expected a digest"),
        (12, "bad:3: expected a digest"),
        (13, "must be one of on, off, any"),
        (15, 'name a PEM file as "@NAME"'),
        (15, "bad holds no PEM"),
        (17, "cannot be accepted"),
        (18, 'unknown key "pcr_mismach"; did you mean "pcr_mismatch"?'),
        (21, "needs either content or base64"),
        (22, '"base64" is malformed'),
    ]
    assert [line for line, _ in found] == [line for line, _ in words], found
    for (_, message), (_, part) in zip(found, words, strict=True):
        assert part in message


@pytest.mark.parametrize(
    ("inside", "part"),
    [
        ("", "asks nothing of the machine's state"),
        ("tpm { counters = true }", "asks nothing of the machine's state"),
        ("quote { sha256 = [1] }", "asks nothing of the machine's state"),
        ("pcrs { }", "names no PCR"),
        (f'pcrs {{ sha1 {{ "4" = ["{ONE[:40]}"] }} }}', "SHA-1 can be forged"),
        (f'bank = "sha1"\n{PIN}', "SHA-1 can be forged"),
        (f"version = 0\n{PIN}", "must be at least 1"),
        ("ima { }", "allows no file"),
        ("ima { allow = [] }", "names nothing"),
        ("ima { keyring = [] }", "names nothing"),
        (f'ima {{ allow = ["{ONE}"] exclude = [""] }}', "a pattern is empty"),
        (f'ima {{ allow = ["{ONE}"] algorithms = [] }}', "names nothing"),
        (f'ima {{ allow = ["{ONE}"] algorithms = ["sha512"] }}', "expected 128"),
        ('tpm { firmware_floor "*" { version = "1.2.3.4.5" } }', "expected a TPM firmware"),
        ('tpm { firmware_floor "*" { version = "70000.1" } }', "expected a TPM firmware"),
        ('nodes { selectors = ["pub_hash:"] }', "begins with none of"),
        ('boot { images = ["@missing"] }', "is not in the text"),
    ],
)
def test_what_a_policy_must_not_say(inside: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(f'policy "web" {{\n{inside}\n}}')
    assert part in caught.value.message
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "inside",
    [
        "boot { }",
        f'pcrs {{ sha256 {{ "7" = ["{ONE}"] }} }}',
        f'pcr_set "a" {{ sha256 {{ "7" = ["{ONE}"] "14" = ["{ONE}"] }} }}',
        f'boot {{ dbx_floor = ["{ONE}"] mok = "absent" }}',
        f'boot {{ secure_boot = "any" authorities = ["{ONE}"] }}',
    ],
)
def test_pcr_7_alone_does_not_identify_what_was_booted(inside: str) -> None:
    text = f'policy "web" {{\n{inside}\n%s\n}}'
    with pytest.raises(ConfigError, match="PCR 7 alone does not identify what was") as caught:
        parse_policy(text % "")
    assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
    assert parse_policy(text % "allow_pcr7_only = true").allow_pcr7_only
    assert parse_policy(text % PIN.replace("pcrs", 'pcr_set "b"')).covered_pcrs() >= {4, 7}


def test_switches_for_what_is_refused() -> None:
    assert not policy("allow_any_state = true").needs_quote
    old = policy(f'allow_sha1 = true\nbank = "sha1"\nboot {{ images = ["{ONE[:40]}"] }}')
    assert old.request().tolerate == {"sha1_log"}
    assert old.request().pcrs == (("sha1", tuple(range(8))),)


@pytest.mark.parametrize(
    "text", ["", "policy {}", 'policy "a" {} policy "b" {}', "a = 1", "{", "[]"]
)
def test_a_text_holds_one_policy(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_policy(text)


def test_files_become_part_of_the_text() -> None:
    raw = f"{ONE}  /\xff\n".encode("latin-1")
    held = {"a b": f"{ONE}  /a\n".encode(), "raw": raw, "tag": b"# no line end: " + ONE.encode()}
    text = 'policy "web" {\n  ima { allow = ["@a b", "@raw", "@tag"] }\n}  # end'
    outside, packed = load_policy(text, read=lambda name: held[name])
    assert packed.startswith(text + "\n")
    assert f"{ONE}  /a" in packed
    assert packed == pack(text, read=lambda name: held[name])
    assert parse_policy(packed) == outside
    assert load_policy(packed) == (outside, packed)
    assert outside.sha256 == digest(packed) == hashlib.sha256(packed.encode()).hexdigest()
    held["raw"] = f"{TWO}  /\xff\n".encode("latin-1")
    assert parse_policy(text, read=lambda name: held[name]).sha256 != outside.sha256


def test_a_file_in_the_text_is_never_asked_for_outside() -> None:
    coded = base64.b64encode(ONE.encode()).decode()
    text = f'policy "a" {{ ima {{ allow = ["@x"] }} }}\nfile "x" {{ base64 = "{coded}" }}'

    def never(name: str, /) -> bytes:
        raise AssertionError(name)

    made = parse_policy(text, read=never)
    assert made.ima is not None
    assert made.ima.anywhere == {bytes.fromhex(ONE)}


def test_json_is_read_and_cannot_take_in_files() -> None:
    text = '{"policy": {"web": {"pcrs": {"sha256": {"4": ["%s"]}}}}}'
    assert parse_policy(text % ONE).pcrs == policy(PIN).pcrs
    with pytest.raises(ConfigError, match="JSON cannot take in"):
        parse_policy(text % "@x", read=lambda _: ONE.encode())


def test_versions_in_the_text_and_outside_must_agree() -> None:
    plain, stated = f'policy "a" {{ {PIN} }}', f'policy "a" {{ version = 3 {PIN} }}'
    assert (stated_version(plain), stated_version(stated)) == (0, 3)
    assert parse_policy(plain, version=5).version == 5
    assert parse_policy(stated, version=3).version == 3
    with pytest.raises(ConfigError, match="is 3 in the text, but it is stored as 4"):
        parse_policy(stated, version=4)


def test_what_cannot_be_stored_is_refused() -> None:
    line = f"{ONE}  /{'x' * 4000}\n".encode()
    text = 'policy "web" { ima { allow = ["@big"] } }'
    assert parse_policy(text, read=lambda _: line * 1100).ima is not None
    with pytest.raises(InvalidInputError, match="put it into policy_dir"):
        pack(text, read=lambda _: line * 1100)


def test_keyrings_take_keys_and_refuse_weak_ones() -> None:
    def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
        return key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    both = pem(ec.generate_private_key(ec.SECP256R1())) + pem(
        rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    made = policy('ima { keyring = ["@k"] }', files={"k": both})
    assert made.ima is not None
    assert [len(key.key_id) for key in made.ima.keyring] == [4, 4]
    weak = pem(rsa.generate_private_key(public_exponent=65537, key_size=1024))  # noqa: S505
    for content, part in (
        (weak, "1024 bits"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificate or"),
        (b"-----BEGIN ", "no certificate or"),
        (b"\xff\xfe", "no PEM"),
    ):
        with pytest.raises(ConfigError, match=part):
            policy('ima { keyring = ["@k"] }', files={"k": content})
