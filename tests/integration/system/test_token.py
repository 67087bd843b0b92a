"""An operator's mishaps with the token: PINs, labels, modules, a token that goes away or hangs."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw_sim.site import TOKEN, free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from spire_hw_sim.site import Node, Run, Site

MINT = ("x509", "mint", "-spiffeID", "spiffe://site.example/m")


def workers(site: Site) -> list[psutil.Process]:
    """Return the processes that hold the token, once it is in use."""
    mint_soon(site)
    return [c for c in site.server.children() if "resource_tracker" not in " ".join(c.cmdline())]


def mint_soon(site: Site, timeout_s: float = 60) -> None:
    """Check that the server issues again before long."""
    wait_until("it issues", lambda: site.try_command(*MINT).returncode == 0, timeout_s)


def replacing(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """Return a change of a configuration's text; every old text has to be there."""

    def change(text: str) -> str:
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        return text

    return change


def refused(run: Run, status: int, *words: str) -> None:
    """Check that a program ended with a message an operator can act on."""
    assert run.program.wait_for_exit(30) == status, run.log()
    log = run.log()
    assert "Traceback" not in log
    (said,) = re.findall(r"^Error: (.*)$", log, re.MULTILINE)
    for word in words:
        assert word in said, said
    assert "level=error" in log


def test_what_is_wrong_with_token_pin_or_module_is_told_at_start(site: Site) -> None:
    for label in ("twin", "twin"):
        site.hsm.init_token(label, "1111")
    site.hsm.init_token("spare", "2222")
    readable, empty, wrong = (site.directory / n for n in ("readable", "empty", "wrong"))
    for path, content, mode in ((readable, "1", 0o644), (empty, "", 0o600), (wrong, "9", 0o600)):
        path.write_text(content)
        path.chmod(mode)
    missing, junk = site.directory / "missing", site.directory / "junk.so"
    junk.write_text("no library")
    pin, label, module = str(site.pin_file), f'"{TOKEN}"', site.hsm.module
    cases: list[tuple[Callable[[str], str], int, tuple[str, ...]]] = [
        (replacing((pin, str(missing))), 1, (str(missing), "No such file", "name another file")),
        (replacing((pin, str(readable))), 1, (str(readable), "mode 0644", "use 0600")),
        (replacing((pin, str(empty))), 1, (str(empty), "is empty")),
        (replacing((pin, str(wrong)), (label, '"spare"')), 1, ("PIN refused", "spare", "correct")),
        (replacing((label, '"spire-cax"')), 3, ('"spire-cax"', "tokens seen", label)),
        (replacing((label, '"twin"')), 1, ('"twin"', "ambiguous", "token_serial")),
        (replacing((module, "/usr/lib/none.so")), 1, ("/usr/lib/none.so", "module_path")),
        (replacing((module, str(junk))), 1, (str(junk), "not a shared library")),
    ]

    def try_one(number: int) -> None:
        change, status, words = cases[number]
        run = site.spare_server(f"t{number}", change)
        refused(run, status, *words)

    with ThreadPoolExecutor(2) as two:
        list(two.map(try_one, range(len(cases))))


@pytest.mark.asyncio
async def test_a_token_that_is_away_stops_no_server_and_is_used_again(
    site: Site, node: Node
) -> None:
    ids, keys = await site.authorities(), site.private_keys()
    holders = workers(site)
    after = len(site.server.log())
    site.hsm.remove()
    try:
        for child in holders:
            child.kill()
        site.server.wait_for("hsm.token_missing|hsm.general_error", after=after)
        failed = site.try_command(*MINT)
        assert failed.returncode == 3, failed.stderr
        assert "look at the device" in failed.stderr
        assert "Traceback" not in failed.stderr + site.server.log()[after:]
        assert site.command("entry", "count")
        assert await node.fetch()
    finally:
        site.hsm.put_back()
    mint_soon(site)
    assert (await site.authorities(), site.private_keys()) == (ids, keys)


@pytest.mark.asyncio
async def test_a_server_started_without_its_token_makes_no_other_ca(site: Site) -> None:
    ids, keys = await site.authorities(), site.private_keys()
    site.server.stop()
    site.hsm.remove()
    site.hsm.token_dir.mkdir()
    try:
        refused(site.start_server(), 3, TOKEN, "not present")
    finally:
        site.hsm.token_dir.rmdir()
        site.hsm.put_back()
    site.start_server()
    site.wait_ready()
    assert (await site.authorities(), site.private_keys()) == (ids, keys)


@pytest.mark.asyncio
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
async def test_workers_that_hang_or_die_while_issuing_are_replaced(
    site: Site, number: signal.Signals
) -> None:
    after = len(site.server.log())
    for child in workers(site):
        child.send_signal(number)
    mint_soon(site)
    site.server.wait_for("hsm.worker_(hung|died)", after=after)
    assert "Traceback" not in site.server.log()


def test_a_pin_file_that_changes_while_running_harms_only_the_next_login(site: Site) -> None:
    after = len(site.server.log())
    site.write_pin("00000000")
    try:
        for child in workers(site):
            child.kill()
        site.server.wait_for("hsm.pin_incorrect", after=after)
        # The first answers may still be those of the workers that were killed.
        wait_until(
            "signing is refused for the PIN",
            lambda: "PIN refused" in site.try_command(*MINT).stderr,
            20,
        )
        assert site.try_command(*MINT).returncode == 1
    finally:
        site.write_pin(site.pin)
    mint_soon(site)
    assert site.server.log()[after:].count("msg=hsm.pin_incorrect") <= 2


def test_sigterm_ends_a_server_whose_token_hangs(site: Site) -> None:
    for child in workers(site):
        child.send_signal(signal.SIGSTOP)
    children = site.server.children()
    assert site.server.stop(10) == 0
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


def test_sigterm_ends_a_server_that_waits_for_its_token(site: Site) -> None:
    change = replacing((f'"{TOKEN}"', '"absent"'), ('"2s"', '"1m"'))
    run = site.spare_server("waits", change)
    run.wait_for("hsm.token_missing")
    assert run.stop(10) == 0
    assert "Traceback" not in run.log()


def test_addresses_and_directories_in_use_are_told(site: Site) -> None:
    def port(text: str) -> str:
        return re.sub(r"bind_port    = \d+", f"bind_port = {site.port}", text)

    def data(text: str) -> str:
        return re.sub(r'data_dir     = "[^"]+"', f'data_dir = "{site.data}"', text)

    def long(text: str) -> str:
        return re.sub(r'socket_path  = "[^"]+"', f'socket_path = "/{"x" * 120}"', text)

    def other_id(change: Callable[[str], str]) -> Callable[[str], str]:
        return lambda text: change(text).replace('"site"', f'"s{free_port()}"')

    refused(
        site.spare_server("u1", other_id(port)),
        3,
        str(site.port),
        "in use",
        "set another bind_port",
    )
    refused(site.spare_server("u2", data), 3, str(site.data), "another server", "stop it")
    long_path = site.spare_server("u3", long)
    assert long_path.program.wait_for_exit(20) == 1
    assert "107 bytes" in long_path.log()
    assert os.path.exists(site.socket)  # noqa: PTH110 - asked of the running server's socket
