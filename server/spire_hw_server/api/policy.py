"""Who may call what: the method table, as data, and the question asked of it.

A method without a row is denied. The columns are upstream's default policy; a test holds that
every method of every registered service has a row.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class CallerClass(Enum):
    """In what capacity a call is made; the value is upstream's word in the logs."""

    ANY = "any"
    LOCAL = "local"
    ADMIN = "admin"
    DOWNSTREAM = "downstream"
    AGENT = "agent"


_ANY = frozenset({CallerClass.ANY})
_LOCAL = frozenset({CallerClass.LOCAL})
_OPERATOR = frozenset({CallerClass.LOCAL, CallerClass.ADMIN})
_AGENT = frozenset({CallerClass.AGENT})
_DOWNSTREAM = frozenset({CallerClass.DOWNSTREAM})
_READER = _OPERATOR | _AGENT

_SERVICES: Final[dict[str, dict[str, frozenset[CallerClass]]]] = {
    "spire.api.server.svid.v1.SVID": {
        "MintX509SVID": _OPERATOR,
        "MintJWTSVID": _OPERATOR,
        "MintWITSVID": _OPERATOR,
        "BatchNewX509SVID": _AGENT,
        "NewJWTSVID": _AGENT,
        "BatchNewWITSVID": _AGENT,
        "NewDownstreamX509CA": _DOWNSTREAM,
    },
    "spire.api.server.bundle.v1.Bundle": {
        "GetBundle": _ANY,
        "AppendBundle": _OPERATOR,
        "PublishJWTAuthority": _DOWNSTREAM,
        "PublishWITAuthority": _DOWNSTREAM,
        "CountBundles": _OPERATOR,
        "ListFederatedBundles": _OPERATOR,
        "GetFederatedBundle": _READER,
        "BatchCreateFederatedBundle": _OPERATOR,
        "BatchUpdateFederatedBundle": _OPERATOR,
        "BatchSetFederatedBundle": _OPERATOR,
        "BatchDeleteFederatedBundle": _OPERATOR,
    },
    "spire.api.server.debug.v1.Debug": {"GetInfo": _LOCAL},
    "spire.api.server.entry.v1.Entry": {
        "CountEntries": _OPERATOR,
        "ListEntries": _OPERATOR,
        "GetEntry": _OPERATOR,
        "BatchCreateEntry": _OPERATOR,
        "BatchUpdateEntry": _OPERATOR,
        "BatchDeleteEntry": _OPERATOR,
        "GetAuthorizedEntries": _AGENT,
        "SyncAuthorizedEntries": _AGENT,
    },
    "spire.api.server.logger.v1.Logger": {
        "GetLogger": _LOCAL,
        "SetLogLevel": _LOCAL,
        "ResetLogLevel": _LOCAL,
    },
    "spire.api.server.agent.v1.Agent": {
        "CountAgents": _OPERATOR,
        "ListAgents": _OPERATOR,
        "GetAgent": _OPERATOR,
        "DeleteAgent": _OPERATOR,
        "BanAgent": _OPERATOR,
        "AttestAgent": _ANY,
        "RenewAgent": _AGENT,
        "PostStatus": _AGENT,
        "CreateJoinToken": _OPERATOR,
    },
    "grpc.health.v1.Health": {"Check": _LOCAL, "List": _LOCAL, "Watch": _LOCAL},
    "spire.api.server.trustdomain.v1.TrustDomain": {
        "ListFederationRelationships": _OPERATOR,
        "GetFederationRelationship": _OPERATOR,
        "BatchCreateFederationRelationship": _OPERATOR,
        "BatchUpdateFederationRelationship": _OPERATOR,
        "BatchDeleteFederationRelationship": _OPERATOR,
        "RefreshBundle": _OPERATOR,
    },
    "spire.api.server.localauthority.v1.LocalAuthority": {
        "GetJWTAuthorityState": _OPERATOR,
        "PrepareJWTAuthority": _OPERATOR,
        "ActivateJWTAuthority": _OPERATOR,
        "TaintJWTAuthority": _OPERATOR,
        "RevokeJWTAuthority": _OPERATOR,
        "GetX509AuthorityState": _OPERATOR,
        "PrepareX509Authority": _OPERATOR,
        "ActivateX509Authority": _OPERATOR,
        "TaintX509Authority": _OPERATOR,
        "TaintX509UpstreamAuthority": _OPERATOR,
        "RevokeX509Authority": _OPERATOR,
        "RevokeX509UpstreamAuthority": _OPERATOR,
        "GetWITAuthorityState": _OPERATOR,
        "PrepareWITAuthority": _OPERATOR,
        "ActivateWITAuthority": _OPERATOR,
        "TaintWITAuthority": _OPERATOR,
        "RevokeWITAuthority": _OPERATOR,
    },
    # Ours: TPMs enrolled by endorsement key hash.
    "spire_hw.server.v1.Tpm": {
        "AllowEk": _LOCAL,
        "EnrollEks": _LOCAL,
        "DenyEk": _LOCAL,
        "ListEks": _LOCAL,
    },
    # Ours: whose request for a DevID certificate it is.
    "spire_hw.server.v1.DevId": {"CheckRequest": _LOCAL},
    # Ours: whether machines still are as they should be.
    "spire_hw.server.v1.Posture": {"Heartbeat": _AGENT},
    "spire_hw.server.v1.PostureAdmin": {
        "GetState": _LOCAL,
        "ListStates": _LOCAL,
        "ListEvidence": _LOCAL,
        "GetEvidence": _LOCAL,
        "Release": _LOCAL,
        "Quarantine": _LOCAL,
    },
    # Ours: authorities that are signed by hand.
    "spire_hw.server.v1.Ca": {
        "RequestAuthority": _LOCAL,
        "ImportAuthority": _LOCAL,
    },
    # Ours: where the keys of this server are.
    "spire_hw.server.v1.Keys": {
        "ListKeys": _LOCAL,
        "GetKey": _LOCAL,
        "AttestKey": _LOCAL,
        "RestoreKey": _LOCAL,
        "DestroyKey": _LOCAL,
    },
    # Ours: what machines have to show.
    "spire_hw.server.v1.Policy": {
        "CreatePolicy": _LOCAL,
        "UpdatePolicy": _LOCAL,
        "DeletePolicy": _LOCAL,
        "ListPolicies": _LOCAL,
        "ListVersions": _LOCAL,
        "GetPolicy": _LOCAL,
    },
}

