"""How a plugin's process and its host find each other: the environment and the first line (pure).

The host starts the plugin with a few variables set; the plugin listens on a socket and tells where
in one line on its standard output. Both ends are here. What comes from the other end is hostile.

Plaintext on a unix socket, as SPIRE has it: TLS between host and plugin (AutoMTLS) and connections
multiplexed over one socket are neither offered nor accepted.

Source: go-plugin 1.8 as SPIRE 1.15 sets it up.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final

from spire_hw.errors import EncodingError, InvalidInputError, NotReadyError
from spire_hw.plugin.info import PluginKind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

CORE_VERSION: Final = "1"
APP_VERSION: Final = "1"
PROTOCOL: Final = "grpc"

# What is read of a first line before the plugin is given up.
MAX_LINE_BYTES: Final = 4096
# sun_path of unix(7) without its final zero.
MAX_SOCKET_PATH_BYTES: Final = 107

_PREFIX: Final = "PLUGIN_"
_VERSIONS: Final = "PLUGIN_PROTOCOL_VERSIONS"
_MIN_PORT: Final = "PLUGIN_MIN_PORT"
_MAX_PORT: Final = "PLUGIN_MAX_PORT"
_CLIENT_CERT: Final = "PLUGIN_CLIENT_CERT"
_SOCKET_DIR: Final = "PLUGIN_UNIX_SOCKET_DIR"
_SOCKET_GROUP: Final = "PLUGIN_UNIX_SOCKET_GROUP"
_MULTIPLEX: Final = "PLUGIN_MULTIPLEX_GRPC"

_COOKIES: Final = frozenset(kind.value for kind in PluginKind)
_LEAST_FIELDS: Final = 4
_PROTOCOL_FIELD, _CERTIFICATE_FIELD, _MULTIPLEX_FIELD = 4, 5, 6
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_MAX_PORT_NUMBER: Final = 65535
_SHOWN_CHARS: Final = 160


@dataclass(frozen=True, slots=True)
class Address:
    """Where a plugin or a host listens.

    Attributes:
        network: `unix` or `tcp`.
        address: an absolute path, or an IP address of this machine's loopback and a port.
    """

    network: str
    address: str


def build_environment(
    kind: PluginKind, inherited: Mapping[str, str], *, socket_dir: str = ""
) -> dict[str, str]:
    """Return the environment a plugin is started with.

    Args:
        kind: what it is started as; its name is both key and value of the cookie.
        inherited: the host's own environment. What a host above us said to us in it (`PLUGIN_*`,
            cookies) is left out.
        socket_dir: where the plugin shall put its sockets; "" leaves it to the plugin.
    """
    made = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(_PREFIX) and name not in _COOKIES
    }
    made |= {
        kind.value: kind.value,
        _VERSIONS: APP_VERSION,
        # Only plugins on systems without unix sockets look at these.
        _MIN_PORT: "10000",
        _MAX_PORT: "25000",
    }
    if socket_dir:
        made[_SOCKET_DIR] = socket_dir
    return made


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a guest learns from its environment.

    Attributes:
        kind: what the host wants it to be.
        socket_dir: where its sockets go; "" means the temporary directory.
        multiplex_asked: the host asks whether we multiplex and wants an answer in the line.
    """

    kind: PluginKind
    socket_dir: str = ""
    multiplex_asked: bool = False


def read_environment(environ: Mapping[str, str], kinds: Collection[PluginKind]) -> Invitation:
    """Return what a host asked for when it started this process.

    Args:
        environ: this process's environment.
        kinds: what this program can be.

    Raises:
        NotReadyError: nobody started it as a plugin of these kinds; the text is for whoever ran
            it by hand.
        InvalidInputError: the host wants something that is not offered here.
    """
    asked = [kind for kind in kinds if environ.get(kind.value) == kind.value]
    if not asked:
        names = " or ".join(f'{kind.value} "name" {{ plugin_cmd = ... }}' for kind in kinds)
        raise NotReadyError(
            "this program is a plugin, to be started by a SPIFFE server or agent and not by hand; "
            f"put it into that program's configuration file: plugins {{ {names} }}"
        )
    if len(asked) > 1:
        names = ", ".join(kind.value for kind in asked)
        raise InvalidInputError(f"the host asks for several plugin types at once: {names}")
    versions = environ.get(_VERSIONS, APP_VERSION).split(",")
    if APP_VERSION not in versions:
        raise InvalidInputError(
            f"the host speaks plugin protocol versions {_shown(','.join(versions))}, "
            f"this plugin speaks {APP_VERSION}"
        )
    if environ.get(_CLIENT_CERT):
        raise InvalidInputError(
            f"the host asks for TLS ({_CLIENT_CERT}), which SPIRE does not use and this plugin "
            "does not offer; turn AutoMTLS off in the host"
        )
    if environ.get(_SOCKET_GROUP):
        raise InvalidInputError(
            f"{_SOCKET_GROUP} is set, but this plugin lets nobody in but its host's user; "
            "run host and plugin as the same user and do not set it"
        )
    socket_dir = environ.get(_SOCKET_DIR, "")
    if socket_dir and not PurePosixPath(socket_dir).is_absolute():
        raise InvalidInputError(f"{_SOCKET_DIR} is {_shown(socket_dir)}, not an absolute path")
    return Invitation(asked[0], socket_dir, bool(environ.get(_MULTIPLEX)))


