"""KeyManager `pkcs11`: keys made in a PKCS#11 token, which they never leave.

Configuration (`plugin_data`), with one of the three ways to name the token:

    module_path  = "/usr/lib/softhsm/libsofthsm2.so"
    token_label  = "spire"            # and/or
    token_serial = "a6348d0fc6c98df7" # or
    uri          = "pkcs11:token=spire;serial=a6348d0fc6c98df7?pin-source=file:/etc/spire-hw/pin"
    pin_file     = "/etc/spire-hw/pin"   # or pin_env, pin_prompt, protected_login, pin-source
    key_identifier_file  = "/var/lib/spire-hw/key_id"   # or key_identifier_value

or with several tokens, each with its own settings of the first five lines:

    mode = "same_keys"           # or "spread", where devices cannot share keys
    token "a" { module_path = ...  token_label = ...  pin_file = ... }
    token "b" { ... }

Workers inherit the host's environment without `pin_env`; the `environment` block adds to it, for
modules that are set up that way (SOFTHSM2_CONF, P11_KIT_SERVER_ADDRESS, ...).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spire_hw.bootid import read_boot_id
from spire_hw.config.schema import decode, faults
from spire_hw.errors import ConfigError, NotReadyError
from spire_hw.files import NoFileError, create_file, read_bounded
from spire_hw.pkcs11.cluster.cluster import Cluster
from spire_hw.pkcs11.cluster.member import Member, Open
from spire_hw.pkcs11.cluster.notes import Notes
from spire_hw.pkcs11.inventory.labels import Owner
from spire_hw.pkcs11.keyring.budget import Allowance
from spire_hw.pkcs11.keyring.keyring import Keyring, info_of
from spire_hw.pkcs11.keyring.policy import Policy
from spire_hw.pkcs11.keyring.state import StateFile
from spire_hw.pkcs11.pool.place import Pins, opening_of
from spire_hw.pkcs11.pool.pool import Limits, Pool
from spire_hw.pkcs11.pool.process import WORKER
from spire_hw.plugin.info import HostInfo, Side
from spire_hw.plugin.keymanager import DeviceHealth, KeyHealth
from spire_hw_plugins.keymanager.pkcs11_config import (
    Config,
    Settings,
    TokenSettings,
    is_identifier,
    settings_of,
)
from spire_hw_plugins.keymanager.pkcs11_shared import opened, token_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from spire_hw.config.hcl import Body
    from spire_hw.errors import ConfigFault
    from spire_hw.key import KeyType, SignOptions
    from spire_hw.pkcs11.cluster.placement import Mode
    from spire_hw.pkcs11.inventory.reaping import SharedToken
    from spire_hw.plugin.keymanager import KeyEvidence, KeyInfo, KeySignature, RetainedKey

NAME: Final = "pkcs11"
_IDENTIFIER_FILE: Final = "pkcs11-key-identifier"
_MAX_IDENTIFIER_FILE_BYTES: Final = 4096


class Pkcs11KeyManager:
    """The KeyManager contract over one token, or over several.

    Also offers `KeyEvidenceSource`, `KeyRetention`, `KeyHealthSource`, `KeyFallback` and
    `SharedTokenSource`.

    Attributes:
        verifies: signatures are verified apart from the process that holds the token's library.
    """

    verifies = True

    def __init__(
        self, host: HostInfo, command: Sequence[str] = WORKER, pins: Pins | None = None
    ) -> None:
        self._host = host
        self._command = command
        self._instance = secrets.token_hex(16)
        self._pool: Pool | None = None
        self._keyring: Keyring | None = None
        self._cluster: Cluster | None = None
        self._pins = pins or Pins()

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
        before = (self._keyring, self._pool, self._cluster)
        if settings.mode is None:
            file = StateFile(self._host.data_dir, owner)
            one = await self._open(raw, settings, settings.tokens[0], file)
            self._keyring, self._pool, self._cluster = one.keyring, one.pool, None
            self._host.log.info("hsm is open", hsm=one.pool.facts.device)
        else:
            cluster = await self._cluster_of(raw, settings, settings.mode, owner)
            await cluster.open()
            self._keyring, self._pool, self._cluster = None, None, cluster
            self._host.log.info("hsms are open", hsms=[t.name for t in settings.tokens])
        await _close(*before)

    async def _open(
        self,
        config: Config,
        settings: Settings,
        token: TokenSettings,
        file: StateFile,
        key_ids: Collection[str] = (),
    ) -> Open:
        guard = self._pins.guard(token.place)
        opening = await opening_of(token.place, guard, self._command)
        limits = _limits(config, len(settings.tokens))
        pool = Pool(opening, limits, self._host.log, self._host.metrics)
        await pool.start()
        keyring = Keyring(
            pool,
            file.owner,
            file,
            policy=_policy(config, settings, token),
            instance=self._instance,
            place=await asyncio.to_thread(_place_of, self._host),
            clock=self._host.clock,
            log=self._host.log,
            key_ids=key_ids,
        )
        try:
            await keyring.open()
        except BaseException:
            await _close(keyring, pool, None)
            raise
        return Open(pool, keyring)

    async def _cluster_of(
        self, config: Config, settings: Settings, mode: Mode, owner: Owner
    ) -> Cluster:
        notes = Notes(self._host.data_dir, owner)
        members = []
        for token in settings.tokens:
            file = await asyncio.to_thread(notes.of, token.name, token.place.token)
            opener = partial(self._open, config, settings, token, file)
            members.append(
                Member(
                    token.name,
                    owner,
                    file,
                    opener,
                    reopen_s=config.probe_interval.total_seconds(),
                    clock=self._host.clock,
                    log=self._host.log,
                )
            )
        names = {token.name for token in settings.tokens}
        return Cluster(
            members,
            mode,
            lost_after_s=config.lost_after.total_seconds(),
            single_copies=config.allow_single_copy,
            floors=await asyncio.to_thread(notes.floors, names),
            imports=[wanted for token in settings.tokens for wanted in token.imports],
            clock=self._host.clock,
            log=self._host.log,
        )

    async def generate_key(self, key_id: str, key_type: KeyType) -> KeyInfo:
        """Make a key in the token."""
        keys = self._cluster or self._keyring
        if keys is None:
            raise NotReadyError("failed to generate key: not configured")
        return await keys.generate(key_id, key_type)

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
        keys = self._cluster or self._keyring
        if keys is None:
            return DeviceHealth(KeyHealth.DOWN, "hsm.not_configured", "not configured")
        return keys.health()

    async def retained_keys(self) -> list[RetainedKey]:
        """Return the replaced keys that are kept, oldest first."""
        return self._ready().retained()

    async def restore_key(self, key_id: str, generation: int) -> KeyInfo:
        """Make a replaced key current again."""
        return await self._ready().restore(key_id, generation)

    async def destroy_retained(self, key_id: str, generation: int) -> None:
        """Destroy a replaced key before its time."""
        await self._ready().destroy_retained(key_id, generation)

    @asynccontextmanager
    async def shared_token(self, config: Body, name: str = "") -> AsyncIterator[SharedToken]:
        """Open a token for a look at everything on it; no claim is laid to any key."""
        raw = decode(config, Config)
        settings, found = settings_of(raw)
        if settings is None:
            raise ConfigError(config.file or NAME, found)
        token = token_of(settings, name)
        owner = await asyncio.to_thread(self._owner, raw, must_exist=True)
        limits = replace(_limits(raw, 1), workers=1)
        async with opened(
            token, owner, self._pins, self._host, command=self._command, limits=limits
        ) as shared:
            yield shared

    async def close(self) -> None:
        """Log out and end the workers."""
        before = (self._keyring, self._pool, self._cluster)
        self._keyring = self._pool = self._cluster = None
        await _close(*before)

    def stranded_keys(self) -> dict[str, DeviceHealth]:
        """Return keys whose tokens are lost, while another of several is there."""
        return {} if self._cluster is None else self._cluster.stranded_keys()

    @property
    def worker_pids(self) -> list[int]:
        """Return the process ids of the workers, for operators' eyes."""
        holder = self._cluster or self._pool
        return [] if holder is None else holder.worker_pids

    def _ready(self) -> Keyring | Cluster:
        keys = self._cluster or self._keyring
        if keys is None:
            raise NotReadyError("not configured")
        return keys

    def _owner(self, config: Config, *, must_exist: bool = False) -> Owner:
        # Both sides of one machine may share a token: an agent's keys are never a server's.
        identifier = config.key_identifier_value
        if identifier is None:
            identifier = self._identifier_from_file(config, must_exist=must_exist)
        side = "" if self._host.side is Side.SERVER else "agent:"
        return Owner(self._host.trust_domain.name, side + identifier)

    def _identifier_from_file(self, config: Config, *, must_exist: bool) -> str:
        named = config.key_identifier_file
        path = Path(named) if named is not None else self._host.data_dir / _IDENTIFIER_FILE
        try:
            content = read_bounded(path, _MAX_IDENTIFIER_FILE_BYTES, "key identifier file")
            identifier = content.decode("ascii").strip()
        except NoFileError:
            if must_exist:
                raise NotReadyError(
                    f"key identifier file {path} is not there yet: start the server once"
                ) from None
            identifier = str(uuid.uuid4())
            create_file(path, identifier.encode("ascii"), "key identifier file")
        except UnicodeDecodeError as e:
            raise NotReadyError(f"key identifier file {path} does not hold an identifier") from e
        if not is_identifier(identifier):
            raise NotReadyError(f"key identifier file {path} does not hold an identifier")
        return identifier


