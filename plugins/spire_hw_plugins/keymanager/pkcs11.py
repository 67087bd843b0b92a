"""KeyManager `pkcs11`: keys made in a PKCS#11 token, which they never leave.

Configuration (`plugin_data`), with one of the three ways to name the token:

    module_path  = "/usr/lib/softhsm/libsofthsm2.so"
    token_label  = "spire"            # and/or
    token_serial = "a6348d0fc6c98df7" # or
    uri          = "pkcs11:token=spire;serial=a6348d0fc6c98df7?pin-source=file:/etc/spire-hw/pin"
    pin_file     = "/etc/spire-hw/pin"   # or pin_env, or the URI's pin-source
    key_identifier_file  = "/var/lib/spire-hw/key_id"   # or key_identifier_value

Workers inherit the host's environment without `pin_env`; the `environment` block adds to it, for
modules that are set up that way (SOFTHSM2_CONF, P11_KIT_SERVER_ADDRESS, ...).
"""

from __future__ import annotations

import asyncio
import secrets
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.config.schema import decode, faults
from spire_hw.errors import ConfigError, NotReadyError
from spire_hw.files import NoFileError, create_file, read_bounded
from spire_hw.pkcs11.budget import Allowance
from spire_hw.pkcs11.keyring import Keyring, info_of
from spire_hw.pkcs11.labels import Owner
from spire_hw.pkcs11.place import Pins, opening_of
from spire_hw.pkcs11.policy import Policy
from spire_hw.pkcs11.pool import Limits, Pool
from spire_hw.pkcs11.process import WORKER
from spire_hw.pkcs11.state import StateFile
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth
from spire_hw_plugins.keymanager.pkcs11_config import Config, Settings, is_identifier, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature, RetainedKey

NAME: Final = "pkcs11"
_IDENTIFIER_FILE: Final = "pkcs11-key-identifier"
_MAX_IDENTIFIER_FILE_BYTES: Final = 4096


