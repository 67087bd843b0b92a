from __future__ import annotations

import asyncio
import io
import time
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import LogSettings, configure, unconfigure
from spire_hw.tpm import attest, keys
from spire_hw.tpm.connection import TRANSIENT_HANDLES, Capability, Connection, Hierarchy
from spire_hw.tpm.device import TpmDevice, load_password, resolve_tcti, shared
from spire_hw.tpm.errors import TpmError
from spire_hw.tpm.storage import storage
from spire_hw_sim.tpm_command import ENDORSEMENT, OWNER
from tests.integration.tpm.leaks import loaded, nothing_left_behind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from spire_hw_sim.swtpm import Swtpm

pytestmark = pytest.mark.asyncio
DIGEST = HashAlgorithm.SHA256.digest(b"data")
OPTIONS = SignOptions(HashAlgorithm.SHA256)


@pytest_asyncio.fixture
async def device(tpm: Swtpm) -> AsyncIterator[TpmDevice]:
    device = shared(tpm.tcti)
    yield device
    await device.close()


def transient(connection: Connection) -> list[int]:
    return connection.handles(TRANSIENT_HANDLES)


async def test_users_of_one_tcti_share_one_device_until_the_last_closes_it(tpm: Swtpm) -> None:
    first, second = shared(tpm.tcti), shared(tpm.tcti)
    assert first is second
    await first.close()
    assert await second.run("list", transient) == []
    await second.close()
    with pytest.raises(UnavailableError, match="closed"):
        await second.run("list", transient)
    third = shared(tpm.tcti)
    assert third is not first
    await third.close()


async def test_jobs_of_many_tasks_run_one_at_a_time(device: TpmDevice, tpm: Swtpm) -> None:
    blob, _ = await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    with nothing_left_behind(tpm):
        signatures = await asyncio.gather(
            *(device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS)) for _ in range(20))
        )
    assert len(set(signatures)) == 20


async def test_what_a_failing_job_loaded_is_flushed(device: TpmDevice, tpm: Swtpm) -> None:
    def job(connection: Connection) -> None:
        with storage(connection):
            assert len(loaded(tpm)) == 1
            raise InvalidInputError("on purpose")

    with nothing_left_behind(tpm), pytest.raises(InvalidInputError, match="on purpose"):
        await device.run("fail", job)


async def test_a_job_that_is_out_of_time_still_tidies_up(device: TpmDevice, tpm: Swtpm) -> None:
    def job(connection: Connection) -> list[int]:
        with storage(connection):
            while time.monotonic() < end:
                time.sleep(0.01)
            return transient(connection)

    await device.run("list", transient)
    end = time.monotonic() + 0.3
    with nothing_left_behind(tpm), pytest.raises(UnavailableError, match="took too long"):
        await device.run("be late", job, timeout_s=0.2)
    assert await device.run("list", transient) == []


async def test_a_refusal_names_code_place_cause_and_remedy(device: TpmDevice, tpm: Swtpm) -> None:
    with nothing_left_behind(tpm), pytest.raises(TpmError) as caught:
        await device.run("make RSA_4096 key", lambda c: keys.create_key(c, KeyType.RSA_4096))
    text = caught.value.message
    assert text.startswith("make RSA_4096 key: TPM answered TPM_RC_VALUE (parameter 2): ")
    assert "not supported by this TPM" in text


async def test_a_tpm_that_is_gone_is_unavailable_and_used_again_when_it_is_back(
    device: TpmDevice, tpm: Swtpm
) -> None:
    blob, _ = await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    tpm.kill()
    for _ in range(2):
        with pytest.raises(UnavailableError, match="TPM"):
            await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))
    tpm.start()
    with nothing_left_behind(tpm):
        assert await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS))


async def test_saved_contexts_that_a_reset_made_useless_are_made_again(
    device: TpmDevice, tpm: Swtpm
) -> None:
    blob, name = await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    use = keys.KeyUse(name)
    for clean in (True, False):
        await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS, use))
        tpm.reset(clean=clean)
        with nothing_left_behind(tpm):
            await device.run("sign", lambda c: keys.sign(c, blob, DIGEST, OPTIONS, use))


async def test_a_hanging_tpm_fails_the_caller_in_time_and_recovers(
    device: TpmDevice, tpm: Swtpm
) -> None:
    await device.run("list", transient)
    tpm.pause()
    with pytest.raises(SpireHwError) as caught:
        await device.run("list", transient, timeout_s=0.1)
    assert caught.value.kind is ErrorKind.DEADLINE_EXCEEDED
    tpm.resume()
    assert await device.run("list", transient) == []


