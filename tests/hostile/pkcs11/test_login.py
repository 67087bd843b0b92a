"""Tokens that answer a wrong PIN, or a right one, with another code than they should."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import ErrorKind, SpireHwError
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.tokenrig import PIN, TokenRig

if TYPE_CHECKING:
    from pathlib import Path

    from spire_hw_plugins.keymanager.pkcs11 import Pkcs11KeyManager

CC = shutil.which("cc")
pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
    pytest.mark.skipif(CC is None, reason="no C compiler is installed"),
]
# SoftHSM with another C_Login: it writes a line for each call, and answers with the code in a file
# where the token would refuse the PIN, or, with a "!" before it, without asking the token.
_MODULE = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
typedef unsigned long rv_t;
typedef rv_t (*login_t)(rv_t, rv_t, unsigned char *, rv_t);
struct table { unsigned char version[2]; void *entries[68]; };
static struct table ours, *theirs;
enum { LOGIN = 18 };

static rv_t login(rv_t session, rv_t user, unsigned char *pin, rv_t size) {
    rv_t code = 0;
    char always = 0;
    FILE *log = fopen(getenv("ODD_LOG"), "a"), *answer = fopen(getenv("ODD_ANSWER"), "r");
    fputs("C_Login\n", log);
    fclose(log);
    if (fscanf(answer, "%lx%c", &code, &always) < 1) abort();
    fclose(answer);
    if (always == '!') return code;
    rv_t result = ((login_t)theirs->entries[LOGIN])(session, user, pin, size);
    return result == 0xA0 ? code : result;
}

rv_t C_GetFunctionList(struct table **list) {
    void *library = dlopen(getenv("ODD_MODULE"), RTLD_NOW);
    rv_t (*get)(struct table **) = dlsym(library, "C_GetFunctionList");
    rv_t result = get(&theirs);
    ours = *theirs;
    ours.entries[LOGIN] = login;
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
        return len(self._log.read_text().splitlines())

    async def configure(self, manager: Pkcs11KeyManager) -> None:
        """Configure a key manager for it."""
        environment = {
            **self.rig.hsm.environment,
            "ODD_MODULE": self.rig.hsm.module,
            "ODD_LOG": str(self._log),
            "ODD_ANSWER": str(self._answer),
        }
        await manager.configure(
            self.rig.config(workers=2, module_path=str(self._module), environment=environment)
        )


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
