from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

import pytest

from spire_hw.clock import SystemClock
from spire_hw.config.hcl import Body
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.log import get_logger
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.workloadattestor.unix import UnixAttestor, build

pytestmark = pytest.mark.asyncio

STATUS = """Name:\t{name}
State:\tR (running)
Uid:\t10\t20\t30\t40
Gid:\t11\t21\t31\t41
Groups:\t5 4294967294
"""


class Caller:
    """A process whose files are a test's choice."""

    pid = 7

    def __init__(
        self, status: str = STATUS.format(name="x"), exe: Path | None = None, uid: int = 20
    ) -> None:
        self.uid = uid
        self.gid = 21
        self._status = status
        self._exe = exe
        self.opened: list[int] = []

    def alive(self) -> bool:
        return True

    def read_link(self, name: str) -> str:
        return str(self._exe)

    def read_file(self, name: str, limit: int) -> bytes:
        return self._status.encode("latin-1")[:limit]

    def open_file(self, name: str) -> int:
        assert self._exe is not None
        self.opened.append(os.open(self._exe, os.O_RDONLY))
        return self.opened[-1]


async def plugin(**config: object) -> UnixAttestor:
    made = build(
        HostInfo(
            side=Side.AGENT,
            trust_domain=TrustDomain("example.org"),
            data_dir=Path(),
            log=get_logger("test"),
            clock=SystemClock(),
        )
    )
    await made.configure(Body.from_dict(dict(config)))
    return made


async def test_effective_user_and_groups() -> None:
    values = await (await plugin()).attest(Caller())
    assert {"uid:20", "gid:21", "supplementary_gid:5", "supplementary_gid:4294967294"} <= set(
        values
    )
    assert not any(v.startswith(("path:", "sha256:")) for v in values)


async def test_this_process() -> None:
    own = await asyncio.to_thread(Path(f"/proc/{os.getpid()}/status").read_text)
    caller = Caller(own, uid=os.geteuid())
    caller.gid = os.getegid()
    values = await (await plugin()).attest(caller)
    assert f"uid:{os.geteuid()}" in values
    if os.geteuid() == 0:
        assert "user:root" in values


async def test_a_caller_that_changed_its_user_is_refused() -> None:
    with pytest.raises(SpireHwError) as caught:
        await (await plugin()).attest(Caller(uid=1000))
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x1d", "\x85", "\r"])
async def test_the_name_of_a_process_is_not_taken_for_lines(end: str) -> None:
    text = STATUS.format(name=f"x{end}Uid:\t0 0").replace("Uid:\t10\t20\t30\t40\n", "")
    with pytest.raises(SpireHwError, match="cannot be read"):
        await (await plugin()).attest(Caller(text))


@pytest.mark.parametrize("status", ["", "Uid:\t1\nGid:\t1\n", "Uid:\tx x\nGid:\ty y\n"])
async def test_a_status_that_makes_no_sense(status: str) -> None:
    with pytest.raises(SpireHwError, match="cannot be read"):
        await (await plugin()).attest(Caller(status))


async def test_path_and_digest_on_request(tmp_path: Path) -> None:
    exe = tmp_path / "program"
    exe.write_bytes(b"x" * 3_000_000)
    caller = Caller(exe=exe)
    values = await (await plugin(discover_workload_path=True)).attest(caller)
    assert f"path:{exe}" in values
    assert f"sha256:{hashlib.sha256(exe.read_bytes()).hexdigest()}" in values
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(caller.opened[0])


@pytest.mark.parametrize("limit", [10, -1])
async def test_no_digest_beyond_the_limit(tmp_path: Path, limit: int) -> None:
    exe = tmp_path / "program"
    exe.write_bytes(b"x" * 11)
    made = await plugin(discover_workload_path=True, workload_size_limit=limit)
    values = await made.attest(Caller(exe=exe))
    assert f"path:{exe}" in values
    assert not any(v.startswith("sha256:") for v in values)


async def test_giving_up_leaves_no_descriptor_in_use(tmp_path: Path) -> None:
    exe = tmp_path / "program"
    with exe.open("wb") as file:
        file.truncate(8 << 30)  # sparse: hours of zeros
    caller = Caller(exe=exe)
    made = await plugin(discover_workload_path=True)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await made.attest(caller)

    def is_closed() -> bool:
        try:
            os.fstat(caller.opened[0])
        except OSError:
            return True
        return False

    async with asyncio.timeout(10):
        while not is_closed():  # noqa: ASYNC110 - another thread closes it
            await asyncio.sleep(0.01)
