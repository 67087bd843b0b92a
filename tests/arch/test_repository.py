"""What is checked in: nothing secret, nothing of one machine, no dead link, no stray dependency."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "spire_hw",
    "spire_hw_plugins",
    "spire_hw_server",
    "spire_hw_signer",
    "spire_hw_agent",
    "spire_hw_sim",
}
# Distribution -> the module it is imported by, where the names differ.
MODULES = {
    "grpcio": "grpc",
    "grpcio-health-checking": "grpc_health",
    "protobuf": "google",
    "googleapis-common-protos": "google",
    "tpm2-pytss": "tpm2_pytss",
    "python-pkcs11": "pkcs11",
    "SQLAlchemy": "sqlalchemy",
    "PyMySQL": "pymysql",
    "typing-extensions": "typing_extensions",
}
# This file names what it looks for.
OWN = Path(__file__).relative_to(ROOT)
_SECRET = re.compile(
    r"-----BEGIN (?:RSA |EC |ENCRYPTED )?PRIVATE KEY-----\n[A-Za-z0-9+/=\n]{60}"
    r"|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36}|xox[bp]-[0-9]{8}"
)
_PLACE = re.compile(r"/work/|/root/[a-z.]|/opt/wheels|/home/(?!dev/)[a-z]+/|artifact-registry")
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(  # noqa: S603
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = (Path(name) for name in listed.stdout.decode().split("\0") if name)
    return [name for name in names if name != OWN and (ROOT / name).is_file()]


def text_of(name: Path) -> str:
    return (ROOT / name).read_bytes().decode("utf-8", "replace")


def test_no_secret_is_checked_in() -> None:
    assert not [str(n) for n in tracked() if _SECRET.search(text_of(n))]


def test_nothing_names_a_place_of_one_machine() -> None:
    found = {str(n): m[0] for n in tracked() if (m := _PLACE.search(text_of(n)))}
    assert not found


def test_nothing_large_or_built_is_checked_in() -> None:
    names = tracked()
    assert not [str(n) for n in names if (ROOT / n).stat().st_size > 1 << 20]
    built = {".pyc", ".so", ".whl", ".sqlite3", ".key"}
    assert not [str(n) for n in names if n.suffix in built]


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")]
    links = [(page, target) for page in pages for target in _LINK.findall(page.read_text())]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page, target in links
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_every_package_says_what_it_is_for() -> None:
    packages = [
        name
        for name in tracked()
        if name.name == "__init__.py" and name.parts[0] != "tests" and "_pb" not in name.parts
    ]
    assert not [str(n) for n in packages if not ast.get_docstring(ast.parse(text_of(n)))]


def imported(*roots: str) -> set[str]:
    found: set[str] = set()
    for root in roots:
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - PACKAGES


def declared(lines: list[str]) -> dict[str, str]:
    names = [re.split(r"[\[><=!~ ]", line)[0] for line in lines]
    return {name: MODULES.get(name, name.replace("-", "_")) for name in names}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    always = declared(project["dependencies"])
    drivers = declared([*extras["postgres"], *extras["mysql"]])
    used = imported("spire_hw", "plugins", "server", "agent")
    assert set(always.values()) <= used, "declared, imported by nobody"
    known = {*always.values(), *drivers.values(), "pydantic_core"}
    assert used <= known, "imported, not declared"


def test_shell_scripts_are_clean() -> None:
    scripts = sorted(map(str, [*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]))
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)  # noqa: S603, S607
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed; syntax alone was checked")
    done = subprocess.run(  # noqa: S603
        ["shellcheck", *scripts],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout


def test_the_vagrantfile_is_ruby() -> None:
    if shutil.which("ruby") is None:
        pytest.skip("ruby is not installed")
    subprocess.run(["ruby", "-c", "Vagrantfile"], cwd=ROOT, check=True, capture_output=True)  # noqa: S607


def test_scripts_the_vagrantfile_names_exist() -> None:
    named = re.findall(r'path: "([^"]+)"', (ROOT / "Vagrantfile").read_text())
    assert named
    assert all((ROOT / name).stat().st_mode & 0o111 for name in named)


@pytest.mark.slow
def test_vagrant_accepts_the_vagrantfile(tmp_path: Path) -> None:
    if shutil.which("vagrant") is None:
        pytest.skip("vagrant is not installed")
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "VAGRANT_HOME": str(tmp_path / "home"),
        "VAGRANT_CWD": str(ROOT),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        "VAGRANT_DEFAULT_PROVIDER": "libvirt",
    }
    done = subprocess.run(
        ["vagrant", "validate"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    if (
        "libvirt" in done.stderr
        and "provider" in done.stderr
        and "could not be found" in done.stderr
    ):
        pytest.skip("vagrant has no libvirt provider here (vagrant-libvirt)")
    assert done.returncode == 0, done.stdout + done.stderr
