"""The environment and the first line between host and plugin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spire_hw.errors import EncodingError, InvalidInputError, NotReadyError
from spire_hw.goplugin.handshake import (
    MAX_LINE_BYTES,
    Address,
    build_environment,
    check_address,
    encode_line,
    parse_line,
    read_environment,
)
from spire_hw.plugin.info import PluginKind

KM = PluginKind.KEY_MANAGER


def test_the_environment_holds_the_cookie_and_nothing_of_a_host_above_us() -> None:
    inherited = {
        "PATH": "/bin",
        "PLUGIN_CLIENT_CERT": "x",
        "PLUGIN_UNIX_SOCKET_DIR": "/elsewhere",
        "PLUGIN_SOMETHING_NEW": "x",
        "NodeAttestor": "NodeAttestor",
        "KeyManager": "wrong",
    }
    assert build_environment(KM, inherited, socket_dir="/run/x") == {
        "PATH": "/bin",
        "KeyManager": "KeyManager",
        "PLUGIN_PROTOCOL_VERSIONS": "1",
        "PLUGIN_MIN_PORT": "10000",
        "PLUGIN_MAX_PORT": "25000",
        "PLUGIN_UNIX_SOCKET_DIR": "/run/x",
    }
    assert "PLUGIN_UNIX_SOCKET_DIR" not in build_environment(KM, inherited)


@pytest.mark.parametrize("kind", PluginKind)
def test_a_guest_reads_what_a_host_built(kind: PluginKind) -> None:
    found = read_environment(build_environment(kind, {}, socket_dir="/run/x"), PluginKind)
    assert (found.kind, found.socket_dir, found.multiplex_asked) == (kind, "/run/x", False)


@pytest.mark.parametrize("environ", [{}, {"KeyManager": "1"}, {"NodeAttestor": "NodeAttestor"}])
def test_a_plugin_run_by_hand_says_where_it_belongs(environ: dict[str, str]) -> None:
    with pytest.raises(NotReadyError, match=r'plugins \{ KeyManager "name" \{ plugin_cmd'):
        read_environment(environ, [KM])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"NodeAttestor": "NodeAttestor"}, "several plugin types at once"),
        ({"PLUGIN_PROTOCOL_VERSIONS": "2,3"}, "versions '2,3', this plugin speaks 1"),
        ({"PLUGIN_PROTOCOL_VERSIONS": "11"}, "this plugin speaks 1"),
        ({"PLUGIN_CLIENT_CERT": "-----BEGIN"}, "turn AutoMTLS off"),
        ({"PLUGIN_UNIX_SOCKET_GROUP": "spire"}, "the same user"),
        ({"PLUGIN_UNIX_SOCKET_DIR": "tmp"}, "not an absolute path"),
    ],
)
def test_a_guest_refuses_what_it_does_not_offer(more: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        read_environment(build_environment(KM, {}) | more, PluginKind)


def test_a_host_without_versions_is_taken_as_an_old_one_and_multiplexing_is_answered() -> None:
    found = read_environment({KM.value: KM.value, "PLUGIN_MULTIPLEX_GRPC": "true"}, [KM])
    assert found.multiplex_asked
    line = encode_line(Address("unix", "/run/p"), multiplex_asked=found.multiplex_asked)
    assert line == b"1|1|unix|/run/p|grpc||false\n"
    assert parse_line(line) == Address("unix", "/run/p")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"1|1|unix|/run/plugin123|grpc|\n", Address("unix", "/run/plugin123")),
        (b"1|1|unix|/run/plugin123|grpc", Address("unix", "/run/plugin123")),
        (b" 1|1|unix|/run/plugin123|grpc\r\n", Address("unix", "/run/plugin123")),
        (b"1|1|tcp|127.0.0.1:10000|grpc||false|more", Address("tcp", "127.0.0.1:10000")),
        (b"1|1|tcp|[::1]:10000|grpc", Address("tcp", "[::1]:10000")),
    ],
)
def test_lines_of_go_plugins_are_read(line: bytes, expected: Address) -> None:
    assert parse_line(line) == expected


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "is it a plugin at all"),
        (b"Hello, I am a banner\n", "'Hello, I am a banner' is not"),
        (b"\x1b[2J|\x1b]0;owned\x07\n", r"\\x1b"),
        (b"\xff\xfe|1|unix|/x|grpc", "is not text"),
        (b"2|1|unix|/run/p|grpc", "core protocol version '2'"),
        (b"01|1|unix|/run/p|grpc", "core protocol version"),
        (b"1|2|unix|/run/p|grpc", "plugin protocol version '2'"),
        (b"1|1|unix|/run/p", "protocol 'netrpc'"),
        (b"1|1|unix|/run/p|netrpc", "protocol 'netrpc'"),
        (b"1|1|unix|/run/p|grpc|" + b"A" * 300, "wants TLS"),
        (b"1|1|unix|/run/p|grpc||true", "multiplex"),
        (b"1|1|unix|tmp/p|grpc", "not absolute"),
        (b"1|1|unix||grpc", "not absolute"),
        (b"1|1|unix|/run/a\x00b|grpc", "characters that cannot"),
        (b"1|1|unix|/run/a\nb|grpc", "characters that cannot"),
        (b"1|1|unix|/" + b"p" * 107 + b"|grpc", "over 107 bytes"),
        (b"1|1|tcp|10.0.0.1:80|grpc", "loopback"),
        (b"1|1|tcp|localhost:80|grpc", "loopback"),
        (b"1|1|tcp|127.0.0.1|grpc", "loopback"),
        (b"1|1|tcp|127.0.0.1:0|grpc", "port '0'"),
        (b"1|1|tcp|127.0.0.1:65536|grpc", "port '65536'"),
        (b"1|1|tcp|127.0.0.1:1e3|grpc", "port '1e3'"),
        (b"1|1|udp|127.0.0.1:1|grpc", "network 'udp'"),
        (b"1|1|unix|/" + b"p" * MAX_LINE_BYTES, "over 4096 bytes"),
    ],
)
def test_any_other_first_line_is_refused_with_the_reason(line: bytes, words: str) -> None:
    with pytest.raises(EncodingError, match=words) as caught:
        parse_line(line)
    assert caught.value.message.isprintable()


@given(
    st.binary(max_size=300) | st.from_regex(rb"1\|1\|(unix|tcp)\|[^\n]*\|grpc.*", fullmatch=True)
)
def test_reading_a_line_is_total(line: bytes) -> None:
    try:
        found = parse_line(line)
    except EncodingError as e:
        found = Address("unix", "/run/none")
        shown = e.message
    else:
        shown = ""
    assert shown.isprintable()
    assert parse_line(encode_line(found)) == found


@pytest.mark.parametrize("path", ["relative", "/with|bar", "/with\nnewline", "/" + "p" * 107])
def test_a_path_that_does_not_fit_the_line_is_not_written(path: str) -> None:
    with pytest.raises(InvalidInputError):
        encode_line(Address("unix", path))


def test_addresses_over_the_broker_are_checked_alike() -> None:
    assert check_address("unix", "/run/host") == Address("unix", "/run/host")
    with pytest.raises(EncodingError):
        check_address("tcp", "192.0.2.1:80")
