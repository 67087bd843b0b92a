from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from spire_hw.config.hcl import parse
from spire_hw.errors import ConfigError
from spire_hw.key import KeyType
from spire_hw_agent.config import (
    AgentSettings,
    RebootstrapMode,
    build_settings,
    load_settings,
)

SAMPLE = Path(__file__).parents[3] / "agent" / "agent.conf"
PLUGINS = 'plugins { KeyManager "disk" {} NodeAttestor "join_token" {} WorkloadAttestor "unix" {} }'
BASE = 'trust_domain = "example.org" server_address = "s" server_port = "8081"'


def settings(keys: str = "insecure_bootstrap = true", rest: str = "") -> AgentSettings:
    return build_settings(parse(f"agent {{\n{BASE}\n{keys}\n}}\n{PLUGINS}\n{rest}", "a.conf"))


def refused(keys: str, rest: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        settings(keys, rest)
    return caught.value.message


def test_the_sample_is_good() -> None:
    made = load_settings(SAMPLE)
    assert [p.name for p in made.plugins] == ["tpm", "tpm", "unix"]
    assert made.trust_bundle_path == Path("/etc/spire-hw/bootstrap.pem")


def test_defaults_are_those_of_upstream() -> None:
    made = settings()
    assert (made.server_port, made.data_dir) == (8081, Path())
    assert made.socket_path == Path("/tmp/spire-agent/public/api.sock")  # noqa: S108
    assert made.workload_x509_svid_key_type is KeyType.EC_P256
    assert made.x509_svid_cache_max_size == made.jwt_svid_cache_max_size == 1000
    assert made.sync_interval == timedelta(seconds=5)
    assert made.insecure_bootstrap


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("", "needs a way to trust the server"),
        ('insecure_bootstrap = true trust_bundle_path = "x"', "only one of"),
        ('trust_bundle_url = "http://x"', "must start with https://"),
        (
            'trust_bundle_url = "https://x" trust_bundle_unix_socket = "/s"',
            "must start with http://",
        ),
        ('trust_bundle_path = "x" trust_bundle_unix_socket = "/s"', "needs trust_bundle_url"),
        ('insecure_bootstrap = true trust_bundle_format = "der"', "must be one of pem, spiffe"),
    ],
)
def test_one_source_to_bootstrap_from(keys: str, words: str) -> None:
    assert words in refused(keys)


def test_a_bundle_over_a_unix_socket() -> None:
    made = settings('trust_bundle_url = "http://x/b" trust_bundle_unix_socket = "/s"')
    assert made.trust_bundle_unix_socket == "/s"


def test_the_join_token_from_key_or_file_and_never_in_a_repr(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("hush-hush\n")
    made = settings(f'insecure_bootstrap = true join_token_file = "{file}"')
    assert made.join_token == "hush-hush"  # noqa: S105 - made up
    assert "hush-hush" not in repr(made)
    both = f'insecure_bootstrap = true join_token_file = "{file}" join_token = "x"'
    assert "not both" in refused(both)
    file.write_text("")
    assert "does not hold a token" in refused(
        f'insecure_bootstrap = true join_token_file = "{file}"'
    )
    assert "cannot be read" in refused('insecure_bootstrap = true join_token_file = "/nowhere"')


def test_the_workload_api_can_be_switched_off() -> None:
    assert settings("insecure_bootstrap = true disable_workload_api = true").socket_path is None


@pytest.mark.parametrize(
    "keys",
    [
        'admin_socket_path = "/x/admin.sock"',
        'authorized_delegates = ["spiffe://example.org/x"]',
        'sds { default_svid_name = "x" }',
        "profiling_enabled = true",
        "experimental { broker { x = 1 } }",
    ],
)
def test_keys_not_supported_yet_are_refused_by_name(keys: str) -> None:
    message = refused(f"insecure_bootstrap = true\n{keys}")
    assert "is not supported by this release yet" in message


def test_health_listener() -> None:
    on = settings(rest='health_checks { listener_enabled = true bind_port = "8088" }')
    assert on.health is not None
    assert (on.health.bind_port, on.health.live_path) == (8088, "/live")
    assert settings(rest="health_checks { listener_enabled = false }").health is None


def test_rebootstrap_needs_an_attestor_that_can_attest_again() -> None:
    assert settings().rebootstrap_mode is RebootstrapMode.NEVER
    assert "join_token attests only once" in refused(
        'insecure_bootstrap = true\nrebootstrap_mode = "always"'
    )
    auto = settings('insecure_bootstrap = true\nrebootstrap_mode = "auto"')
    assert auto.rebootstrap_mode is RebootstrapMode.NEVER
    assert any("no effect" in notice for notice in auto.notices)
    assert "must be one of" in refused('insecure_bootstrap = true\nrebootstrap_mode = "x"')
    plugins = PLUGINS.replace("join_token", "tpm")
    keys = 'insecure_bootstrap = true rebootstrap_mode = "always" rebootstrap_delay = "3m"'
    made = build_settings(parse(f"agent {{ {BASE}\n{keys} }}\n{plugins}", "a.conf"))
    assert made.rebootstrap_mode is RebootstrapMode.ALWAYS
    assert made.rebootstrap_delay == timedelta(minutes=3)


def test_all_faults_come_at_once() -> None:
    text = """agent {
  trust_domain = "UPPER"
  server_port = 0
  workload_x509_svid_key_type = "rsa-4096"
  availability_target = "1h"
  socket_path = ""
  sds { }
  log_levl = "x"
}
plugins { KeyManager "a" {} UpstreamAuthority "disk" {} }
"""
    with pytest.raises(ConfigError) as caught:
        build_settings(parse(text, "a.conf"))
    message = caught.value.message
    for words in (
        "trust_domain",
        '"server_port": must be at least 1',
        "rsa-4096 is not for workloads",
        "1h0m0s is below the least, 24h0m0s",
        '"socket_path": must not be empty',
        'did you mean "log_level"',
        '"server_address": is required',
        "exactly 1 NodeAttestor",
        "at least 1 WorkloadAttestor",
        "do not belong here",
    ):
        assert words in message, words


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.conf"
    file.write_text(f"agent {{ {BASE} insecure_bootstrap = true }}\n{PLUGINS}")
    made = load_settings(file, overrides={"server_port": "9", "join_token": "t"})
    assert (made.server_port, made.join_token) == (9, "t")
