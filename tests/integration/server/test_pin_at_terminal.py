"""PINs that somebody enters at the terminal: programs on terminals of their own, tokens of SoftHSM."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil
import pytest

from spire_hw_sim.programs import Program, command_line
from spire_hw_sim.servers import server_config
from spire_hw_sim.softhsm import SoftHsm
from spire_hw_sim.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.hsm,
    pytest.mark.slow,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
PIN = "entered-4711"
QUESTION = 'PIN of token "ca": '
_ASK = """
import asyncio, sys
from spire_hw.aio.terminal import ask_hidden
from spire_hw.errors import SpireHwError
async def main():
    ticks = asyncio.create_task(asyncio.sleep(0))
    print("got", len(await ask_hidden("Word", float(sys.argv[1]))), ticks.done())
try:
    asyncio.run(main())
except SpireHwError as e:
    sys.exit(e.message)
"""


def asking(limit_s: float = 30) -> Terminal:
    return Terminal(sys.executable, [sys.executable, "-c", _ASK, str(limit_s)])


def test_what_is_entered_is_not_shown_and_the_loop_goes_on() -> None:
    with asking() as terminal:
        assert terminal.shows_keys
        terminal.see("Word: ")
        assert not terminal.shows_keys
        terminal.type("secret word\n")
        terminal.see("got 11 True")
        assert terminal.end() == 0
        assert terminal.shows_keys
        assert "secret" not in terminal.screen


@pytest.mark.parametrize(
    ("keys", "limit_s", "message"),
    [("\x04", 30, "terminal was closed"), ("", 0.2, "nobody answered at the terminal for 0.2 s")],
)
def test_no_answer_is_an_error(keys: str, limit_s: float, message: str) -> None:
    with asking(limit_s) as terminal:
        terminal.see("Word: ")
        terminal.type(keys)
        assert terminal.end() == 1
        assert message in terminal.screen
        assert terminal.shows_keys


def test_ctrl_c_ends_the_program_and_leaves_the_terminal_as_it_was() -> None:
    with asking() as terminal:
        terminal.see("Word: ")
        terminal.type("half\x03")
        assert terminal.end() != 0
        assert "KeyboardInterrupt" in terminal.screen
        assert terminal.shows_keys


def test_keys_that_stop_a_program_are_part_of_the_answer() -> None:
    # A shell would show what is typed after `fg`.
    with asking() as terminal:
        terminal.see("Word: ")
        terminal.type("a\x1a\x1c\x13b\n")
        terminal.see("got 5 True")
        assert terminal.end() == 0


def test_sigterm_leaves_the_terminal_as_it_was() -> None:
    with asking() as terminal:
        terminal.see("Word: ")
        terminal.terminate()
        assert terminal.end() == -signal.SIGTERM
        assert terminal.shows_keys


def test_the_background_of_a_terminal_asks_nobody() -> None:
    # A shell that puts it there has the terminal itself.
    command = ["/bin/sh", "-mc", '"$@" & wait $!', "sh", sys.executable, "-c", _ASK, "30"]
    with Terminal(sys.executable, command) as terminal:
        assert terminal.end() == 1
        assert "runs in the background of its terminal" in terminal.screen


class Site:
    """A server whose CA's token has its PIN from the terminal."""

    def __init__(self, folder: Path) -> None:
        self.hsm = SoftHsm(folder / "hsm")
        self.hsm.init_token("ca", pin=PIN)
        plugin = f"""KeyManager "pkcs11" {{ plugin_data {{
          module_path = "{self.hsm.module}"
          token_label = "ca"
          pin_prompt = true
          key_identifier_value = "server-1"
          environment {{ SOFTHSM2_CONF = "{self.hsm.conf}" }}
        }} }}"""
        text = server_config(folder, key_manager="memory")
        text = text.replace('KeyManager "memory" { plugin_data {  } }', plugin)
        assert "pin_prompt" in text
        self.config = folder / "server.conf"
        self.config.write_text(text)

    def command(self, *words: str) -> list[str]:
        return command_line("spire-hw-server", *words, "-config", self.config)

    def run(self) -> Terminal:
        return Terminal(sys.executable, self.command("run"))


def workers(terminal: Terminal) -> set[int]:
    """Return the processes that hold a token for a program."""
    found = set()
    for child in psutil.Process(terminal.pid).children(recursive=True):
        with suppress(psutil.Error):  # ended meanwhile
            if any("pkcs11" in word for word in child.cmdline()):
                found.add(child.pid)
    return found


def test_a_server_asks_once_and_uses_it_for_every_worker(short_dir: Path) -> None:
    site = Site(short_dir)
    with site.run() as terminal:
        terminal.see(QUESTION)
        terminal.type(f"{PIN}\n")
        terminal.see("server is ready")
        before = workers(terminal)
        assert before
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while len(workers(terminal) - before) < len(before):
            assert time.monotonic() < deadline, terminal.screen
            time.sleep(0.1)
        terminal.terminate()
        assert terminal.end() == 0
        assert terminal.screen.count(QUESTION) == 1
        assert PIN not in terminal.screen


def test_fault_16_a_wrong_pin_is_sent_once_and_nobody_is_asked_again(short_dir: Path) -> None:
    site = Site(short_dir)
    with site.run() as terminal:
        terminal.see(QUESTION)
        terminal.type("wrong-9999\n")
        assert terminal.end() != 0
        assert "hsm.pin_incorrect" in terminal.screen
        assert terminal.screen.count(QUESTION) == 1
        assert "wrong-9999" not in terminal.screen


@pytest.mark.parametrize(
    ("keys", "why"),
    [("\x04", "terminal was closed"), ("\n", "nothing was entered"), ("12\x1b[A\n", "arrows")],
)
def test_who_enters_no_pin_is_not_asked_again_and_nothing_is_sent(
    short_dir: Path, keys: str, why: str
) -> None:
    with Site(short_dir).run() as terminal:
        terminal.see(QUESTION)
        terminal.type(keys)
        assert terminal.end() != 0
        assert why in terminal.screen
        assert "set pin_file" in terminal.screen
        assert terminal.screen.count(QUESTION) == 1
        assert "pin_incorrect" not in terminal.screen


def test_ctrl_c_at_the_question_ends_a_server(short_dir: Path) -> None:
    with Site(short_dir).run() as terminal:
        terminal.see(QUESTION)
        terminal.type("\x03")
        terminal.end()
        assert terminal.shows_keys
        assert "Traceback" not in terminal.screen


def test_a_service_has_no_terminal_and_says_so(short_dir: Path) -> None:
    site = Site(short_dir)
    ran = Program("spire-hw-server", ["run", "-config", site.config], short_dir / "log")
    assert ran.wait_for_exit() != 0
    assert "the program was not started from a terminal" in ran.log_text()
    assert "or set pin_file" in ran.log_text()


def test_the_doctor_asks_when_it_is_told_to_log_in(short_dir: Path) -> None:
    site = Site(short_dir)
    with Terminal(sys.executable, site.command("doctor", "-output", "json")) as terminal:
        terminal.end()
        assert "the PIN is asked for at the terminal when the program starts" in terminal.screen
        assert QUESTION not in terminal.screen
    with Terminal(sys.executable, site.command("doctor", "-login", "-output", "json")) as terminal:
        terminal.see(QUESTION)
        terminal.type(f"{PIN}\n")
        terminal.end()
        assert "logged in to ca/" in terminal.screen
