"""The server's authorities by hand: prepare, activate, taint, revoke."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from spire_hw._pb import server_localauthority_pb2 as pb
from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    NotReadyError,
    SpireHwError,
    UnavailableError,
)
from spire_hw_server.ca.journal import JwtRecord, X509Record

if TYPE_CHECKING:
    from spire_hw.rpc.service import Call
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.ca.manager import CaManager


class LocalAuthorityService:
    """`spire.api.server.localauthority.v1.LocalAuthority`."""

    def __init__(self, *, manager: CaManager, audit: Audit, jwt_enabled: bool = True) -> None:
        self._manager = manager
        self._audit = audit
        self._jwt_enabled = jwt_enabled

    async def get_jwt_authority_state(
        self, request: pb.GetJWTAuthorityStateRequest, call: Call
    ) -> pb.GetJWTAuthorityStateResponse:
        """Return the JWT keys."""
        del request, call
        self._check_jwt()
        slots = self._manager.jwt_slots
        if slots.active is None:
            raise UnavailableError("no JWT authority is active yet")
        return pb.GetJWTAuthorityStateResponse(
            active=_state(slots.active), prepared=_state(slots.prepared), old=_state(slots.old)
        )

    async def prepare_jwt_authority(
        self, request: pb.PrepareJWTAuthorityRequest, call: Call
    ) -> pb.PrepareJWTAuthorityResponse:
        """Make and publish the next JWT key."""
        del request, call
        self._check_jwt()
        return pb.PrepareJWTAuthorityResponse(
            prepared_authority=_state(await self._manager.prepare_jwt())
        )

    async def activate_jwt_authority(
        self, request: pb.ActivateJWTAuthorityRequest, call: Call
    ) -> pb.ActivateJWTAuthorityResponse:
        """Let the prepared JWT key sign."""
        self._check_jwt()
        authority_id = self._named(request, call)
        _check_not_active(self._manager.jwt_slots.active, authority_id)
        try:
            record = await self._manager.activate_jwt(authority_id)
        except NotReadyError as e:
            raise SpireHwError(e.message, kind=ErrorKind.INTERNAL) from e
        return pb.ActivateJWTAuthorityResponse(activated_authority=_state(record))

    async def taint_jwt_authority(
        self, request: pb.TaintJWTAuthorityRequest, call: Call
    ) -> pb.TaintJWTAuthorityResponse:
        """Mark the old JWT key as compromised."""
        self._check_jwt()
        record = await self._manager.taint_jwt(self._named(request, call))
        return pb.TaintJWTAuthorityResponse(tainted_authority=_state(record))

    async def revoke_jwt_authority(
        self, request: pb.RevokeJWTAuthorityRequest, call: Call
    ) -> pb.RevokeJWTAuthorityResponse:
        """Take the old, tainted JWT key out of the bundle."""
        self._check_jwt()
        record = await self._manager.revoke_jwt(self._named(request, call))
        return pb.RevokeJWTAuthorityResponse(revoked_authority=_state(record))

    async def get_x509_authority_state(
        self, request: pb.GetX509AuthorityStateRequest, call: Call
    ) -> pb.GetX509AuthorityStateResponse:
        """Return the X.509 authorities."""
        del request, call
        slots = self._manager.x509_slots
        if slots.active is None:
            raise UnavailableError("no X.509 authority is active yet")
        return pb.GetX509AuthorityStateResponse(
            active=_state(slots.active), prepared=_state(slots.prepared), old=_state(slots.old)
        )

    async def prepare_x509_authority(
        self, request: pb.PrepareX509AuthorityRequest, call: Call
    ) -> pb.PrepareX509AuthorityResponse:
        """Make and publish the next X.509 authority."""
        del request, call
        return pb.PrepareX509AuthorityResponse(
            prepared_authority=_state(await self._manager.prepare_x509())
        )

    async def activate_x509_authority(
        self, request: pb.ActivateX509AuthorityRequest, call: Call
    ) -> pb.ActivateX509AuthorityResponse:
        """Let the prepared X.509 authority sign."""
        authority_id = self._named(request, call)
        _check_not_active(self._manager.x509_slots.active, authority_id)
        try:
            record = await self._manager.activate_x509(authority_id)
        except NotReadyError as e:
            raise SpireHwError(e.message, kind=ErrorKind.INTERNAL) from e
        return pb.ActivateX509AuthorityResponse(activated_authority=_state(record))

    async def taint_x509_authority(
        self, request: pb.TaintX509AuthorityRequest, call: Call
    ) -> pb.TaintX509AuthorityResponse:
        """Mark the old X.509 authority as compromised."""
        self._check_local()
        record = await self._manager.taint_x509(self._named(request, call))
        return pb.TaintX509AuthorityResponse(tainted_authority=_state(record))

    async def taint_x509_upstream_authority(
        self, request: pb.TaintX509UpstreamAuthorityRequest, call: Call
    ) -> pb.TaintX509UpstreamAuthorityResponse:
        """Mark an upstream root as compromised."""
        authority_id = self._upstream_root(request, call)
        await self._manager.taint_upstream(authority_id)
        return pb.TaintX509UpstreamAuthorityResponse(upstream_authority_subject_key_id=authority_id)

    async def revoke_x509_authority(
        self, request: pb.RevokeX509AuthorityRequest, call: Call
    ) -> pb.RevokeX509AuthorityResponse:
        """Take the old, tainted X.509 authority out of the bundle."""
        self._check_local()
        record = await self._manager.revoke_x509(self._named(request, call))
        return pb.RevokeX509AuthorityResponse(revoked_authority=_state(record))

    async def revoke_x509_upstream_authority(
        self, request: pb.RevokeX509UpstreamAuthorityRequest, call: Call
    ) -> pb.RevokeX509UpstreamAuthorityResponse:
        """Take a tainted upstream root out of the bundle."""
        authority_id = self._upstream_root(request, call)
        await self._manager.revoke_upstream(authority_id)
        return pb.RevokeX509UpstreamAuthorityResponse(
            upstream_authority_subject_key_id=authority_id
        )

    async def get_wit_authority_state(self, request: Any, call: Call) -> NoReturn:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise _wit_off()

    async def prepare_wit_authority(self, request: Any, call: Call) -> NoReturn:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise _wit_off()

    async def activate_wit_authority(self, request: Any, call: Call) -> NoReturn:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise _wit_off()

    async def taint_wit_authority(self, request: Any, call: Call) -> NoReturn:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise _wit_off()

    async def revoke_wit_authority(self, request: Any, call: Call) -> NoReturn:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise _wit_off()

    def _check_jwt(self) -> None:
        if not self._jwt_enabled:
            raise SpireHwError("JWT functionality is disabled", kind=ErrorKind.UNIMPLEMENTED)

    def _named(self, request: Any, call: Call) -> str:
        authority_id: str = request.authority_id
        self._audit.note(call, local_authority_id=authority_id)
        if not authority_id:
            raise InvalidInputError("no authority ID provided")
        return authority_id

    def _check_local(self) -> None:
        if self._manager.has_upstream:
            raise NotReadyError(
                "an UpstreamAuthority signs this server's CA: taint and revoke its root instead"
            )

    def _upstream_root(self, request: Any, call: Call) -> str:
        authority_id: str = request.subject_key_id
        self._audit.note(call, upstream_authority_id=authority_id)
        if not self._manager.has_upstream:
            raise NotReadyError("upstream authority is not configured")
        return authority_id


def _wit_off() -> SpireHwError:
    return SpireHwError("WIT-SVIDs are not supported", kind=ErrorKind.UNIMPLEMENTED)


def _check_not_active(active: X509Record | JwtRecord | None, authority_id: str) -> None:
    if active is not None and active.authority_id == authority_id:
        raise InvalidInputError("the authority is active already")


def _state(record: X509Record | JwtRecord | None) -> pb.AuthorityState | None:
    if record is None:
        return None
    upstream = record.upstream_authority_id if isinstance(record, X509Record) else ""
    return pb.AuthorityState(
        authority_id=record.authority_id,
        expires_at=int(record.not_after.timestamp()),
        upstream_authority_subject_key_id=upstream,
    )
