"""Plugins that come up and then misbehave: calls fail with their name, the host goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from google.protobuf.empty_pb2 import Empty

from spire_hw.errors import (
    ConfigError,
    DeniedError,
    ErrorKind,
    NotFoundError,
    PluginError,
    SpireHwError,
)
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.plugin.hostservices import HostServices
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.keymanager import Keys, ManagedSigner
from spire_hw.rpc.client import connect_unix
from spire_hw_sim.clock import SimClock

if TYPE_CHECKING:
    from spire_hw.catalog import Catalog
    from tests.hostile.plugins.conftest import Stage

SHA256 = SignOptions(HashAlgorithm.SHA256)
DIGEST = bytes(32)


def keys_of(catalog: Catalog) -> Keys:
    return Keys(catalog.one(PluginKind.KEY_MANAGER).plugin, "odd")


async def signer_of(catalog: Catalog) -> ManagedSigner:
    return await keys_of(catalog).generate("id", KeyType.EC_P256)


async def until_up(catalog: Catalog) -> None:
    """Wait until the plugin was started again."""
    (check,) = catalog.checks().values()
    while True:
        try:
            await check()
        except SpireHwError:
            await asyncio.sleep(0.05)
        else:
            return


# -- failing to load ----------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("no_init", "Init"),
        ("dies_in_init", "it ended (signal 9) during Init"),
        ("hangs_in_init", "it did not answer Init in time"),
        ("fails_in_init", "no init today"),
        ("no_broker", "does not serve plugin.GRPCBroker"),
        ("broker_ends", "does not serve plugin.GRPCBroker"),
        ("wrong_kind", "it serves spire.plugin.server.nodeattestor.v1.NodeAttestor"),
        ("many_services", "it names over 64 services"),
        ("hangs_in_configure", "it did not answer Configure in time"),
    ],
)
async def test_a_plugin_that_cannot_be_loaded(stage: Stage, mode: str, words: str) -> None:
    hasty = {"init_s": 2.0} if "init" in mode else {}
    if mode == "hangs_in_configure":
        hasty = {"configure_s": 1.0}
    stage.limits = replace(stage.limits, deinit_s=1, **hasty)
    with pytest.raises(SpireHwError) as caught:
        await stage.load(stage.config(mode))
    assert words in caught.value.message
    assert caught.value.message.startswith("keymanager(odd): ")
    assert stage.left_over() == []


@pytest.mark.asyncio
async def test_a_configuration_it_does_not_accept_is_a_fault_of_that_block(stage: Stage) -> None:
    with pytest.raises(ConfigError) as caught:
        await stage.load(stage.config("good", data="bad = 1"))
    assert caught.value.message.startswith("server.conf:7: keymanager(odd): bad is ")
    assert caught.value.message.isprintable()
    faults = await stage.validate(stage.config("good", data="bad = 1"))
    assert [(f.line, f.message) for f in faults] == [(7, "keymanager(odd): bad is bad")]
    assert await stage.validate(stage.config("good", data="a = 1")) == []


@pytest.mark.asyncio
async def test_data_for_a_plugin_that_takes_none_are_refused(stage: Stage) -> None:
    with pytest.raises(SpireHwError, match="it takes no configuration; remove plugin_data"):
        await stage.load(stage.config("no_config", data="a = 1"))
    faults = await stage.validate(stage.config("no_config", data="a = 1"))
    assert [f.message for f in faults] == [
        "keymanager(odd): it takes no configuration; remove plugin_data"
    ]


@pytest.mark.asyncio
async def test_validation_names_a_program_that_is_none(stage: Stage) -> None:
    faults = await stage.validate(stage.config("exits", script="rude_guest.py"))
    assert len(faults) == 1
    assert faults[0].message.startswith("keymanager(odd): the program ended (exit status 3)")


# -- answers ------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("empty_signature", "a signature of 0 bytes"),
        ("other_fingerprint", "does not match"),
        ("garbage_answer", "does not decode"),
        ("huge_answer", ""),
    ],
)
async def test_an_answer_that_cannot_be(stage: Stage, mode: str, words: str) -> None:
    catalog = await stage.load(stage.config(mode))
    try:
        signer = await signer_of(catalog)
        before = psutil.Process().memory_info().rss
        with pytest.raises(PluginError) as caught:
            await signer.sign(DIGEST, SHA256)
        assert caught.value.message.startswith("keymanager(odd): ")
        assert words in caught.value.message
        assert psutil.Process().memory_info().rss - before < 90 << 20
        # The plugin is up all the same.
        assert len(await keys_of(catalog).list()) == 1
    finally:
        await catalog.close()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("mode", "words"), [("malformed_key", 'key "x509-CA-A"'), ("many_keys", "10000 keys")]
)
async def test_keys_that_cannot_be(stage: Stage, mode: str, words: str) -> None:
    catalog = await stage.load(stage.config(mode))
    try:
        with pytest.raises(PluginError) as caught:
            await keys_of(catalog).list()
        assert words in caught.value.message
        assert caught.value.kind is ErrorKind.INTERNAL
    finally:
        await catalog.close()


# -- ending and hanging ---------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_plugin_that_dies_in_a_call_is_started_and_configured_again(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = await stage.load(stage.config("dies_in_call", data="a = 1"))
    try:
        signer = await signer_of(catalog)
        with pytest.raises(PluginError) as caught:
            await signer.sign(DIGEST, SHA256)
        assert caught.value.kind is ErrorKind.UNAVAILABLE
        assert caught.value.message == (
            "keymanager(odd): the plugin went away during the call: it ended, signal 11"
        )
        with pytest.raises(PluginError, match=r"^keymanager\(odd\): the plugin is not running: "):
            await keys_of(catalog).list()
        (check,) = catalog.checks().values()
        with pytest.raises(SpireHwError, match=r"^keymanager\(odd\): the plugin is not running"):
            await check()
        assert list(catalog.checks()) == ["plugin.keymanager(odd)"]
        await until_up(catalog)
        assert await keys_of(catalog).list() == []
    finally:
        await catalog.close()
    printed = capsys.readouterr().out
    assert printed.count('text="a = 1') == 2
    assert 'msg="External plugin is down, it is started again"' in printed


@pytest.mark.asyncio
async def test_what_a_restarted_plugin_refuses_is_not_tried_again(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """A PIN that a device counts would be sent at every start."""
    tries, others = stage.temp / "tries", stage.temp / "others"
    tries.touch()
    others.touch()
    clock = stage.clock = SimClock()
    catalog = await stage.load(stage.config("locked_once_restarted", data=f'a = "{tries}"'))
    try:
        signer = await signer_of(catalog)
        with pytest.raises(PluginError, match="went away during the call"):
            await signer.sign(DIGEST, SHA256)
        async with asyncio.timeout(30):
            while "did not come up again" not in capsys.readouterr().out:
                await clock.advance(timedelta(seconds=1))
                await asyncio.sleep(0.05)
        for _ in range(20):
            await clock.advance(timedelta(minutes=2))
            await asyncio.sleep(0.05)
        assert tries.read_text() == "xx"
        with pytest.raises(PluginError, match="before it is given another configuration"):
            await keys_of(catalog).list()
        supervisor: Any = catalog.one(PluginKind.KEY_MANAGER).plugin._link.channel()
        await supervisor.configure(f'a = "{others}"')
        assert await keys_of(catalog).list() == []
    finally:
        await catalog.close()
    assert (tries.read_text(), others.read_text()) == ("xx", "x")


@pytest.mark.asyncio
async def test_a_plugin_that_hangs_is_killed_after_its_deadline(stage: Stage) -> None:
    stage.limits = replace(stage.limits, call_s=1, probe_s=1)
    catalog = await stage.load(stage.config("hangs_in_call"))
    try:
        # The contract's calls have a limit of their own; this one is a caller without any.
        channel: Any = catalog.one(PluginKind.KEY_MANAGER).plugin._link.channel()
        (process,) = stage.processes()
        path = "/spire.plugin.server.keymanager.v1.KeyManager/SignData"
        with pytest.raises(SpireHwError) as caught:
            await channel.unary(path, b"\x0a\x01x\x18\x05", Empty)
        assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
        await asyncio.to_thread(_wait, process)
        await until_up(catalog)
    finally:
        await catalog.close()


@pytest.mark.asyncio
async def test_one_slow_call_does_not_cost_a_plugin_its_life(stage: Stage) -> None:
    stage.limits = replace(stage.limits, call_s=0.5)
    catalog = await stage.load(stage.config("slow_in_call"))
    try:
        channel: Any = catalog.one(PluginKind.KEY_MANAGER).plugin._link.channel()
        path = "/spire.plugin.server.keymanager.v1.KeyManager/SignData"
        (process,) = stage.processes()
        for attempt in range(4):
            with pytest.raises(SpireHwError) as caught:
                await channel.unary(path, b"\x0a\x01x\x18\x05", Empty)
            assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
            if attempt == 0:
                assert await keys_of(catalog).list() == []
                assert process.is_running()
        # Nothing but slow calls: that is what hanging looks like.
        await asyncio.to_thread(_wait, process)
    finally:
        await catalog.close()


@pytest.mark.asyncio
async def test_a_stopped_process_is_found_by_asking(stage: Stage) -> None:
    stage.limits = replace(stage.limits, probe_s=0.5, probe_every_s=0.2)
    catalog = await stage.load(stage.config("good"))
    try:
        (process,) = stage.processes()
        process.suspend()
        await asyncio.to_thread(_wait, process)
        await until_up(catalog)
    finally:
        await catalog.close()


@pytest.mark.asyncio
async def test_a_plugin_that_closes_its_socket_is_started_again(stage: Stage) -> None:
    stage.limits = replace(stage.limits, probe_s=2, probe_every_s=0.2)
    catalog = await stage.load(stage.config("closes_socket"))
    try:
        (process,) = stage.processes()
        await asyncio.to_thread(_wait, process)
    finally:
        await catalog.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["hangs_in_deinit", "ignores_shutdown", "no_stdio", "children"])
async def test_whatever_it_does_it_is_gone_after_the_stop(stage: Stage, mode: str) -> None:
    stage.limits = replace(stage.limits, deinit_s=0.5, shutdown_s=0.5, exit_s=0.5)
    catalog = await stage.load(stage.config(mode))
    if mode == "children":
        assert len(stage.processes()) == 3
    await catalog.close()
    assert stage.left_over() == []


@pytest.mark.asyncio
async def test_children_of_a_plugin_that_was_killed_are_gone_too(stage: Stage) -> None:
    catalog = await stage.load(stage.config("children"))
    try:
        before = stage.processes()
        leader = next(p for p in before if p.ppid() == psutil.Process().pid)
        leader.kill()
        for process in before:
            await asyncio.to_thread(_wait, process)
    finally:
        await catalog.close()


def _wait(process: psutil.Process) -> None:
    """Wait until a process has ended, without reaping it."""
    with contextlib.suppress(ProcessLookupError):
        held = os.pidfd_open(process.pid)
        try:
            select.select([held], [], [])
        finally:
            os.close(held)


@pytest.mark.asyncio
async def test_a_plugin_that_cannot_stay_up_is_tried_ever_more_rarely(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimClock()
    stage.clock = clock
    catalog = await stage.load(stage.config("dies_later"))
    try:
        (check,) = catalog.checks().values()
        waits: list[float] = []
        for _ in range(3):
            await until_down(check)
            began = clock.monotonic()
            while await is_down(check):
                await clock.advance(timedelta(seconds=0.25))
                # A start takes real time, in which the simulated one stands still.
                await asyncio.sleep(0.02)
            waits.append(clock.monotonic() - began)
    finally:
        await catalog.close()
    assert waits[0] < waits[-1]
    assert capsys.readouterr().out.count("it is started again") >= 3


async def is_down(check: Any) -> bool:
    try:
        await check()
    except SpireHwError:
        return True
    return False


async def until_down(check: Any) -> None:
    while not await is_down(check):  # noqa: ASYNC110 - a process has to end
        await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_connections_and_descriptors_of_a_plugin_do_not_exhaust_the_host(
    stage: Stage,
) -> None:
    before = psutil.Process().num_fds()
    catalog = await stage.load(stage.config("leaks"))
    try:
        assert psutil.Process().num_fds() - before < 200
        assert await (await signer_of(catalog)).sign(DIGEST, SHA256)
    finally:
        await catalog.close()
    assert psutil.Process().num_fds() <= before


# -- the log --------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", ["log_flood", "stdio_flood"])
async def test_a_flood_of_log_lines_is_held_back(
    stage: Stage, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = await stage.load(stage.config(mode))
    try:
        signer = await signer_of(catalog)
        for _ in range(20):
            assert await signer.sign(DIGEST, SHA256)
    finally:
        await catalog.close()
    printed = capsys.readouterr().out
    assert printed.count("msg=flood") <= 20_000
    assert "Log lines of the plugin were dropped" in printed


@pytest.mark.asyncio
async def test_a_hostile_log_forges_nothing(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = await stage.load(stage.config("hostile_log"))
    try:
        assert await (await signer_of(catalog)).sign(DIGEST, SHA256)
    finally:
        await catalog.close()
    printed = capsys.readouterr().out
    assert "4321" not in printed
    assert "\x1b" not in printed
    assert all(line.startswith('time="') for line in printed.splitlines())
    assert "subsystem_name=server" not in printed.replace("field.subsystem_name=server", "")


# -- what it gets to see --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_it_sees_nothing_of_ours(stage: Stage) -> None:
    stage.environ |= {
        "SPIRE_HW_JOIN_TOKEN": "s3cret",
        "HSM_PIN": "4321",
        "VAULT_TOKEN": "v4ult",
        "PLUGIN_CLIENT_CERT": "-----",
        "PLUGIN_MULTIPLEX_GRPC": "true",
        "WorkloadAttestor": "WorkloadAttestor",
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "AWS_REGION": "eu-north-1",
    }
    catalog = await stage.load(replace(stage.config("good"), env=("VAULT_TOKEN",)))
    try:
        (process,) = stage.processes()
        seen = process.environ()
        assert seen["VAULT_TOKEN"] == stage.environ["VAULT_TOKEN"]
        assert seen["AWS_REGION"] == "eu-north-1"
        assert seen["KeyManager"] == "KeyManager"
        assert not {"s3cret", "4321", "-----"} & set(seen.values())
        hidden = {"PLUGIN_CLIENT_CERT", "PLUGIN_MULTIPLEX_GRPC", "WorkloadAttestor"}
        assert not seen.keys() & {*hidden, "NOTIFY_SOCKET"}
    finally:
        await catalog.close()


@pytest.mark.asyncio
async def test_it_inherits_no_descriptor_and_leads_its_own_session(
    stage: Stage, tmp_path: Any
) -> None:
    program = stage.temp / "look"
    found = tmp_path / "found"
    program.write_text(
        f"#!/bin/sh\nexec > {found} 2>&1\nls -l /proc/$$/fd\ncut -d' ' -f5,6 /proc/$$/stat\n"
        "echo pid $$\n"
    )
    program.chmod(0o755)
    with (tmp_path / "open").open("w") as held:
        assert held.fileno() > 2
        with pytest.raises(SpireHwError):
            await stage.load(replace(stage.config("good"), cmd=str(program), checksum=""))
    text = found.read_text()
    links = [line.partition(" -> ") for line in text.splitlines() if " -> " in line]
    targets = {link[0].split()[-1]: link[2] for link in links}
    # 10 or so is the script itself, opened by the shell.
    assert targets.pop("0") == "/dev/null"
    assert set(targets.values()) <= {str(found), str(program)}
    pid = text.split("pid ")[1].strip()
    assert f"{pid} {pid}" in text


@pytest.mark.asyncio
async def test_host_services_answer_over_the_broker(stage: Stage) -> None:
    class Agents:
        async def check_known(self, agent_id: object) -> None:
            raise NotFoundError(f"no agent {agent_id}")

    stage.services = HostServices(agent_store=Agents())
    with pytest.raises(SpireHwError) as caught:
        await stage.load(stage.config("asks_host"))
    # An empty request: the service was reached and says what is wrong with it.
    assert "SPIFFE ID" in caught.value.message or "spiffe" in caught.value.message.lower()


@pytest.mark.asyncio
async def test_host_services_are_for_the_plugin_alone(stage: Stage) -> None:
    class Agents:
        async def check_known(self, agent_id: object) -> None:
            raise AssertionError(f"a stranger asked for {agent_id}")

    stage.services = HostServices(agent_store=Agents())
    catalog = await stage.load(stage.config("good"))
    try:
        (path,) = stage.temp.glob("spire-hw-plugins-*/*/host.sock")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        async with connect_unix(path) as channel:
            with pytest.raises(DeniedError, match="for the plugin it was made for"):
                await channel.unary(
                    "/spire.hostservice.server.agentstore.v1.AgentStore/GetAgentInfo",
                    b"",
                    Empty,
                    10,
                )
    finally:
        await catalog.close()
