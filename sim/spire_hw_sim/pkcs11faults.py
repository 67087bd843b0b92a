"""Faults of a PKCS#11 token: a worker whose module's function table was tampered with, as it is told.

A module shows its functions in a table (CK_FUNCTION_LIST) through which python-pkcs11 calls it, too.
Here each entry is replaced by one that notes the call in a file, looks into a plan whether
something is to go wrong, and calls the real function unless that is what goes wrong. The plan may
change at any time; its counts hold over all workers.

    faults = Faults(folder, module)
    manager = pkcs11.build(host, command=faults.command)
    faults.set(Fault("C_Sign", returns=0x30, times=20))
    assert faults.calls("C_Login") == 2

Run as `python -P -m spire_hw_sim.pkcs11faults FOLDER MODULE <parent pid>` in place of the worker.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from spire_hw.pkcs11.device import worker

if TYPE_CHECKING:
    from collections.abc import Callable

# The functions of CK_FUNCTION_LIST in their order, with the numbers of their arguments.
# Spec: PKCS #11 v2.40, header pkcs11f.h.
_TABLE: Final = """
Initialize:1 Finalize:1 GetInfo:1 GetFunctionList:1 GetSlotList:3 GetSlotInfo:2 GetTokenInfo:2
GetMechanismList:3 GetMechanismInfo:3 InitToken:4 InitPIN:3 SetPIN:5 OpenSession:5
CloseSession:1 CloseAllSessions:1 GetSessionInfo:2 GetOperationState:3 SetOperationState:5
Login:4 Logout:1 CreateObject:4 CopyObject:5 DestroyObject:2 GetObjectSize:3
GetAttributeValue:4 SetAttributeValue:4 FindObjectsInit:3 FindObjects:4 FindObjectsFinal:1
EncryptInit:3 Encrypt:5 EncryptUpdate:5 EncryptFinal:3 DecryptInit:3 Decrypt:5 DecryptUpdate:5
DecryptFinal:3 DigestInit:2 Digest:5 DigestUpdate:3 DigestKey:2 DigestFinal:3 SignInit:3
Sign:5 SignUpdate:3 SignFinal:3 SignRecoverInit:3 SignRecover:5 VerifyInit:3 Verify:5
VerifyUpdate:3 VerifyFinal:3 VerifyRecoverInit:3 VerifyRecover:5 DigestEncryptUpdate:5
DecryptDigestUpdate:5 SignEncryptUpdate:5 DecryptVerifyUpdate:5 GenerateKey:5
GenerateKeyPair:8 WrapKey:6 UnwrapKey:8 DeriveKey:6 SeedRandom:3 GenerateRandom:3
GetFunctionStatus:1 CancelFunction:1 WaitForSlotEvent:3
"""
FUNCTIONS: Final = {
    f"C_{name}": int(count) for name, _, count in (one.partition(":") for one in _TABLE.split())
}
_CUSTOM: Final = """
import os, sys
if sys.orig_argv[-2:-1] == ["spire_hw.pkcs11.device.worker"]:
    from pathlib import Path
    from spire_hw_sim import pkcs11faults
    kept = pkcs11faults.tamper(Path(os.environ["FAULTS_FOLDER"]), os.environ["FAULTS_MODULE"])
"""
_WORD: Final = ctypes.sizeof(ctypes.c_ulong)
_PROT_READ_WRITE: Final = 3
_UNAVAILABLE: Final = ctypes.c_ulong(-1).value  # CK_UNAVAILABLE_INFORMATION
_TYPE_INVALID: Final = 0x12
_FLAGS_OFFSET: Final = 32 + 32 + 16 + 16  # in CK_TOKEN_INFO
_MEMORY_OFFSET: Final = _FLAGS_OFFSET + 7 * _WORD


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        function: the function it happens in, such as `C_Sign`.
        skip: calls that go well before, over all workers.
        times: how often it happens then, 0 for ever.
        pid: only in this worker, 0 in all.
        while_exists: only while this file exists, "" always.
        returns: the code it returns, None what the real function returned.
        instead: the real function is not called: what its caller began stays as it is.
        sleep_s: seconds it takes longer; a very long sleep is a hang.
        crash: the process gets this signal, 0 none.
        signature: what C_Sign's output becomes: `flipped`, `zero_r`, `zero_s`, `short`, `random`.
        attributes: what C_GetAttributeValue says: type to hex text, None for unreadable.
        without: mechanisms missing in C_GetMechanismList.
        mechanism: which one C_GetMechanismInfo tells something else about.
        longest: the longest key that it takes, by its words.
        uses: CKF flags of what it is good for; 0 leaves both as they are.
        flags_on: token flags shown set by C_GetTokenInfo.
        flags_off: token flags shown unset.
        memory: total and free memory shown by C_GetTokenInfo, in bytes, of private objects and of
            public ones alike; None leaves it as it is.
        finds_nothing: C_FindObjects gives no object.
    """

    function: str
    skip: int = 0
    times: int = 0
    pid: int = 0
    while_exists: str = ""
    returns: int | None = None
    instead: bool = False
    sleep_s: float = 0.0
    crash: int = 0
    signature: str = ""
    attributes: dict[int, str | None] = field(default_factory=dict)
    without: tuple[int, ...] = ()
    mechanism: int = 0
    longest: int = 0
    uses: int = 0
    flags_on: int = 0
    flags_off: int = 0
    memory: tuple[int, int] | None = None
    finds_nothing: bool = False


