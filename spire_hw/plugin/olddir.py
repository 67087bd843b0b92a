"""`plugin_dir`: plugins in the older style, a directory with one `.hcl` file for each.

A file becomes the block that would say the same in the `plugins` section, so all checks are the
same ones, and a note shows that block to the operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field

from spire_hw.config import hcl
from spire_hw.config.hcl import Block, Body, Item
from spire_hw.config.schema import Model, check
from spire_hw.errors import ConfigError, ConfigFault, SpireHwError
from spire_hw.files import read_bounded

if TYPE_CHECKING:
    from pathlib import Path

_MAX_FILES: Final = 256


class _OldFile(Model):
    pluginType: Annotated[str, Field(min_length=1)]  # noqa: N815 - upstream's name
    pluginName: Annotated[str, Field(min_length=1)]  # noqa: N815
    pluginCmd: str = ""  # noqa: N815
    pluginChecksum: str = ""  # noqa: N815
    pluginData: Body = Body.empty()  # noqa: N815
    enabled: bool = True


@dataclass(slots=True)
class OldStyle:
    """What a directory holds.

    Attributes:
        blocks: as they would stand in the `plugins` section, in the order of file names.
        faults: what is wrong with the files.
        notices: what the operator should hear.
    """

    blocks: list[Block] = field(default_factory=list)
    faults: list[ConfigFault] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def read_plugin_dir(directory: Path, line: int) -> OldStyle:
    """Read all `.hcl` files of a directory.

    Args:
        directory: as configured.
        line: where that stands; faults get it, for they are in other files.
    """
    found = OldStyle()
    try:
        files = sorted(p for p in directory.iterdir() if p.suffix == ".hcl" and p.is_file())
    except OSError as e:
        found.faults.append(ConfigFault(line, f"plugin_dir {directory}: {e.strerror}"))
        return found
    if len(files) > _MAX_FILES:
        message = f"plugin_dir {directory}: over {_MAX_FILES} files"
        found.faults.append(ConfigFault(line, message))
        return found
    for file in files:
        _read(file, line, found)
    if not files:
        found.faults.append(ConfigFault(line, f"plugin_dir {directory} has no .hcl file"))
    return found


def _read(file: Path, line: int, found: OldStyle) -> None:
    try:
        text = read_bounded(file, hcl.MAX_CHARS).decode()
        raw, faults = check(hcl.parse(text, str(file)), _OldFile)
    except UnicodeDecodeError:
        found.faults.append(ConfigFault(line, f"{file} is not UTF-8 text"))
        return
    except ConfigError as e:
        raw, faults = None, e.faults
    except SpireHwError as e:
        found.faults.append(ConfigFault(line, e.message))
        return
    found.faults += [ConfigFault(line, f"{file}:{f.line}: {f.message}") for f in faults]
    if raw is None:
        return
    given: dict[str, str | bool] = {}
    if raw.pluginCmd:
        given["plugin_cmd"] = raw.pluginCmd
    if raw.pluginChecksum:
        given["plugin_checksum"] = raw.pluginChecksum
    if not raw.enabled:
        given["enabled"] = False
    items = [Item(key, value, line) for key, value in given.items()]
    data = Block(("plugin_data",), raw.pluginData, line)
    found.blocks.append(
        Block((raw.pluginType, raw.pluginName), Body((*items, data), line, str(file)), line)
    )
    # Without the data: they may hold secrets.
    keys = " ".join(Body(tuple(items)).to_hcl().split("\n"))
    found.notices.append(
        f"{file} is in the older style of plugin_dir; in the plugins section it is: "
        f"{raw.pluginType} {hcl.quote(raw.pluginName)} {{ {keys}plugin_data {{ ... }} }}"
    )
