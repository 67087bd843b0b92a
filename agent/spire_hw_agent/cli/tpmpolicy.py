"""Approvals: which states of a machine its PCR-bound keys may be used in."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from spire_hw.cli.files import read_input, write_output
from spire_hw.cli.flags import GoGroup, flag
from spire_hw.keyfile import load_private_key
from spire_hw.tpm.pcrpolicy import approve, encode_values, parse_values, pcr_policy
from spire_hw.tpm.wire import BANKS, PCR_COUNT, PcrSelection
from spire_hw_agent.cli.tpm import Chosen, tpm_flags

_MAX_FILE_BYTES: Final = 64 * 1024
_DEFAULT_PCRS: Final = "sha256:0,2,4,7"


@click.group("policy", cls=GoGroup)
def group() -> None:
    """Approve the states of a machine that PCR-bound keys may be used in."""


@group.command(
    "read",
    examples="""
    spire-hw-agent tpm policy read > web-1.json
    spire-hw-agent tpm policy read -pcrs sha256:0,2,4,7,14 -out web-1.json
    """,
)
@flag("pcrs", "Bank and PCRs, as in the KeyManager's policy_pcrs.", default=_DEFAULT_PCRS)
@flag("out", "File to write; standard output when unset.", default="")
@tpm_flags
def read(chosen: Chosen, pcrs: str, out: str) -> None:
    """Write down the PCR values this machine has now, for somebody to approve."""
    from spire_hw.tpm.attest import read_pcrs  # noqa: PLC0415 - loads libtss2

    selection = parse_pcrs(pcrs)
    values = chosen.run("read PCRs", lambda c: read_pcrs(c, selection))
    _write(out, encode_values({selection.bank: values}))


@group.command(
    "approve",
    examples="""
    spire-hw-agent tpm policy approve -in web-1.json -key authority.key -out kernel-6.1.json
    """,
)
@flag("in", "PCR values to approve, as `tpm policy read` writes them.", default="", dest="source")
@flag("key", "PEM file with the policy authority's private key, EC or RSA.", default="")
@flag("ref", "What the approval is for: the KeyManager's policy_ref.", default="")
@flag("comment", "Free text kept in the approval, such as the kernel's version.", default="")
@flag("out", "File to write; standard output when unset.", default="")
def approve_(source: str, key: str, ref: str, comment: str, out: str) -> None:
    """Sign an approval of PCR values; needs no TPM, so it is done where the key is."""
    if not source or not key:
        raise click.UsageError("-in and -key are required")
    values = parse_values(read_input(source, _MAX_FILE_BYTES))
    made = approve(
        load_private_key(Path(key), pipes=True), pcr_policy(values), ref.encode(), comment
    )
    _write(out, made.encode())


def parse_pcrs(text: str) -> PcrSelection:
    """Read `sha256:0,2,4,7`.

    Raises:
        UsageError: unknown bank, or no PCR numbers.
    """
    bank, _, numbers = text.partition(":")
    parts = numbers.split(",")
    if bank not in BANKS or not all(p.isascii() and p.isdecimal() for p in parts):
        raise click.UsageError(f'"{text[:80]}" is not a bank with PCRs, such as {_DEFAULT_PCRS}')
    found = {int(p[:4]) for p in parts}
    if max(found) >= PCR_COUNT:
        raise click.UsageError(f"PCRs are 0 to {PCR_COUNT - 1}")
    return PcrSelection(bank, tuple(sorted(found)))


def _write(out: str, content: bytes) -> None:
    if not out:
        click.echo(content, nl=False)
        return
    write_output(out, content)