class Faults:
    """The plan for workers that share a folder, and their calls."""

    def __init__(self, folder: Path, module: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._module = module
        self._serial = 0
        self.clear()

    @property
    def command(self) -> tuple[str, ...]:
        """Return how a worker is started, see `spire_hw.pkcs11.pool.process.Launch`."""
        start = (sys.executable, "-P", "-m", "spire_hw_sim.pkcs11faults")
        return *start, str(self._folder), self._module

    def environment(self) -> dict[str, str]:
        """Return what workers need in their environment in place of `command`.

        For hosts that are given a configuration and nothing else: Python runs a module of that name
        first thing.
        """
        (self._folder / "sitecustomize.py").write_text(_CUSTOM)
        path = os.pathsep.join((str(self._folder), *filter(None, [os.environ.get("PYTHONPATH")])))
        return {
            "PYTHONPATH": path,
            "FAULTS_FOLDER": str(self._folder),
            "FAULTS_MODULE": self._module,
        }

    def set(self, *faults: Fault) -> None:
        """Replace the plan; counts start anew."""
        unknown = [fault.function for fault in faults if fault.function not in FUNCTIONS]
        if unknown:
            raise ValueError(f"no such function: {', '.join(unknown)}")
        self._serial += 1
        plan = {"serial": self._serial, "faults": [asdict(fault) for fault in faults]}
        fresh = self._folder / "plan.new"
        fresh.write_text(json.dumps(plan))
        fresh.rename(self._folder / "plan")

    def clear(self) -> None:
        """Let everything go well from now on."""
        self.set()

    def calls(self, function: str, pid: int = 0) -> int:
        """Return how often a function was called so far, by one worker or by all."""
        wanted = f"{function} " + (str(pid) if pid else "")
        return sum(line == wanted if pid else line.startswith(wanted) for line in self._lines())

    def _lines(self) -> list[str]:
        log = self._folder / "calls"
        return log.read_text().splitlines() if log.exists() else []


class _Plan:
    """The plan as a worker reads it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "plan"
        self._seen: tuple[int, int] = (0, 0)
        self._serial = 0
        self._faults: list[Fault] = []
        self._calls = os.open(folder / "calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, function: str) -> None:
        os.write(self._calls, f"{function} {os.getpid()}\n".encode())

    def fault_of(self, function: str) -> Fault | None:
        """Return what goes wrong in this call."""
        self._read()
        for number, fault in enumerate(self._faults):
            if fault.function == function and self._applies(number, fault):
                return fault
        return None

    def _read(self) -> None:
        status = self._path.stat()
        seen = status.st_ino, status.st_mtime_ns
        if seen == self._seen:
            return
        plan = json.loads(self._path.read_text())
        self._seen, self._serial = seen, plan["serial"]
        self._faults = [_fault_from(fields) for fields in plan["faults"]]

    def _applies(self, number: int, fault: Fault) -> bool:
        if fault.pid not in {0, os.getpid()}:
            return False
        if fault.while_exists and not Path(fault.while_exists).exists():
            return False
        if not fault.skip and not fault.times:
            return True
        turn = self._turn(f"turn-{self._serial}-{number}")
        return fault.skip <= turn and (not fault.times or turn < fault.skip + fault.times)

    def _turn(self, name: str) -> int:
        """Return how many such calls were made before, by any worker."""
        with (self._folder / name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            turn = file.seek(0, os.SEEK_END)
            file.write(b".")
        return turn


def _fault_from(fields: dict[str, Any]) -> Fault:
    attributes = {int(number): value for number, value in fields.pop("attributes").items()}
    return Fault(**{**fields, "without": tuple(fields["without"])}, attributes=attributes)


def _word_at(address: int) -> ctypes.c_ulong:
    return ctypes.c_ulong.from_address(address)


class _Entry:
    """One function of the table, tampered with."""

    def __init__(self, plan: _Plan, name: str, real: Callable[..., int]) -> None:
        self._plan = plan
        self._name = name
        self._real = real

    def __call__(self, *arguments: int) -> int:
        if self._name == "C_Sign" and not arguments[3]:
            # Only asks how long a signature is: neither counted nor tampered with.
            return self._real(*arguments)
        self._plan.note(self._name)
        fault = self._plan.fault_of(self._name)
        if fault is None:
            return self._real(*arguments)
        if fault.sleep_s:
            time.sleep(fault.sleep_s)
        if fault.crash:
            signal.signal(fault.crash, signal.SIG_DFL) if fault.crash != signal.SIGKILL else None
            os.kill(os.getpid(), fault.crash)
        code = 0 if fault.instead else self._real(*arguments)
        code = self._alter(fault, code, arguments)
        return code if fault.returns is None else fault.returns

    def _alter(self, fault: Fault, code: int, arguments: tuple[int, ...]) -> int:
        if fault.attributes:
            return _alter_attributes(fault, code, *arguments[2:4])
        if code != 0:
            return code
        if fault.signature:
            _alter_signature(fault.signature, *arguments[3:5])
        if fault.without and arguments[1]:
            _drop_mechanisms(fault.without, *arguments[1:3])
        if fault.uses and arguments[1] == fault.mechanism:
            # CK_MECHANISM_INFO: shortest key, longest key, flags.
            _word_at(arguments[2] + _WORD).value = fault.longest
            _word_at(arguments[2] + 2 * _WORD).value = fault.uses
        if fault.flags_on or fault.flags_off:
            flags = _word_at(arguments[1] + _FLAGS_OFFSET)
            flags.value = (flags.value | fault.flags_on) & ~fault.flags_off
        if fault.memory is not None:
            for number, value in enumerate(2 * fault.memory):
                _word_at(arguments[1] + _MEMORY_OFFSET + number * _WORD).value = value
        if fault.finds_nothing:
            _word_at(arguments[3]).value = 0
        return code


def _alter_signature(how: str, output: int, length_at: int) -> None:
    length = _word_at(length_at)
    size = length.value
    if how == "flipped":
        last = ctypes.c_ubyte.from_address(output + size - 1)
        last.value ^= 1
    elif how in {"zero_r", "zero_s"}:
        start = 0 if how == "zero_r" else size // 2
        ctypes.memset(output + start, 0, size // 2)
    elif how == "short":
        length.value = size - 1
    elif how == "random":
        ctypes.memmove(output, os.urandom(size), size)
    else:
        raise ValueError(f"no such alteration: {how}")


def _alter_attributes(fault: Fault, code: int, template: int, count: int) -> int:
    for number in range(count):
        # CK_ATTRIBUTE: type, address of the value, its length.
        at = template + 3 * _WORD * number
        kind, value, length = (_word_at(at + _WORD * n) for n in range(3))
        if kind.value not in fault.attributes:
            continue
        wanted = fault.attributes[kind.value]
        if wanted is None:
            length.value, code = _UNAVAILABLE, _TYPE_INVALID
            continue
        content = bytes.fromhex(wanted)
        if value.value:
            ctypes.memmove(value.value, content, min(len(content), length.value))
        length.value = len(content)
    return code


def _drop_mechanisms(dropped: tuple[int, ...], listed: int, count_at: int) -> None:
    count = _word_at(count_at)
    kept = [_word_at(listed + _WORD * n).value for n in range(count.value)]
    kept = [mechanism for mechanism in kept if mechanism not in dropped]
    for n, mechanism in enumerate(kept):
        _word_at(listed + _WORD * n).value = mechanism
    count.value = len(kept)


def tamper(folder: Path, module: str) -> list[object]:
    """Replace the entries of a module's table; what is returned must stay alive."""
    plan = _Plan(folder)
    table = ctypes.c_void_p()
    library = ctypes.CDLL(module)
    if library.C_GetFunctionList(ctypes.byref(table)) != 0 or table.value is None:
        raise SystemExit(f"{module} shows no functions")
    # CK_VERSION is two bytes, padded to the size of a pointer, in front of the entries.
    first = table.value + _WORD
    _make_writable(first, _WORD * len(FUNCTIONS))
    kept: list[object] = [library]
    for number, (name, count) in enumerate(FUNCTIONS.items()):
        entry = _word_at(first + _WORD * number)
        if not entry.value:
            continue
        shape = ctypes.CFUNCTYPE(ctypes.c_ulong, *([ctypes.c_size_t] * count))
        ours = shape(_Entry(plan, name, shape(entry.value)))
        kept.append(ours)
        entry.value = ctypes.cast(ours, ctypes.c_void_p).value or 0
    return kept


def _make_writable(address: int, size: int) -> None:
    page = os.sysconf("SC_PAGESIZE")
    start = address // page * page
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.mprotect(
            ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), _PROT_READ_WRITE
        )
        != 0
    ):
        raise SystemExit(f"mprotect failed: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Tamper, then be a worker."""
    folder, module = Path(sys.argv[1]), sys.argv[2]
    kept = tamper(folder, module)
    sys.argv[1:3] = []
    worker.main()
    kept.clear()


if __name__ == "__main__":
    main()
