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

_START_S: Final = 180.0
_PROBE_S: Final = 0.1
_SHOWN: Final = 4000
_INSTALL_TRIES: Final = 3
# What a throw-away MariaDB of ours needs little of: memory, and the kernel's asynchronous I/O,
# whose requests are few for the whole machine and run out when several are started at once.
_SMALL: Final = (
    "--innodb-use-native-aio=0",
    "--innodb-buffer-pool-size=32M",
    "--innodb-flush-log-at-trx-commit=0",
    "--skip-name-resolve",
)


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
        log, limit = directory / "log", f"{_START_S:.0f}"
        words = [pg_ctl, "-D", data, "-w", "-t", limit, "-l", log, "-o", options, "start"]
        _call(words, run, log)
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
        server = _program("mariadbd")
        _install_mariadb(data, run)
        process = subprocess.Popen(
            [
                str(server),
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={socket_path}",
                f"--pid-file={directory / 'pid'}",
                f"--log-error={directory / 'log'}",
                "--skip-networking",
                *_SMALL,
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


def _install_mariadb(data: Path, run: dict[str, Any]) -> None:
    """Make the system tables; what a failed try left is thrown away before the next.

    Raises:
        RuntimeError: it failed each time; has what it wrote the last time.
    """
    words = [_program("mariadb-install-db"), "--no-defaults", f"--datadir={data}", *_SMALL]
    words += ["--skip-test-db", "--auth-root-authentication-method=normal"]
    for left in reversed(range(_INSTALL_TRIES)):
        data.mkdir()
        _own(data, run)
        try:
            _call(words, run)
        except RuntimeError:
            if not left:
                raise
            shutil.rmtree(data)
        else:
            return


def _await_mariadb(process: subprocess.Popen[bytes], socket_path: Path, log: Path) -> None:
    import pymysql  # noqa: PLC0415 - only where there is a MariaDB to talk to

    deadline = time.monotonic() + _START_S
    while not _listens(socket_path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"mariadbd did not start: {_end_of(log)}")
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


def _call(words: list[Any], run: dict[str, Any], log: Path | None = None) -> None:
    """Run a program to its end.

    Args:
        words: program and arguments.
        run: what `_directory` gave.
        log: where the program writes what it does not show.

    Raises:
        RuntimeError: it failed or took too long; has the end of what it wrote.
    """
    with tempfile.TemporaryFile() as shown:
        output = run | {"stdout": shown, "stderr": subprocess.STDOUT}
        try:
            subprocess.run([str(word) for word in words], check=True, timeout=_START_S, **output)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as e:
            shown.seek(0)
            text = shown.read().decode(errors="replace")[-_SHOWN:].strip()
            logged = "" if log is None else f"\n{_end_of(log)}"
            raise RuntimeError(f"{e}\n{text}{logged}") from e


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_SHOWN:] if log.exists() else "no log"
