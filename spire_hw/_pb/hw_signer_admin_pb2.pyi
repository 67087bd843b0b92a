from spire_hw._pb import hw_signer_pb2 as _hw_signer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("name", "version", "log_head", "log_id", "log_directory", "log_trouble", "checkpoint", "checkpoint_trouble", "log_key", "clock_fault", "policy", "places", "operators", "required", "revoked", "device_log_trouble")
    class Place(_message.Message):
        __slots__ = ("name", "trouble")
        NAME_FIELD_NUMBER: _ClassVar[int]
        TROUBLE_FIELD_NUMBER: _ClassVar[int]
        name: str
        trouble: str
        def __init__(self, name: _Optional[str] = ..., trouble: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    LOG_ID_FIELD_NUMBER: _ClassVar[int]
    LOG_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    LOG_TROUBLE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_TROUBLE_FIELD_NUMBER: _ClassVar[int]
    LOG_KEY_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FAULT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FIELD_NUMBER: _ClassVar[int]
    REVOKED_FIELD_NUMBER: _ClassVar[int]
    DEVICE_LOG_TROUBLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    log_head: _hw_signer_pb2.LogHead
    log_id: str
    log_directory: str
    log_trouble: str
    checkpoint: bytes
    checkpoint_trouble: str
    log_key: bytes
    clock_fault: str
    policy: str
    places: _containers.RepeatedCompositeFieldContainer[Status.Place]
    operators: _containers.RepeatedScalarFieldContainer[str]
    required: int
    revoked: _containers.RepeatedScalarFieldContainer[str]
    device_log_trouble: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., log_head: _Optional[_Union[_hw_signer_pb2.LogHead, _Mapping]] = ..., log_id: _Optional[str] = ..., log_directory: _Optional[str] = ..., log_trouble: _Optional[str] = ..., checkpoint: _Optional[bytes] = ..., checkpoint_trouble: _Optional[str] = ..., log_key: _Optional[bytes] = ..., clock_fault: _Optional[str] = ..., policy: _Optional[str] = ..., places: _Optional[_Iterable[_Union[Status.Place, _Mapping]]] = ..., operators: _Optional[_Iterable[str]] = ..., required: _Optional[int] = ..., revoked: _Optional[_Iterable[str]] = ..., device_log_trouble: _Optional[str] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[AdminKey]
    def __init__(self, keys: _Optional[_Iterable[_Union[AdminKey, _Mapping]]] = ...) -> None: ...

class AdminKey(_message.Message):
    __slots__ = ("owner", "public_key", "generation", "retained_until", "retained", "custody", "trouble")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RETAINED_UNTIL_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    CUSTODY_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    owner: str
    public_key: _hw_signer_pb2.PublicKey
    generation: int
    retained_until: int
    retained: bool
    custody: _hw_signer_pb2.KeyCustody
    trouble: str
    def __init__(self, owner: _Optional[str] = ..., public_key: _Optional[_Union[_hw_signer_pb2.PublicKey, _Mapping]] = ..., generation: _Optional[int] = ..., retained_until: _Optional[int] = ..., retained: bool = ..., custody: _Optional[_Union[_hw_signer_pb2.KeyCustody, _Mapping]] = ..., trouble: _Optional[str] = ...) -> None: ...

class AttestKeyRequest(_message.Message):
    __slots__ = ("key", "nonce", "attestation")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    key: str
    nonce: bytes
    attestation: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, key: _Optional[str] = ..., nonce: _Optional[bytes] = ..., attestation: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AttestKeyResponse(_message.Message):
    __slots__ = ("evidence",)
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    evidence: str
    def __init__(self, evidence: _Optional[str] = ...) -> None: ...

class CarryOutRequest(_message.Message):
    __slots__ = ("order", "direct")
    class Direct(_message.Message):
        __slots__ = ("action", "target", "comment")
        ACTION_FIELD_NUMBER: _ClassVar[int]
        TARGET_FIELD_NUMBER: _ClassVar[int]
        COMMENT_FIELD_NUMBER: _ClassVar[int]
        action: str
        target: str
        comment: str
        def __init__(self, action: _Optional[str] = ..., target: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...
    ORDER_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    order: bytes
    direct: CarryOutRequest.Direct
    def __init__(self, order: _Optional[bytes] = ..., direct: _Optional[_Union[CarryOutRequest.Direct, _Mapping]] = ...) -> None: ...

class CarryOutResponse(_message.Message):
    __slots__ = ("action", "target", "message", "log_head")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    action: str
    target: str
    message: str
    log_head: _hw_signer_pb2.LogHead
    def __init__(self, action: _Optional[str] = ..., target: _Optional[str] = ..., message: _Optional[str] = ..., log_head: _Optional[_Union[_hw_signer_pb2.LogHead, _Mapping]] = ...) -> None: ...
