"""`install`: one launcher for each of our plugins, with the blocks that configure them.

Hosts check the SHA-256 of the file that `plugin_cmd` names. A launcher is that file: a few lines
that always come out the same for the same interpreter. The checksum covers them and the path of the
interpreter, not the interpreter and not the installed library.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from spire_hw.cli.flags import GoCommand
from spire_hw.cli.output import Printer, complain, output_flags
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.files import replace_file
from spire_hw.hardening import check_directory
from spire_hw_plugins.serve import available, sides_of

if TYPE_CHECKING:
    from spire_hw.plugin.info import PluginKind

# BINPRM_BUF_SIZE of Linux: what the kernel reads of a first line.
_MAX_FIRST_LINE: Final = 255
_MODE: Final = 0o755

_LAUNCHER: Final = """\
#!{interpreter} -I
# spire-hw: {kind} "{name}" as an external plugin
import sys

from spire_hw_plugins.cli.main import main

sys.argv[1:1] = ["serve", "{kind}", "{name}"]
main()
"""

_BLOCK: Final = """\
# for the {sides}
{kind} "{name}" {{
    plugin_cmd = "{path}"
    plugin_checksum = "{checksum}"
    plugin_data {{
    }}
}}
"""


def launcher(kind: PluginKind, name: str, interpreter: str = sys.executable) -> bytes:
    """Return the content of a plugin's launcher.

    Raises:
        InvalidInputError: the kernel could not start it.
    """
    first = f"#!{interpreter} -I"
    if len(os.fsencode(first)) > _MAX_FIRST_LINE or any(c.isspace() for c in interpreter):
        raise InvalidInputError(
            f"the interpreter's path {interpreter} is too long or has a space in it; install "
            "spire-hw at a shorter path"
        )
    return _LAUNCHER.format(interpreter=interpreter, kind=kind.value, name=name).encode()


@click.command(
    "install",
    cls=GoCommand,
    help="Write a launcher for each of our plugins into a directory and print their blocks.",
    examples="spire-hw-plugin install /opt/spire-hw/plugins > plugins.hcl",
)
@output_flags
@click.argument("directory")
def install(directory: str, output: str, field: str) -> None:
    """Write the launchers."""
    folder = Path(directory).absolute()
    try:
        folder.mkdir(mode=_MODE, parents=True, exist_ok=True)
        rows = [_install(folder, kind, name) for kind, name in available()]
        remark = check_directory(folder)
    except OSError as e:
        raise UnavailableError(f"{folder} cannot be written: {e.strerror}") from e
    if remark is not None:
        complain(f"Warning: {remark}: a host that checks no checksum would run what they put there")

    def pretty() -> None:
        click.echo("\n".join(_BLOCK.format_map(row) for row in rows), nl=False)

    Printer(as_json=output == "json", field=field).value({"plugins": rows}, pretty)


def _install(folder: Path, kind: PluginKind, name: str) -> dict[str, str]:
    path = folder / f"{kind.value.lower()}-{name}"
    content = launcher(kind, name)
    replace_file(path, content, mode=_MODE, shared=True)
    return {
        "kind": kind.value,
        "name": name,
        "sides": " and the ".join(side.value for side in sides_of(kind, name)),
        "path": str(path),
        "checksum": hashlib.sha256(content).hexdigest(),
    }
