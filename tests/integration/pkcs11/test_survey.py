"""`pkcs11 list`: what is found on a machine, and modules that misbehave."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from spire_hw.cli.run import run
from spire_hw.pkcs11.survey import find_modules, look_at, token_of
from spire_hw_server.cli.commands import PROGRAM, root
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.fixture
def hsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SoftHsm:
    made = SoftHsm(tmp_path / "hsm")
    monkeypatch.setenv("SOFTHSM2_CONF", str(made.conf))
    return made


def library(folder: Path, name: str, constructor: str) -> str:
    """Compile a shared library that does something as soon as it is loaded."""
    source = folder / f"{name}.c"
    source.write_text(
        "#include <stdio.h>\n#include <stdlib.h>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void start(void) {{ {constructor} }}\n"
    )
    made = folder / f"{name}.so"
    command = ["gcc", "-shared", "-fPIC", "-o", str(made), str(source)]
    subprocess.run(command, check=True)  # noqa: S603
    made.chmod(0o755)
    return str(made)


def test_a_token_is_shown_with_what_it_can_do(
    hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    serial = hsm.init_token("spire")
    assert run(root, PROGRAM, ["pkcs11", "list", "-module", hsm.module]) == 0
    text = capsys.readouterr().out
    assert f'"spire" serial {serial}' in text
    assert "profile softhsm" in text
    assert "ec-p256, ec-p384, rsa-2048, rsa-4096" in text
    assert run(root, PROGRAM, ["pkcs11", "list", "-module", hsm.module, "-output", "json"]) == 0
    (module,) = json.loads(capsys.readouterr().out)["modules"]
    assert module["library"]["manufacturer"] == "SoftHSM"
    token = next(s["token"] for s in module["slots"] if s["token"]["serial"] == serial)
    assert (token["label"], token["profile"]) == ("spire", "softhsm")
    assert "login_required" in token["flags"]
    assert 0x1041 in token["mechanisms"]


def test_a_slot_without_an_initialised_token_says_so(
    hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, PROGRAM, ["pkcs11", "list", "-module", hsm.module]) == 0
    assert "not initialised" in capsys.readouterr().out


def test_tokens_are_chosen_by_label_and_serial(hsm: SoftHsm) -> None:
    one, two = hsm.init_token("spire"), hsm.init_token("spire")
    views = look_at([hsm.module], {"SOFTHSM2_CONF": str(hsm.conf)}, 20)
    assert {t.serial for _, t in token_of(views, "spire", None)} == {one, two}
    assert [t.serial for _, t in token_of(views, None, two)] == [two]
    assert token_of(views, "other", None) == []


@needs_gcc
def test_modules_that_crash_hang_or_print_are_reported(
    tmp_path: Path, hsm: SoftHsm, capsys: pytest.CaptureFixture[str]
) -> None:
    hsm.init_token("spire")
    crashes = library(tmp_path, "crashes", "abort();")
    hangs = library(tmp_path, "hangs", "for (;;) pause();")
    prints = library(tmp_path, "prints", 'puts("{}"); fflush(stdout);')
    modules = [a for path in (crashes, hangs, prints, hsm.module) for a in ("-module", path)]
    arguments = ["pkcs11", "list", *modules, "-timeout", "5s", "-output", "json"]
    assert run(root, PROGRAM, arguments) == 3
    shown = {m["path"]: m for m in json.loads(capsys.readouterr().out)["modules"]}
    assert "crashed" in shown[crashes]["problem"]
    assert "signal 6" in shown[crashes]["problem"]
    assert "hung" in shown[hangs]["problem"]
    assert "not a PKCS#11 module" in shown[prints]["problem"]
    assert shown[hsm.module]["problem"] == ""
    assert shown[hsm.module]["slots"]


def test_a_module_in_others_hands_is_not_loaded(tmp_path: Path) -> None:
    module = tmp_path / "module.so"
    module.write_bytes(b"")
    module.chmod(0o666)
    (view,) = look_at([str(module)], {}, 5)
    assert "refusing module" in view.problem


def test_modules_are_found_where_they_are_installed_and_configured(tmp_path: Path) -> None:
    known = tmp_path / "usr/lib/softhsm/libsofthsm2.so"
    again = tmp_path / "usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so"
    for path in (known, again):
        path.parent.mkdir(parents=True)
    known.write_bytes(b"")
    again.symlink_to(known)
    own = tmp_path / "vendor" / "own.so"
    own.parent.mkdir()
    own.write_bytes(b"")
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "own.module").write_text(f"# a comment\nmodule: {own}\ncritical: no\n")
    (folder / "trust.module").write_text("module: p11-kit-trust.so\n")
    (folder / "odd.module").write_bytes(b"\xff\xfe")
    assert find_modules(tmp_path, [folder, tmp_path / "none"]) == [str(known), str(own)]
