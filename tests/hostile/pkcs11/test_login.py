"""Tokens that answer a wrong PIN, or a right one, with another code than they should."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from spire_hw.cli.hsmchecks import check_hsm
from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions, verify_digest
from spire_hw.plugin.keymanager import KeyHealth
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, TokenRig

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw.config.hcl import Body
    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

CC = shutil.which("cc")
pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
    pytest.mark.skipif(CC is None, reason="no C compiler is installed"),
]
# SoftHSM with another C_Login: it writes a line for each call, and answers with the code in a file
# where the token would refuse the PIN, or, with a "!" before it, without asking the token. With a
# key pad, a file in which somebody enters the PIN, no other PIN is taken. A crypto user has the
# user's PIN with "-cu" behind it, and may neither make nor destroy objects.
_MODULE = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long rv_t;
typedef rv_t (*login_t)(rv_t, rv_t, unsigned char *, rv_t);
typedef rv_t (*info_t)(rv_t, unsigned char *);
struct table { unsigned char version[2]; void *entries[68]; };
static struct table ours, *theirs;
enum { TOKEN_INFO = 6, LOGIN = 18, CREATE = 20, DESTROY = 22, MAKE = 59 };
enum { FLAGS = 96, MEMORY = 152, KEY_PAD = 0x100, CRYPTO_USER = 0x80000001, PROHIBITED = 0x1B };

static rv_t token_info(rv_t slot, unsigned char *info) {
    rv_t flags, result = ((info_t)theirs->entries[TOKEN_INFO])(slot, info);
    memcpy(&flags, info + FLAGS, sizeof flags);
    if (getenv("ODD_KEY_PAD")) flags |= KEY_PAD;
    if (getenv("ODD_MEMORY")) {
        rv_t free = atol(getenv("ODD_MEMORY")), memory[] = {65536, free, 65536, free};
        memcpy(info + MEMORY, memory, sizeof memory);
    }
    memcpy(info + FLAGS, &flags, sizeof flags);
    return result;
}

static rv_t prohibited() { return PROHIBITED; }

static rv_t login(rv_t session, rv_t user, unsigned char *pin, rv_t size) {
    rv_t code = 0;
    char always = 0;
    static unsigned char entered[256];
    if (getenv("ODD_KEY_PAD")) {
        FILE *pad = fopen(getenv("ODD_KEY_PAD"), "r");
        if (pin || size) abort();
        size = fread(entered, 1, sizeof entered, pad);
        fclose(pad);
        pin = entered;
    }
    FILE *log = fopen(getenv("ODD_LOG"), "a"), *answer = fopen(getenv("ODD_ANSWER"), "r");
    fprintf(log, "C_Login %lx\n", user);
    fclose(log);
    if (fscanf(answer, "%lx%c", &code, &always) < 1) abort();
    fclose(answer);
    if (always == '!') return code;
    if (user == CRYPTO_USER) {
        if (size < 3 || memcmp(pin + size - 3, "-cu", 3)) return 0xA0;
        user = 1;
        size -= 3;
        ours.entries[CREATE] = ours.entries[DESTROY] = ours.entries[MAKE] = prohibited;
    }
    rv_t result = ((login_t)theirs->entries[LOGIN])(session, user, pin, size);
    return result == 0xA0 ? code : result;
}

rv_t C_GetFunctionList(struct table **list) {
    void *library = dlopen(getenv("ODD_MODULE"), RTLD_NOW);
    rv_t (*get)(struct table **) = dlsym(library, "C_GetFunctionList");
    rv_t result = get(&theirs);
    ours = *theirs;
    ours.entries[LOGIN] = login;
    ours.entries[TOKEN_INFO] = token_info;
    *list = &ours;
    return result;
}
"""
SHA256 = SignOptions(HashAlgorithm.SHA256)


