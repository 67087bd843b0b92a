"""A SoftHSM store of its own: tokens that live in one directory and touch no other.

SoftHSM finds its store through `SOFTHSM2_CONF`, so whoever loads the module needs `environment`
(the pkcs11 key manager takes it as a block of that name).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

_MODULES: Final = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)


class SoftHsm:
    """A store below `state_dir`.

    Attributes:
        conf: path of its softhsm2.conf.
        token_dir: where SoftHSM keeps the tokens; rename it and they are gone.
    """

    def __init__(self, state_dir: Path) -> None:
        self.token_dir = state_dir / "tokens"
        self.token_dir.mkdir(parents=True, exist_ok=True)
        self.conf = state_dir / "softhsm2.conf"
        self.conf.write_text(
            f"directories.tokendir = {self.token_dir}\n"
            "objectstore.backend = file\n"
            "log.level = ERROR\n"
            "slots.removable = false\n"
        )

    @staticmethod
    def find_module() -> str | None:
        """Return the path of SoftHSM's module, None when it is not installed."""
        if shutil.which("softhsm2-util") is None:
            return None
        return next((path for path in _MODULES if Path(path).exists()), None)

    @property
    def module(self) -> str:
        """Return the path of SoftHSM's module.

        Raises:
            FileNotFoundError: it is not installed.
        """
        found = self.find_module()
        if found is None:
            raise FileNotFoundError("SoftHSM is not installed (Debian package softhsm2)")
        return found

    @property
    def environment(self) -> dict[str, str]:
        """Return what the loader of the module needs in its environment."""
        return {"SOFTHSM2_CONF": str(self.conf)}

    def init_token(self, label: str, pin: str = "1234", so_pin: str = "12345678") -> str:
        """Make a token and return its serial number."""
        before = self.serials()
        command = ["softhsm2-util", "--init-token", "--free", "--label", label]
        command += ["--pin", pin, "--so-pin", so_pin]
        subprocess.run(
            command, env={**os.environ, **self.environment}, check=True, capture_output=True
        )
        return next(iter(self.serials() - before))

    def serials(self) -> set[str]:
        """Return the serial numbers of the tokens there are."""
        command = ["softhsm2-util", "--show-slots"]
        shown = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            check=True,
            capture_output=True,
            text=True,
        )
        found = set()
        for line in shown.stdout.splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "Serial number" and value.strip():
                found.add(value.strip())
        return found

    def remove(self) -> None:
        """Take every token away, as if the device had been unplugged."""
        self.token_dir.rename(self._away)

    def put_back(self) -> None:
        """Undo `remove`."""
        self._away.rename(self.token_dir)

    @property
    def _away(self) -> Path:
        return self.token_dir.with_name("tokens.away")