def encode_line(address: Address, *, multiplex_asked: bool = False) -> bytes:
    """Return the line that tells the host where we listen, with its newline.

    Raises:
        InvalidInputError: an address that cannot stand in it.
    """
    reason = _address_fault(address)
    if reason is not None:
        raise InvalidInputError(f"no plugin can listen there: {reason}")
    fields = [CORE_VERSION, APP_VERSION, address.network, address.address, PROTOCOL, ""]
    if multiplex_asked:
        fields.append("false")
    return "|".join(fields).encode() + b"\n"


def parse_line(line: bytes) -> Address:
    """Return where the plugin listens.

    Args:
        line: what came first on its standard output, with or without the newline.

    Raises:
        EncodingError: not such a line, or one that asks for what is not offered.
    """
    if len(line) > MAX_LINE_BYTES:
        raise _fault(f"over {MAX_LINE_BYTES} bytes")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as e:
        raise _fault(f"{_shown(line.decode('utf-8', 'replace'))} is not text", e.start) from e
    fields = [field.strip() for field in text.split("|")]
    if len(fields) < _LEAST_FIELDS:
        raise _fault(
            f"{_shown(text)} is not `1|1|unix|<path>|grpc`; is it a plugin at all, and does "
            "nothing print before the plugin does?"
        )
    core, app, network, where = fields[:_LEAST_FIELDS]
    if core != CORE_VERSION:
        raise _fault(f"core protocol version {_shown(core)}, expected {CORE_VERSION}")
    if app != APP_VERSION:
        raise _fault(f"plugin protocol version {_shown(app)}, expected {APP_VERSION}")
    protocol = fields[_PROTOCOL_FIELD] if len(fields) > _PROTOCOL_FIELD else "netrpc"
    if protocol != PROTOCOL:
        raise _fault(f"protocol {_shown(protocol)}, expected {PROTOCOL}")
    if len(fields) > _CERTIFICATE_FIELD and fields[_CERTIFICATE_FIELD]:
        raise _fault("the plugin wants TLS (AutoMTLS), which it was not asked for")
    if len(fields) > _MULTIPLEX_FIELD and fields[_MULTIPLEX_FIELD].lower() == "true":
        raise _fault("the plugin wants to multiplex connections, which it was not asked for")
    address = Address(network, where)
    reason = _address_fault(address)
    if reason is not None:
        raise _fault(reason)
    return address


def check_address(network: str, address: str) -> Address:
    """Return an address that came over the broker, checked as those of first lines are.

    Raises:
        EncodingError: not an address of this machine.
    """
    made = Address(network, address)
    reason = _address_fault(made)
    if reason is not None:
        raise EncodingError("broker", reason)
    return made


def _address_fault(address: Address) -> str | None:
    where = address.address
    if not where.isprintable() or "|" in where:
        return f"address {_shown(where)} has characters that cannot stand there"
    match address.network:
        case "unix":
            return _path_fault(where)
        case "tcp":
            return _port_fault(where)
        case _:
            return f"network {_shown(address.network)}, expected unix or tcp"


def _path_fault(path: str) -> str | None:
    if not PurePosixPath(path).is_absolute():
        return f"socket path {_shown(path)} is not absolute"
    if len(path.encode()) > MAX_SOCKET_PATH_BYTES:
        return f"socket path is over {MAX_SOCKET_PATH_BYTES} bytes"
    return None


def _port_fault(where: str) -> str | None:
    host, _, port = where.rpartition(":")
    if not _is_loopback(host):
        return f"{_shown(where)} is not a loopback address and port"
    if not _PORT.fullmatch(port) or int(port) > _MAX_PORT_NUMBER:
        return f"port {_shown(port)} is not a number from 1 to {_MAX_PORT_NUMBER}"
    return None


def _is_loopback(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shown(text: str) -> str:
    """Return what the other end said as it may be shown: ASCII, quoted, short."""
    return ascii(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _fault(reason: str, offset: int | None = None) -> EncodingError:
    return EncodingError("plugin's first line", reason, offset)
