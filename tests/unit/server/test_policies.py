from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
import structlog
from structlog.testing import capture_logs

from spire_hw.config import hcl
from spire_hw.errors import ConfigError, ErrorKind, InvalidInputError, NotReadyError
from spire_hw.posture.policy import ek_selectors
from spire_hw.posture.policyfile import parse_policy
from spire_hw_server.config import build_settings
from spire_hw_server.datastore.config import DatastoreConfig
from spire_hw_server.datastore.records import StoredPolicy
from spire_hw_server.datastore.sql.store import open_datastore
from spire_hw_server.offline import check_settings
from spire_hw_server.posture.policies import Policies
from spire_hw_server.posture.policyfiles import read_policies, read_policy
from spire_hw_sim.clock import SimClock
from spire_hw_sim.servers import server_config
from tests.unit.spire_hw.posture.samples import EK, EK_HASH, MAKER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_server.datastore.interface import Datastore

PIN = f'pcrs {{ sha256 {{ "4" = ["{"11" * 32}"] }} }}'
OTHER = f'pcrs {{ sha256 {{ "4" = ["{"22" * 32}"] }} }}'
BY_MAKER = f'nodes {{ selectors = ["manufacturer:{MAKER}"] }}'
BY_KEY = f'nodes {{ ek_hashes = ["{EK_HASH}"] }}'

PCR7_ONLY = (
    "PCR 7 alone does not identify what was booted: add PCR 4 or 11, or images or uki to boot { },"
    " or say allow_pcr7_only = true"
)


def text(name: str, inside: str = PIN) -> str:
    return f'policy "{name}" {{\n{inside}\n}}\n'


def row(name: str, inside: str = PIN, version: int = 1, **changes: Any) -> StoredPolicy:
    written = text(name, inside)
    made = {"text": written, "sha256": parse_policy(written, version=version).sha256}
    return StoredPolicy(name, version, **(made | changes))


@pytest.fixture
def clock() -> SimClock:
    return SimClock()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "policies"
    path.mkdir()
    return path


@pytest_asyncio.fixture
async def stores(tmp_path: Path, clock: SimClock) -> AsyncIterator[list[Datastore]]:
    """Two servers over one database."""
    config = DatastoreConfig("sqlite3", str(tmp_path / "d"))
    log = structlog.get_logger()
    stores = [await open_datastore(config, clock=clock, log=log) for _ in range(2)]
    yield stores
    for store in stores:
        await store.close()


@pytest_asyncio.fixture
async def policies(
    stores: list[Datastore], folder: Path, clock: SimClock
) -> AsyncIterator[Policies]:
    made = make(stores[0], folder, clock)
    yield made
    await made.close()


def make(store: Datastore, folder: Path | None, clock: SimClock) -> Policies:
    return Policies(store=store, policy_dir=folder, clock=clock, log=structlog.get_logger())


def names(policies: Policies) -> list[str]:
    return [policy.reference for policy in policies.current]


@pytest.mark.asyncio
async def test_files_and_rows_are_in_force_together(
    policies: Policies, stores: list[Datastore], folder: Path
) -> None:
    (folder / "a.hcl").write_text(text("file", f"version = 4\n{BY_KEY}\n{PIN}"))
    (folder / "notes.txt").write_text("not a policy")
    await stores[1].add_policy(row("row", f"{BY_MAKER}\n{PIN}", version=2), 0)
    await policies.start()
    assert names(policies) == ["file@4", "row@2"]
    chosen = policies.policy_for(ek_selectors(EK))
    assert chosen is not None
    assert chosen.name == "file"
    assert policies.policy_for(["model:x"]) is None
    assert policies.held["file"].file == str(folder / "a.hcl")
    assert policies.held["row"].row is not None


@pytest.mark.asyncio
async def test_without_any_policy_the_set_is_empty(
    stores: list[Datastore], clock: SimClock
) -> None:
    policies = make(stores[0], None, clock)
    await policies.start()
    assert not policies.current
    await policies.close()