class Pkcs11KeyManager:
    """The KeyManager contract over one token.

    Also offers `KeyEvidenceSource`, `KeyRetention` and `KeyHealthSource`.

    Attributes:
        verifies: signatures are verified apart from the process that holds the token's library.
    """

    verifies = True

    def __init__(self, host: HostInfo, command: Sequence[str] = WORKER) -> None:
        self._host = host
        self._command = command
        self._instance = secrets.token_hex(16)
        self._pool: Pool | None = None
        self._keyring: Keyring | None = None
        self._pins = Pins()

    def validate(self, config: Body) -> list[ConfigFault]:
        """Return the faults of a configuration without touching token or PIN."""
        found = faults(config, Config)
        return found or settings_of(decode(config, Config))[1]

    async def configure(self, config: Body) -> None:
        """Open the token and prove its keys; a failure leaves an earlier configuration serving.

        Raises:
            ConfigError: the configuration has faults.
            InvalidInputError: the module may not be loaded.
            TokenError: token, PIN or keys are not what they have to be.
        """
        raw = decode(config, Config)
        settings, found = settings_of(raw)
        if settings is None:
            raise ConfigError(config.file or NAME, found)
        owner = await asyncio.to_thread(self._owner, raw)
        guard = self._pins.guard(settings.place)
        opening = await opening_of(settings.place, guard, self._command)
        pool = Pool(opening, _limits(raw), self._host.log, self._host.metrics)
        facts = await pool.start()
        keyring = Keyring(
            pool,
            owner,
            StateFile(self._host.data_dir, owner),
            policy=_policy(raw, settings),
            instance=self._instance,
            clock=self._host.clock,
            log=self._host.log,
        )
        try:
            await keyring.open()
        except BaseException:
            await _close(keyring, pool)
            raise
        old_keyring, old_pool = self._keyring, self._pool
        self._keyring, self._pool = keyring, pool
        self._host.log.info("hsm is open", hsm=facts.device)
        if old_keyring is not None and old_pool is not None:
            await _close(old_keyring, old_pool)

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key in the token."""
        if self._keyring is None:
            raise NotReadyError("failed to generate key: not configured")
        return await self._keyring.generate(key_id, key_type)

    async def get_public_key(self, key_id: str) -> KeyInfo:
        """Return one key."""
        return info_of(self._ready().get(key_id))

    async def get_public_keys(self) -> list[KeyInfo]:
        """Return all keys, oldest first, after asking the token."""
        return [info_of(entry) for entry in await self._ready().all()]

    async def sign_data(self, key_id: str, digest: bytes, options: SignOptions) -> KeySignature:
        """Have the token sign a digest; the signature is verified before it is returned."""
        return await self._ready().sign(key_id, digest, options)

    async def key_evidence(self, key_id: str) -> KeyEvidence:
        """Return where a key is and what the token says about it now."""
        return await self._ready().evidence(key_id)

    def key_health(self) -> DeviceHealth:
        """Return how well the keys can be used, as last seen."""
        if self._keyring is None:
            return DeviceHealth(KeyHealth.DOWN, "hsm.not_configured", "not configured")
        return self._keyring.health()

    async def retained_keys(self) -> list[RetainedKey]:
        """Return the replaced keys that are kept, oldest first."""
        return self._ready().retained()

    async def restore_key(self, key_id: str, generation: int) -> KeyInfo:
        """Make a replaced key current again."""
        return await self._ready().restore(key_id, generation)

    async def destroy_retained(self, key_id: str, generation: int) -> None:
        """Destroy a replaced key before its time."""
        await self._ready().destroy_retained(key_id, generation)

    async def close(self) -> None:
        """Log out and end the workers."""
        keyring, pool = self._keyring, self._pool
        self._keyring = self._pool = None
        if keyring is not None and pool is not None:
            await _close(keyring, pool)

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers, for operators' eyes."""
        return [] if self._pool is None else self._pool.worker_pids

    def _ready(self) -> Keyring:
        if self._keyring is None:
            raise NotReadyError("not configured")
        return self._keyring

    def _owner(self, config: Config) -> Owner:
        # Both sides of one machine may share a token: an agent's keys are never a server's.
        identifier = config.key_identifier_value or self._identifier_from_file(config)
        side = "" if self._host.side is Side.SERVER else "agent:"
        return Owner(self._host.trust_domain.name, side + identifier)

    def _identifier_from_file(self, config: Config) -> str:
        named = config.key_identifier_file
        path = Path(named) if named is not None else self._host.data_dir / _IDENTIFIER_FILE
        try:
            content = read_bounded(path, _MAX_IDENTIFIER_FILE_BYTES, "key identifier file")
            identifier = content.decode("ascii").strip()
        except NoFileError:
            identifier = str(uuid.uuid4())
            create_file(path, identifier.encode("ascii"), "key identifier file")
        except UnicodeDecodeError as e:
            raise NotReadyError(f"key identifier file {path} does not hold an identifier") from e
        if not is_identifier(identifier):
            raise NotReadyError(f"key identifier file {path} does not hold an identifier")
        return identifier


def _limits(config: Config) -> Limits:
    return Limits(
        workers=config.workers,
        queue=config.queue,
        start_s=config.start_timeout.total_seconds(),
        sign_s=config.sign_timeout.total_seconds(),
        generate_s=config.generate_timeout.total_seconds(),
        probe_s=config.probe_interval.total_seconds(),
    )


def _policy(config: Config, settings: Settings) -> Policy:
    return Policy(
        key_types=settings.key_types,
        accept_token=config.accept_token,
        accept_key_loss=config.accept_key_loss,
        accept_weak_keys=frozenset(config.accept_weak_keys),
        retain_replaced_s=config.retain_replaced.total_seconds(),
        imports=settings.imports,
        allowance=Allowance(config.generations_per_day, config.generation_burst),
    )


async def _close(keyring: Keyring, pool: Pool) -> None:
    await pool.close()
    await keyring.close()


def build(host: HostInfo, command: Sequence[str] = WORKER) -> Pkcs11KeyManager:
    """Make the plugin; command starts its workers, see `spire_hw.pkcs11.process.Launch`."""
    return Pkcs11KeyManager(host, command)