class OddToken:
    """A rig's token behind the module above."""

    def __init__(self, rig: TokenRig, folder: Path) -> None:
        self.rig = rig
        self._log, self._answer = folder / "logins", folder / "answer"
        source, self._module = folder / "odd.c", folder / "odd.so"
        source.write_text(_MODULE)
        output = ["-o", str(self._module), str(source), "-ldl"]
        subprocess.run([CC or "cc", "-shared", "-fPIC", *output], check=True)  # noqa: S603
        self._module.chmod(0o700)
        self.answers("a0")

    def answers(self, code: str) -> None:
        """Choose what C_Login answers."""
        self._answer.write_text(code)

    @property
    def logins(self) -> int:
        """Return how often C_Login was called."""
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    @property
    def users(self) -> set[str]:
        """Return who was logged in, as CKU numbers in hex."""
        return set(re.findall("C_Login (.*)", self._log.read_text()))

    def config(
        self, *, key_pad: Path | None = None, free: int | None = None, **changes: object
    ) -> Body:
        """Return a configuration for it.

        Args:
            key_pad: the PIN is entered on a key pad: it is the content of this file.
            free: bytes of memory that are left, by its own words.
            changes: as for the rig.
        """
        environment = {
            **self.rig.hsm.environment,
            "ODD_MODULE": self.rig.hsm.module,
            "ODD_LOG": str(self._log),
            "ODD_ANSWER": str(self._answer),
        }
        if free is not None:
            environment["ODD_MEMORY"] = str(free)
        if key_pad is not None:
            environment["ODD_KEY_PAD"] = str(key_pad)
            changes |= {"pin_file": None, "protected_login": True}
        module = {"module_path": str(self._module), "environment": environment}
        return self.rig.config(**{"workers": 2, **module, **changes})

    async def configure(self, manager: Pkcs11KeyManager) -> None:
        """Configure a key manager for it."""
        await manager.configure(self.config())


@pytest.mark.parametrize("code", ["80000001", "c0de0001", "1b", "7", "a0"])
@pytest.mark.asyncio
async def test_a_wrong_pin_is_sent_once_whatever_the_token_calls_it(
    code: str, tmp_path: Path
) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        token.answers(code)
        rig.write_pin("wrong-9999")
        manager = rig.build()
        for _ in range(3):
            with pytest.raises(SpireHwError, match="refused") as caught:
                await token.configure(manager)
            assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
            assert "wrong-9999" not in repr(caught.value) + str(caught.value)
        assert token.logins == 1
        rig.write_pin(PIN)
        await token.configure(manager)
        assert token.logins == 1 + 3


@pytest.mark.parametrize("code", ["5", "6"])
@pytest.mark.asyncio
async def test_a_wrong_pin_of_which_the_token_says_nothing_is_sent_twice(
    code: str, tmp_path: Path
) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        token.answers(code)
        rig.write_pin("wrong-9999")
        manager = rig.build()
        for _ in range(2):
            with pytest.raises(SpireHwError, match="two logins failed"):
                await token.configure(manager)
        assert token.logins == 2
        rig.write_pin(PIN)
        await token.configure(manager)
        await manager.generate_key("a", KeyType.EC_P256)


@pytest.mark.asyncio
async def test_a_worker_that_is_restarted_does_not_send_a_pin_again_that_failed_oddly(
    tmp_path: Path,
) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        manager = rig.build()
        await token.configure(manager)
        await manager.generate_key("a", KeyType.EC_P256)
        before = token.logins
        token.answers("80000001!")
        for pid in manager.worker_pids:
            os.kill(pid, signal.SIGKILL)
        refused = 0
        while refused < 20:
            with pytest.raises(SpireHwError) as caught:
                await manager.sign_data("a", bytes(32), SHA256)
            refused += caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert token.logins == before + 1
        # The PIN was right: a new process, as after a restart, may send it.
        token.answers("a0")
        with pytest.raises(SpireHwError, match="refused"):
            await token.configure(rig.build())
        assert token.logins == before + 1
        rig.forget_pins()
        again = rig.build()
        await token.configure(again)
        await again.sign_data("a", bytes(32), SHA256)