@pytest.mark.asyncio
async def test_changes_of_this_and_other_servers_are_followed(
    policies: Policies, stores: list[Datastore], clock: SimClock
) -> None:
    await policies.start()
    seen = policies.watch.version
    await stores[0].add_policy(row("own"), 0)
    _, seen = await asyncio.wait_for(policies.watch.wait(seen), 10)
    assert names(policies) == ["own@1"]
    await stores[1].add_policy(row("own", OTHER, version=2), 1)
    await clock.advance(timedelta(seconds=5))
    value, seen = await asyncio.wait_for(policies.watch.wait(seen), 10)
    assert [policy.reference for policy in value] == ["own@2"]
    await stores[1].add_policy(StoredPolicy("own", 3, "", ""), 2)
    await clock.advance(timedelta(seconds=5))
    value, _ = await asyncio.wait_for(policies.watch.wait(seen), 10)
    assert not value


@pytest.mark.asyncio
async def test_what_is_stored_unchanged_wakes_nobody(
    policies: Policies, stores: list[Datastore], folder: Path
) -> None:
    (folder / "a.hcl").write_text(text("file"))
    await policies.start()
    seen = policies.watch.version
    await policies.reload()
    await policies.refresh()
    assert policies.watch.version == seen


@pytest.mark.asyncio
async def test_the_directory_is_read_again_when_asked(policies: Policies, folder: Path) -> None:
    file = folder / "a.hcl"
    file.write_text(text("file"))
    await policies.start()
    before = policies.current.policies[0].sha256
    file.write_text(text("file", OTHER))
    await policies.refresh()
    assert policies.current.policies[0].sha256 == before
    await policies.reload()
    assert policies.current.policies[0].sha256 != before


@pytest.mark.asyncio
async def test_a_set_that_cannot_be_used_leaves_the_one_before_in_force(
    policies: Policies, stores: list[Datastore], folder: Path
) -> None:
    file = folder / "a.hcl"
    file.write_text(text("file"))
    await policies.start()
    for broken in ("policy {", text("file", "boot { }"), text("file", "ima { }")):
        file.write_text(broken)
        with capture_logs() as logs:
            await policies.reload()
        (line,) = [line for line in logs if line["log_level"] == "error"]
        assert "a.hcl" in line["error"]
        assert names(policies) == ["file@1"]
    file.write_text(text("file"))
    await stores[0].add_policy(row("other"), 0)
    with capture_logs() as logs:
        await policies.refresh()
    assert any("both for every node" in line.get("error", "") for line in logs)
    assert names(policies) == ["file@1"]
    await stores[0].add_policy(row("other", f"{BY_KEY}\n{PIN}", version=2), 1)
    await policies.refresh()
    assert names(policies) == ["file@1", "other@2"]


@pytest.mark.asyncio
async def test_no_start_with_policies_that_cannot_be_used(
    stores: list[Datastore], folder: Path, clock: SimClock
) -> None:
    async def refused(kind: type[Exception], match: str, where: Path = folder) -> Exception:
        policies = make(stores[0], where, clock)
        with pytest.raises(kind, match=match) as caught:
            await policies.start()
        await policies.close()
        return caught.value

    await refused(NotReadyError, "cannot read policy_dir", folder / "none")
    (folder / "a.hcl").write_text(text("web", "boot { }"))
    error = await refused(ConfigError, "PCR 7 alone does not identify what was booted")
    assert isinstance(error, ConfigError)
    assert error.kind is ErrorKind.FAILED_PRECONDITION
    (folder / "b.hcl").write_text(text("Web"))
    error = await refused(InvalidInputError, "PCR 7 alone")
    assert "b.hcl:1: a policy's name" in str(error)
    (folder / "a.hcl").write_text(text("web"))
    (folder / "b.hcl").write_text(text("web", OTHER))
    await refused(InvalidInputError, 'policy "web" is there twice')
    (folder / "b.hcl").unlink()
    await stores[0].add_policy(row("web", OTHER), 0)
    await refused(InvalidInputError, r'policy "web" is both the file .*a\.hcl and in the')
    (folder / "a.hcl").unlink()
    await stores[0].add_policy(row("web", sha256="0" * 64, version=2), 1)
    await refused(InvalidInputError, 'policy "web" version 2 of the datastore was changed')
    await stores[0].add_policy(row("web", text="colour = 1", sha256="0" * 64, version=3), 2)
    await refused(ConfigError, 'policy web@3:1: unknown key "colour"')


