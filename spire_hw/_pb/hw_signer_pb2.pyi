from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KeyType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNSPECIFIED_KEY_TYPE: _ClassVar[KeyType]
    EC_P256: _ClassVar[KeyType]
    EC_P384: _ClassVar[KeyType]
    RSA_2048: _ClassVar[KeyType]
    RSA_4096: _ClassVar[KeyType]
UNSPECIFIED_KEY_TYPE: KeyType
EC_P256: KeyType
EC_P384: KeyType
RSA_2048: KeyType
RSA_4096: KeyType

class PublicKey(_message.Message):
    __slots__ = ("id", "type", "pkix_data", "fingerprint")
    ID_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PKIX_DATA_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    id: str
    type: KeyType
    pkix_data: bytes
    fingerprint: str
    def __init__(self, id: _Optional[str] = ..., type: _Optional[_Union[KeyType, str]] = ..., pkix_data: _Optional[bytes] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class LogHead(_message.Message):
    __slots__ = ("seq", "hash")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    seq: int
    hash: bytes
    def __init__(self, seq: _Optional[int] = ..., hash: _Optional[bytes] = ...) -> None: ...

class GetPublicKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetPublicKeysResponse(_message.Message):
    __slots__ = ("public_keys", "log_head")
    PUBLIC_KEYS_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    public_keys: _containers.RepeatedCompositeFieldContainer[PublicKey]
    log_head: LogHead
    def __init__(self, public_keys: _Optional[_Iterable[_Union[PublicKey, _Mapping]]] = ..., log_head: _Optional[_Union[LogHead, _Mapping]] = ...) -> None: ...

class GenerateKeyRequest(_message.Message):
    __slots__ = ("request_id", "key_id", "key_type")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_TYPE_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    key_id: str
    key_type: KeyType
    def __init__(self, request_id: _Optional[bytes] = ..., key_id: _Optional[str] = ..., key_type: _Optional[_Union[KeyType, str]] = ...) -> None: ...

class GenerateKeyResponse(_message.Message):
    __slots__ = ("public_key", "log_head", "refusal")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    public_key: PublicKey
    log_head: LogHead
    refusal: Refusal
    def __init__(self, public_key: _Optional[_Union[PublicKey, _Mapping]] = ..., log_head: _Optional[_Union[LogHead, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class SignRequest(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[SignItem]
    def __init__(self, items: _Optional[_Iterable[_Union[SignItem, _Mapping]]] = ...) -> None: ...

class SignItem(_message.Message):
    __slots__ = ("request_id", "key_id", "hash", "pss", "x509", "jwt", "digest", "csr")
    class Pss(_message.Message):
        __slots__ = ("salt_length",)
        SALT_LENGTH_FIELD_NUMBER: _ClassVar[int]
        salt_length: int
        def __init__(self, salt_length: _Optional[int] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    PSS_FIELD_NUMBER: _ClassVar[int]
    X509_FIELD_NUMBER: _ClassVar[int]
    JWT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CSR_FIELD_NUMBER: _ClassVar[int]
    request_id: bytes
    key_id: str
    hash: int
    pss: SignItem.Pss
    x509: bytes
    jwt: bytes
    digest: bytes
    csr: bytes
    def __init__(self, request_id: _Optional[bytes] = ..., key_id: _Optional[str] = ..., hash: _Optional[int] = ..., pss: _Optional[_Union[SignItem.Pss, _Mapping]] = ..., x509: _Optional[bytes] = ..., jwt: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., csr: _Optional[bytes] = ...) -> None: ...

class SignResponse(_message.Message):
    __slots__ = ("results", "log_head")
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[SignResult]
    log_head: LogHead
    def __init__(self, results: _Optional[_Iterable[_Union[SignResult, _Mapping]]] = ..., log_head: _Optional[_Union[LogHead, _Mapping]] = ...) -> None: ...

class SignResult(_message.Message):
    __slots__ = ("signature", "fingerprint", "refusal")
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    signature: bytes
    fingerprint: str
    refusal: Refusal
    def __init__(self, signature: _Optional[bytes] = ..., fingerprint: _Optional[str] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "reason", "message", "retry_after_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    retry_after_ms: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class GetLogHeadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLogHeadResponse(_message.Message):
    __slots__ = ("log_head", "checkpoint", "log_key")
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    LOG_KEY_FIELD_NUMBER: _ClassVar[int]
    log_head: LogHead
    checkpoint: bytes
    log_key: bytes
    def __init__(self, log_head: _Optional[_Union[LogHead, _Mapping]] = ..., checkpoint: _Optional[bytes] = ..., log_key: _Optional[bytes] = ...) -> None: ...

class KeyCustody(_message.Message):
    __slots__ = ("custody", "location", "device", "token", "generation", "created_at", "attributes")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CUSTODY_FIELD_NUMBER: _ClassVar[int]
    LOCATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    custody: str
    location: str
    device: str
    token: str
    generation: int
    created_at: int
    attributes: _containers.ScalarMap[str, str]
    def __init__(self, custody: _Optional[str] = ..., location: _Optional[str] = ..., device: _Optional[str] = ..., token: _Optional[str] = ..., generation: _Optional[int] = ..., created_at: _Optional[int] = ..., attributes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetKeyCustodyRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...

class GetKeyCustodyResponse(_message.Message):
    __slots__ = ("fingerprint", "custody", "log_head")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CUSTODY_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    custody: KeyCustody
    log_head: LogHead
    def __init__(self, fingerprint: _Optional[str] = ..., custody: _Optional[_Union[KeyCustody, _Mapping]] = ..., log_head: _Optional[_Union[LogHead, _Mapping]] = ...) -> None: ...

class AttestOwnKeyRequest(_message.Message):
    __slots__ = ("key_id", "nonce")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    nonce: bytes
    def __init__(self, key_id: _Optional[str] = ..., nonce: _Optional[bytes] = ...) -> None: ...

class AttestOwnKeyResponse(_message.Message):
    __slots__ = ("evidence", "log_head")
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    LOG_HEAD_FIELD_NUMBER: _ClassVar[int]
    evidence: str
    log_head: LogHead
    def __init__(self, evidence: _Optional[str] = ..., log_head: _Optional[_Union[LogHead, _Mapping]] = ...) -> None: ...
