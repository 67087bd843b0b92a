from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNKNOWN: _ClassVar[Status]
    PREPARED: _ClassVar[Status]
    ACTIVE: _ClassVar[Status]
    OLD: _ClassVar[Status]
UNKNOWN: Status
PREPARED: Status
ACTIVE: Status
OLD: Status

class X509CAEntry(_message.Message):
    __slots__ = ("slot_id", "issued_at", "certificate", "upstream_chain", "status", "authority_id", "not_after", "upstream_authority_id", "offline")
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_CHAIN_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_ID_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_AUTHORITY_ID_FIELD_NUMBER: _ClassVar[int]
    OFFLINE_FIELD_NUMBER: _ClassVar[int]
    slot_id: str
    issued_at: int
    certificate: bytes
    upstream_chain: _containers.RepeatedScalarFieldContainer[bytes]
    status: Status
    authority_id: str
    not_after: int
    upstream_authority_id: str
    offline: bool
    def __init__(self, slot_id: _Optional[str] = ..., issued_at: _Optional[int] = ..., certificate: _Optional[bytes] = ..., upstream_chain: _Optional[_Iterable[bytes]] = ..., status: _Optional[_Union[Status, str]] = ..., authority_id: _Optional[str] = ..., not_after: _Optional[int] = ..., upstream_authority_id: _Optional[str] = ..., offline: bool = ...) -> None: ...

class JWTKeyEntry(_message.Message):
    __slots__ = ("slot_id", "issued_at", "not_after", "kid", "public_key", "status", "authority_id")
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    KID_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_ID_FIELD_NUMBER: _ClassVar[int]
    slot_id: str
    issued_at: int
    not_after: int
    kid: str
    public_key: bytes
    status: Status
    authority_id: str
    def __init__(self, slot_id: _Optional[str] = ..., issued_at: _Optional[int] = ..., not_after: _Optional[int] = ..., kid: _Optional[str] = ..., public_key: _Optional[bytes] = ..., status: _Optional[_Union[Status, str]] = ..., authority_id: _Optional[str] = ...) -> None: ...

class WITKeyEntry(_message.Message):
    __slots__ = ("slot_id", "issued_at", "not_after", "kid", "public_key", "status", "authority_id")
    SLOT_ID_FIELD_NUMBER: _ClassVar[int]
    ISSUED_AT_FIELD_NUMBER: _ClassVar[int]
    NOT_AFTER_FIELD_NUMBER: _ClassVar[int]
    KID_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_ID_FIELD_NUMBER: _ClassVar[int]
    slot_id: str
    issued_at: int
    not_after: int
    kid: str
    public_key: bytes
    status: Status
    authority_id: str
    def __init__(self, slot_id: _Optional[str] = ..., issued_at: _Optional[int] = ..., not_after: _Optional[int] = ..., kid: _Optional[str] = ..., public_key: _Optional[bytes] = ..., status: _Optional[_Union[Status, str]] = ..., authority_id: _Optional[str] = ...) -> None: ...

class Entries(_message.Message):
    __slots__ = ("x509CAs", "jwtKeys", "witKeys")
    X509CAS_FIELD_NUMBER: _ClassVar[int]
    JWTKEYS_FIELD_NUMBER: _ClassVar[int]
    WITKEYS_FIELD_NUMBER: _ClassVar[int]
    x509CAs: _containers.RepeatedCompositeFieldContainer[X509CAEntry]
    jwtKeys: _containers.RepeatedCompositeFieldContainer[JWTKeyEntry]
    witKeys: _containers.RepeatedCompositeFieldContainer[WITKeyEntry]
    def __init__(self, x509CAs: _Optional[_Iterable[_Union[X509CAEntry, _Mapping]]] = ..., jwtKeys: _Optional[_Iterable[_Union[JWTKeyEntry, _Mapping]]] = ..., witKeys: _Optional[_Iterable[_Union[WITKeyEntry, _Mapping]]] = ...) -> None: ...