@pytest.mark.asyncio
async def test_a_pin_that_is_entered_at_the_device_is_never_ours(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        token, pad = OddToken(rig, tmp_path), tmp_path / "pad"
        pad.write_text(PIN)
        manager = rig.build()
        await manager.configure(token.config(key_pad=pad))
        made = await manager.generate_key("a", KeyType.EC_P256)
        digest = bytes(32)
        signed = await manager.sign_data("a", digest, SHA256)
        verify_digest(made.public_key, digest, signed.signature, SHA256)
        assert token.logins == 1 + 2
        os.kill(manager.worker_pids[-1], signal.SIGKILL)
        for _ in range(3):
            await manager.sign_data("a", digest, SHA256)


@pytest.mark.parametrize("code", ["50", "200", "a0", "1!"])
@pytest.mark.asyncio
async def test_a_login_that_fails_at_the_device_is_not_asked_for_again(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cancelled, rejected, a wrong PIN, or taken away."""
    async with TokenRig(tmp_path) as rig:
        token, pad = OddToken(rig, tmp_path), tmp_path / "pad"
        pad.write_text("wrong-9999")
        token.answers(code)
        manager = rig.build()
        for _ in range(3):
            with pytest.raises(SpireHwError, match="login at the device failed") as caught:
                await manager.configure(token.config(key_pad=pad))
            assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert token.logins == 1
        assert capsys.readouterr().out.count("hsm.login_by_hand") == 1


@pytest.mark.asyncio
async def test_a_token_without_a_key_pad_is_not_asked_to_use_it(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        body = token.config(pin_file=None, protected_login=True)
        with pytest.raises(SpireHwError, match="no key pad or reader of its own") as caught:
            await rig.build().configure(body)
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert token.logins == 0
        with pytest.raises(SpireHwError, match="exactly one of pin_file"):
            await rig.build().configure(token.config(protected_login=True))


@pytest.mark.asyncio
async def test_the_doctor_asks_nobody_to_come_to_the_device(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        token, pad = OddToken(rig, tmp_path), tmp_path / "pad"
        pad.write_text(PIN)
        for config, levels in (
            (token.config(key_pad=pad), {"hsm.pin_source": "ok", "hsm.login_skipped": "warning"}),
            (
                token.config(pin_file=None, protected_login=True),
                {"hsm.pin_source": "ok", "hsm.no_protected_login": "problem"},
            ),
        ):
            found = await asyncio.to_thread(check_hsm, "keymanager(pkcs11)", config, login=True)
            seen = {one.check: one.level.value for one in found}
            assert levels.items() <= seen.items()
        assert token.logins == 0


@pytest.mark.parametrize("overrides", [{}, {"data_objects": False}], ids=["manifest", "none"])
@pytest.mark.asyncio
async def test_a_crypto_user_signs_and_makes_nothing(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        luna: dict[str, Any] = {"profile": "luna", "profile_overrides": overrides}
        officer = rig.build()
        await officer.configure(token.config(**luna))
        made = await officer.generate_key("a", KeyType.EC_P256)
        await officer.close()
        assert token.users == {"1"}
        before = rig.objects()
        rig.write_pin(f"{PIN}-cu")
        manager = rig.build()
        await manager.configure(token.config(**luna, login_as="crypto-user"))
        assert token.users == {"1", "80000001"}
        for _ in range(2):
            signed = await manager.sign_data("a", bytes(32), SHA256)
            verify_digest(made.public_key, bytes(32), signed.signature, SHA256)
            with pytest.raises(SpireHwError, match=r"read-only.*make keys as its user") as caught:
                await manager.generate_key("a", KeyType.EC_P256)
            assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        health = manager.key_health()
        assert (health.health, health.reason) == (KeyHealth.DEGRADED, "hsm.read_only")
        assert rig.objects() == before


@pytest.mark.asyncio
async def test_what_is_known_of_one_users_pin_says_nothing_of_the_others(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        token, manager = OddToken(rig, tmp_path), rig.build()
        rig.write_pin(f"{PIN}-cu")
        for _ in range(2):
            with pytest.raises(SpireHwError, match="refused"):
                await manager.configure(token.config(profile="luna"))
        assert token.logins == 1
        await manager.configure(token.config(profile="luna", login_as="crypto-user"))
        rig.write_pin(PIN)
        other = rig.build()
        for _ in range(2):
            with pytest.raises(SpireHwError, match="refused"):
                await other.configure(token.config(profile="luna", login_as="crypto-user"))
        assert token.logins == 1 + 3 + 1


@pytest.mark.asyncio
async def test_a_token_without_a_crypto_user_is_sent_no_pin(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        with pytest.raises(
            SpireHwError, match="knows no crypto-user; leave login_as out"
        ) as caught:
            await rig.build().configure(token.config(login_as="crypto-user"))
        assert caught.value.kind is ErrorKind.FAILED_PRECONDITION
        assert token.logins == 0
        with pytest.raises(SpireHwError, match="profile softhsm knows no crypto-user"):
            await rig.build().configure(token.config(profile="softhsm", login_as="crypto-user"))
        with pytest.raises(SpireHwError, match="login_as"):
            await rig.build().configure(token.config(login_as="so"))
        assert token.logins == 0


@pytest.mark.asyncio
async def test_the_doctor_tells_of_a_token_that_is_nearly_full(tmp_path: Path) -> None:
    async with TokenRig(tmp_path) as rig:
        token = OddToken(rig, tmp_path)
        disbelieved: dict[str, Any] = {"profile_overrides": {"tells_memory": False}}
        for config, is_told in (
            (token.config(), False),
            (token.config(free=60_000), False),
            (token.config(free=500), True),
            (token.config(free=500, **disbelieved), False),
        ):
            found = await asyncio.to_thread(
                check_hsm, "keymanager(pkcs11)", config, key_types=[KeyType.EC_P256]
            )
            told = [one for one in found if one.check == "hsm.nearly_full"]
            assert len(told) == is_told
            assert all("500 bytes of private memory" in one.message for one in told)
