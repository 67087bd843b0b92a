"""Real PostgreSQL and MariaDB servers with throw-away state, reachable by unix socket only.

Both refuse to run as root, so under root they run as their own user (`postgres`, `mysql`). What is
not installed is told by `missing_postgres` and `missing_mariadb`.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_START_S: Final = 60.0
_PROBE_S: Final = 0.1


def missing_postgres() -> str:
    """Return why PostgreSQL cannot be started here, "" when it can."""
    if _postgres_program("initdb") is None:
        return "PostgreSQL is not installed (Debian: postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return 'psycopg is not installed (pip install "spire-hw[postgres]")'
    return _missing_user("postgres")


def missing_mariadb() -> str:
    """Return why MariaDB cannot be started here, "" when it can."""
    if _program("mariadbd") is None or _program("mariadb-install-db") is None:
        return "MariaDB is not installed (Debian: mariadb-server)"
    if importlib.util.find_spec("pymysql") is None:
        return 'PyMySQL is not installed (pip install "spire-hw[mysql]")'
    return _missing_user("mysql")


@contextmanager
def postgres() -> Iterator[str]:
    """Run a PostgreSQL server; give the libpq connection string of its first database."""
    with _directory("postgres") as (directory, run):
        data = directory / "data"
        initdb, pg_ctl = _postgres_program("initdb"), _postgres_program("pg_ctl")
        words = [initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        _call(words, run)
        options = f"-k {directory} -c listen_addresses='' -c fsync=off -c max_connections=40"
        log = directory / "log"
        _call([pg_ctl, "-D", data, "-w", "-t", "60", "-l", log, "-o", options, "start"], run)
        try:
            yield f"host={directory} user=postgres dbname=postgres"
        finally:
            _call([pg_ctl, "-D", data, "-w", "-m", "immediate", "stop"], run)


@contextmanager
def mariadb() -> Iterator[str]:
    """Run a MariaDB server; give the Go connection string of an empty database `spire`.

    Its defaults fold case and trailing blanks, as a fresh Debian installation's do.
    """
    with _directory("mysql") as (directory, run):
        data, socket_path = directory / "data", directory / "s"
        data.mkdir()
        _own(data, run)
        install, server = _program("mariadb-install-db"), _program("mariadbd")
        words = [install, "--no-defaults", f"--datadir={data}", "--skip-test-db"]
        _call([*words, "--auth-root-authentication-method=normal"], run)
        process = subprocess.Popen(
            [
                str(server),
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={socket_path}",
                f"--pid-file={directory / 'pid'}",
                f"--log-error={directory / 'log'}",
                "--skip-networking",
                "--innodb-flush-log-at-trx-commit=0",
                "--innodb-buffer-pool-size=32M",
                "--character-set-server=utf8mb4",
                "--collation-server=utf8mb4_general_ci",
            ],
            **run,
        )
        try:
            _await_mariadb(process, socket_path, directory / "log")
            yield f"root@unix({socket_path})/spire"
        finally:
            process.kill()
            process.wait()


def _await_mariadb(process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
    import pymysql  # noqa: PLC0415 - only where there is a MariaDB to talk to

    deadline = time.monotonic() + _START_S
    while not _listens(socket_path):
        if process.poll() is not None or time.monotonic() > deadline:
            text = log.read_text() if log.exists() else "no log"
            raise RuntimeError(f"mariadbd did not start: {text[-2000:]}")
        time.sleep(_PROBE_S)
    connection = pymysql.connect(unix_socket=str(socket_path), user="root")
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE DATABASE spire")


def _listens(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(socket_path)) == 0


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


def _postgres_program(name: str) -> str | None:
    found = shutil.which(name)
    if found is not None:
        return found
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(versions[-1]) if versions else None


def _missing_user(name: str) -> str:
    if os.geteuid() != 0:
        return ""
    try:
        pwd.getpwnam(name)
    except KeyError:
        return f"running as root and there is no user {name!r} to run the database as"
    return ""


@contextmanager
def _directory(user: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Make a short directory the user may use, and what makes subprocess become that user."""
    run: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    if os.geteuid() == 0:
        entry = pwd.getpwnam(user)
        run |= {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    directory = Path(tempfile.mkdtemp(prefix="spire-hw-db-"))
    try:
        _own(directory, run)
        run["cwd"] = directory
        yield directory, run
    finally:
        shutil.rmtree(directory)


def _own(directory: Path, run: dict[str, Any]) -> None:
    if "user" in run:
        os.chown(directory, run["user"], run["group"])


def _call(words: list[Any], run: dict[str, Any]) -> None:
    try:
        subprocess.run([str(word) for word in words], check=True, timeout=_START_S, **run)
    except subprocess.CalledProcessError as e:
        raise RuntimeError(f"{words[0]} failed with status {e.returncode}") from e