# Served on the unix socket alone; on TCP they do not exist.
LOCAL_SERVICES: Final = frozenset(
    {
        "spire.api.server.debug.v1.Debug",
        "spire.api.server.logger.v1.Logger",
        "grpc.health.v1.Health",
        "spire_hw.server.v1.Ca",
        "spire_hw.server.v1.DevId",
        "spire_hw.server.v1.Keys",
        "spire_hw.server.v1.Policy",
        "spire_hw.server.v1.PostureAdmin",
        "spire_hw.server.v1.Tpm",
    }
)

# What an agent may go on calling while its node is in quarantine: nothing that gives it, or keeps up,
# an identity.
OPEN_IN_QUARANTINE: Final = frozenset(
    {
        "/spire_hw.server.v1.Posture/Heartbeat",
        "/spire.api.server.agent.v1.Agent/PostStatus",
        "/spire.api.server.bundle.v1.Bundle/GetFederatedBundle",
    }
)

POLICY: Final[dict[str, frozenset[CallerClass]]] = {
    f"/{service}/{method}": allowed
    for service, methods in _SERVICES.items()
    for method, allowed in methods.items()
}


def allowed_classes(method: str) -> frozenset[CallerClass]:
    """Return the classes that may call a full method path; none for a method without a row."""
    return POLICY.get(method, frozenset())


def service_of(method: str) -> str:
    """Return the service name of a full method path."""
    return method[1:].partition("/")[0]
