from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Key(_message.Message):
    __slots__ = ("id", "type", "fingerprint", "public_key", "custody", "location", "device", "token", "generation", "created_at", "last_used_at", "attributes", "authority", "trouble")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CUSTODY_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    id: str
    type: str
    fingerprint: str
    public_key: bytes
    custody: str
    location: str
    device: str
    token: str
    generation: int
    created_at: int
    last_used_at: int
    attributes: _containers.ScalarMap[str, str]
    authority: Authority
    trouble: str
    def __init__(self, id: _Optional[str] = ..., type: _Optional[str] = ..., fingerprint: _Optional[str] = ..., public_key: _Optional[bytes] = ..., custody: _Optional[str] = ..., location: _Optional[str] = ..., device: _Optional[str] = ..., token: _Optional[str] = ..., generation: _Optional[int] = ..., created_at: _Optional[int] = ..., last_used_at: _Optional[int] = ..., attributes: _Optional[_Mapping[str, str]] = ..., authority: _Optional[_Union[Authority, _Mapping]] = ..., trouble: _Optional[str] = ...) -> None: ...

class Authority(_message.Message):
    __slots__ = ("kind", "id", "status")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    id: str
    status: str
    def __init__(self, kind: _Optional[str] = ..., id: _Optional[str] = ..., status: _Optional[str] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys", "retained")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    retained: _containers.RepeatedCompositeFieldContainer[RetainedKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ..., retained: _Optional[_Iterable[_Union[RetainedKey, _Mapping]]] = ...) -> None: ...

class RetainedKey(_message.Message):
    __slots__ = ("id", "type", "fingerprint", "generation", "until")
    ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    id: str
    type: str
    fingerprint: str
    generation: int
    until: int
    def __init__(self, id: _Optional[str] = ..., type: _Optional[str] = ..., fingerprint: _Optional[str] = ..., generation: _Optional[int] = ..., until: _Optional[int] = ...) -> None: ...

class GetKeyRequest(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    def __init__(self, id: _Optional[str] = ...) -> None: ...

class AttestKeyRequest(_message.Message):
    __slots__ = ("id", "nonce", "attestation")
    ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    id: str
    nonce: bytes
    attestation: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, id: _Optional[str] = ..., nonce: _Optional[bytes] = ..., attestation: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AttestKeyResponse(_message.Message):
    __slots__ = ("evidence",)
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    evidence: str
    def __init__(self, evidence: _Optional[str] = ...) -> None: ...

class RestoreKeyRequest(_message.Message):
    __slots__ = ("id", "generation", "comment")
    ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    generation: int
    comment: str
    def __init__(self, id: _Optional[str] = ..., generation: _Optional[int] = ..., comment: _Optional[str] = ...) -> None: ...

class DestroyKeyRequest(_message.Message):
    __slots__ = ("id", "generation", "comment")
    ID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    generation: int
    comment: str
    def __init__(self, id: _Optional[str] = ..., generation: _Optional[int] = ..., comment: _Optional[str] = ...) -> None: ...

class DestroyKeyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