def _place_of(host: HostInfo) -> str:
    """Return what tells a data directory from its copies, on this host and others, until a reboot.

    Where it is held, an instance that was there before is dead; else "" is returned.
    """
    boot_id = read_boot_id()
    if boot_id is None or not host.holds_data_dir:
        return ""
    status = host.data_dir.stat()
    text = f"{boot_id} {status.st_dev} {status.st_ino}"
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def _limits(config: Config, tokens: int) -> Limits:
    limits = Limits(
        workers=config.workers,
        queue=config.queue,
        start_s=config.start_timeout.total_seconds(),
        sign_s=config.sign_timeout.total_seconds(),
        generate_s=config.generate_timeout.total_seconds(),
        probe_s=config.probe_interval.total_seconds(),
    )
    # A call that one token keeps waiting has to have time left for the next.
    return replace(limits, wait_s=limits.wait_s / tokens)


def _policy(config: Config, settings: Settings, token: TokenSettings) -> Policy:
    return Policy(
        key_types=settings.key_types,
        accept_token=token.accept_token,
        accept_key_loss=token.accept_key_loss,
        accept_weak_keys=frozenset(config.accept_weak_keys),
        retain_replaced_s=config.retain_replaced.total_seconds(),
        imports=token.imports,
        allowance=Allowance(config.generations_per_day, config.generation_burst),
        max_keys=config.max_keys,
    )


async def _close(keyring: Keyring | None, pool: Pool | None, cluster: Cluster | None) -> None:
    if pool is not None:
        await pool.close()
    if keyring is not None:
        await keyring.close()
    if cluster is not None:
        await cluster.close()


def build(
    host: HostInfo, command: Sequence[str] = WORKER, pins: Pins | None = None
) -> Pkcs11KeyManager:
    """Make the plugin; command starts its workers, see `spire_hw.pkcs11.pool.process.Launch`."""
    return Pkcs11KeyManager(host, command, pins)