async def test_slots_filled_by_our_own_leftovers_are_reclaimed_and_others_are_not(
    device: TpmDevice, tpm: Swtpm
) -> None:
    ak = await device.run("make AK", attest.create_attestation_key)
    left = [tpm.commands.create_primary(ENDORSEMENT, attest._AK_TEMPLATE) for _ in range(3)]
    assert {public for _, public in left} == {ak.public}
    await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    assert loaded(tpm) == []
    foreign = attest._AK_TEMPLATE.replace(attest._AK_SEPARATION, bytes(32))
    for _ in range(3):
        tpm.commands.create_primary(ENDORSEMENT, foreign)
    with pytest.raises(TpmError, match="no free slot for a key") as caught:
        await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    assert caught.value.retryable
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    assert len(loaded(tpm)) == 3


async def test_a_hierarchy_password_is_asked_for_and_used(device: TpmDevice, tpm: Swtpm) -> None:
    tpm.commands.set_password(OWNER, b"owner secret")
    with nothing_left_behind(tpm), pytest.raises(TpmError, match="hierarchy password required"):
        await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))
    device.set_password(Hierarchy.OWNER, b"owner secret")
    await device.run("make key", lambda c: keys.create_key(c, KeyType.EC_P256))


async def test_the_tpm_tells_its_capabilities(device: TpmDevice) -> None:
    curves = await device.run("ask", lambda c: c.capability(Capability.CURVES))
    assert (3,) in curves
    algorithms = await device.run("ask", lambda c: c.capability(Capability.ALGORITHMS))
    assert len(algorithms) == len({n for n, _ in algorithms}) > 20
    banks = await device.run("ask", Connection.pcr_banks)
    assert len(banks["sha256"]) == len(banks["sha384"]) == 24
    assert banks["sha1"] == ()


async def test_a_tpm_that_never_was_there_is_unavailable(tmp_path: Path) -> None:
    device = shared(f"swtpm:path={tmp_path / 'none'}")
    with pytest.raises(UnavailableError, match="no TPM answers"):
        await device.run("list", transient)
    await device.close()


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("/dev/tpmrm1", "device:/dev/tpmrm1"),
        ("swtpm:host=localhost,port=2321", "swtpm:host=localhost,port=2321"),
        ("tabrmd:bus_type=system", "tabrmd:bus_type=system"),
    ],
)
async def test_paths_and_tctis_are_told_apart(text: str, resolved: str) -> None:
    assert resolve_tcti(text) == resolved


@pytest.mark.parametrize("text", ["dev/tpmrm0", "../x:", " "])
async def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="neither"):
        resolve_tcti(text)


async def test_a_password_file_loses_its_final_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "auth"
    path.write_bytes(b" secret \n\r\n")
    assert load_password(str(path)) == b" secret \n"
    assert load_password("") == b""
    with pytest.raises(NotReadyError, match="cannot be read"):
        load_password(str(tmp_path / "missing"))
    with pytest.raises(NotReadyError, match="password file /dev/null cannot be read: it is not a"):
        load_password("/dev/null")
    assert load_password("/dev/null", pipes=True) == b""
    path.write_bytes(bytes(2000))
    with pytest.raises(NotReadyError, match="too long"):
        load_password(str(path))


async def test_whoever_waits_for_a_tpm_that_hangs_is_told_soon_and_once(
    device: TpmDevice, tpm: Swtpm
) -> None:
    await device.run("list", transient)
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    tpm.pause()
    async with asyncio.TaskGroup() as group:
        jobs = [group.create_task(device.run(f"job {n}", transient)) for n in range(2)]
        try:
            while "Still waiting for the TPM" not in stream.getvalue():
                assert not any(job.done() for job in jobs)
                await asyncio.sleep(0.05)
        finally:
            tpm.resume()
            unconfigure()
    assert [job.result() for job in jobs] == [[], []]
    (line,) = stream.getvalue().splitlines()
    assert 'operation="job 0"' in line
    assert device.tcti in line


async def test_a_tpm_that_hangs_does_not_keep_its_user_from_ending(
    tpm: Swtpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spire_hw.tpm.device._CLOSE_TIMEOUT_S", 0.1)
    device = TpmDevice(tpm.tcti)
    await device.run("list", transient)
    stream = io.StringIO()
    configure(LogSettings(), stream=stream)
    tpm.pause()
    try:
        with pytest.raises(SpireHwError):
            await device.run("list", transient, timeout_s=0.1)
        await device.close()
    finally:
        tpm.resume()
        unconfigure()
    assert "TPM left as it is" in stream.getvalue()