@pytest.mark.asyncio
async def test_a_policy_is_checked_beside_those_in_force(
    policies: Policies, stores: list[Datastore], folder: Path
) -> None:
    (folder / "a.hcl").write_text(text("file"))
    await stores[0].add_policy(row("row", f"{BY_KEY}\n{PIN}"), 0)
    await policies.start()
    policies.check(parse_policy(text("row", f"{BY_KEY}\n{OTHER}")))
    policies.check(parse_policy(text("third", f"{BY_MAKER}\n{PIN}")))
    for name, inside, message in (
        ("file", PIN, r"is the file .*a\.hcl: change that"),
        ("third", PIN, "both for every node"),
        ("third", f"{BY_KEY}\n{PIN}", "for the same nodes"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            policies.check(parse_policy(text(name, inside)))


@pytest.mark.asyncio
async def test_validate_tells_all_faults_of_the_directory(folder: Path, tmp_path: Path) -> None:
    conf = f'{server_config(tmp_path)}\nposture {{ policy_dir = "{folder}" }}\n'
    settings = build_settings(hcl.parse(conf, "server.conf"))
    (folder / "a.hcl").write_text(text("web"))
    assert await check_settings(settings) == []
    (folder / "b.hcl").write_text(text("db"))
    (fault,) = await check_settings(settings)
    assert fault.message.startswith('"policy_dir": policies "db" and "web" are both for every')
    (folder / "a.hcl").write_text(text("web", "colour = 1"))
    (folder / "b.hcl").write_text(text("Db", "boot { }"))
    assert [fault.message for fault in await check_settings(settings)] == [
        f'"policy_dir": {folder}/a.hcl:2: unknown key "colour"',
        f"\"policy_dir\": {folder}/b.hcl:1: a policy's name has 1 to 64 of a-z, 0-9, '.', '_' and '-'",
        f'"policy_dir": {folder}/b.hcl:1: {PCR7_ONLY}',
    ]
    (folder / "a.hcl").unlink()
    (folder / "b.hcl").unlink()
    (folder / "c.hcl").mkdir()
    (fault,) = await check_settings(settings)
    assert fault.message.endswith("c.hcl cannot be read: Is a directory")


def test_files_beside_a_policy(folder: Path) -> None:
    (folder / "lists").mkdir()
    (folder / "lists" / "k.sha256").write_text("11" * 32 + "  vmlinuz\n")
    file = folder / "a.hcl"
    file.write_text(text("web", 'pcrs { sha256 { "4" = ["@lists/k.sha256"] } }'))
    policy, packed = read_policy(file)
    assert policy.pcrs == parse_policy(text("web")).pcrs
    assert parse_policy(packed) == policy
    assert [found[:2] for found in read_policies(folder)] == [(file, policy)]


@pytest.mark.parametrize("name", ["none", ".", "/dev/zero", "a\\u0000b", "fifo"])
def test_what_is_no_file_is_refused(folder: Path, name: str) -> None:
    file = folder / "a.hcl"
    file.write_text(text("web", f'pcrs {{ sha256 {{ "4" = ["@{name}"] }} }}'))
    if name == "fifo":
        os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_policy(file)


def test_text_that_is_none_is_refused(folder: Path) -> None:
    file = folder / "a.hcl"
    file.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_policy(file)
    with pytest.raises(NotReadyError, match="cannot be read"):
        read_policy(folder / "none.hcl")
