"""Plugins in the older style become the blocks that say the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from spire_hw.config.hcl import MAX_CHARS, parse
from spire_hw.errors import ConfigError
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.olddir import read_plugin_dir
from spire_hw_agent.config import build_settings as agent_settings
from spire_hw_server.config import build_settings as server_settings

if TYPE_CHECKING:
    from pathlib import Path

CHECKSUM = "ab" * 32
ATTESTOR = f"""
pluginName = "tpm"
pluginCmd = "/opt/tpm_attestor"
pluginChecksum = "{CHECKSUM}"
enabled = true
pluginType = "NodeAttestor"
pluginData {{
  secret = "s3cret"
  ca_path = "/etc/ca"
}}
"""
KEYS = 'pluginName = "disk"\npluginType = "KeyManager"\nPLUGINDATA { directory = "/x" }\n'


def agent(directory: Path, plugins: str = "") -> str:
    return f"""agent {{
        trust_domain = "example.org" server_address = "x" server_port = 1
        insecure_bootstrap = true plugin_dir = "{directory}"
    }}
    {plugins}"""


def test_files_and_blocks_stand_together_in_the_same_checks(tmp_path: Path) -> None:
    (tmp_path / "b.hcl").write_text(ATTESTOR)
    (tmp_path / "a.hcl").write_text(KEYS)
    (tmp_path / "notes.txt").write_text("no plugin")
    settings = agent_settings(parse(agent(tmp_path, 'plugins { WorkloadAttestor "unix" {} }')))
    found = {(p.kind, p.name): p for p in settings.plugins}
    tpm = found[PluginKind.NODE_ATTESTOR, "tpm"]
    assert (tpm.cmd, tpm.checksum, tpm.enabled) == ("/opt/tpm_attestor", CHECKSUM, True)
    assert tpm.data.to_hcl() == 'secret = "s3cret"\nca_path = "/etc/ca"\n'
    assert found[PluginKind.KEY_MANAGER, "disk"].data.get("directory") == "/x"
    assert (PluginKind.WORKLOAD_ATTESTOR, "unix") in found
    note = next(n for n in settings.notices if "b.hcl" in n)
    assert 'NodeAttestor "tpm" { plugin_cmd = "/opt/tpm_attestor" plugin_checksum = ' in note
    assert "s3cret" not in note


def test_a_server_may_have_all_its_plugins_there(tmp_path: Path) -> None:
    (tmp_path / "keys.hcl").write_text('pluginName = "disk"\npluginType = "KeyManager"\n')
    (tmp_path / "sql.hcl").write_text(
        'pluginName = "sql"\npluginType = "DataStore"\npluginData { database_type = "sqlite3" }\n'
    )
    off = 'pluginName = "x"\npluginType = "NodeAttestor"\nenabled = false\npluginCmd = "/x"\n'
    (tmp_path / "x.hcl").write_text(off)
    text = f'server {{ trust_domain = "example.org" data_dir = "/d" plugin_dir = "{tmp_path}" }}'
    settings = server_settings(parse(text))
    assert settings.store.data.get("database_type") == "sqlite3"
    assert [(p.name, p.enabled) for p in settings.plugins] == [("disk", True), ("x", False)]


def test_faults_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.hcl").write_text("pluginName = ")
    (tmp_path / "b.hcl").write_text('pluginName = "x"\npluginTyp = "KeyManager"\n')
    (tmp_path / "c.hcl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError) as caught:
        agent_settings(parse(agent(tmp_path)))
    message = caught.value.message
    for words in ("a.hcl:1: ", 'b.hcl:2: unknown key "pluginTyp"', "c.hcl is not UTF-8"):
        assert words in message, words


def test_a_file_that_is_too_large_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.hcl").write_bytes(b"#" * (MAX_CHARS + 1))
    (fault,) = read_plugin_dir(tmp_path, 3).faults
    assert fault.message == f"{tmp_path}/a.hcl is larger than 4 MiB"


def test_checks_of_blocks_hold_for_files(tmp_path: Path) -> None:
    (tmp_path / "a.hcl").write_text(ATTESTOR.replace(CHECKSUM, "zz").replace("NodeAtt", "NodeAt"))
    (tmp_path / "b.hcl").write_text(KEYS)
    with pytest.raises(ConfigError, match='unknown plugin type "NodeAtestor"'):
        agent_settings(parse(agent(tmp_path, 'plugins { WorkloadAttestor "unix" {} }')))
    (tmp_path / "a.hcl").write_text(ATTESTOR.replace(CHECKSUM, "zz"))
    with pytest.raises(ConfigError, match="64 hex digits"):
        agent_settings(parse(agent(tmp_path, 'plugins { WorkloadAttestor "unix" {} }')))


def test_a_directory_that_is_missing_or_empty(tmp_path: Path) -> None:
    assert "No such file" in read_plugin_dir(tmp_path / "no", 3).faults[0].message
    found = read_plugin_dir(tmp_path, 3)
    assert [(f.line, f.message) for f in found.faults] == [
        (3, f"plugin_dir {tmp_path} has no .hcl file")
    ]
