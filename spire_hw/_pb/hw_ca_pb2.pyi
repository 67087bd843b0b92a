from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class RequestAuthorityRequest(_message.Message):
    __slots__ = ("replace",)
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    replace: bool
    def __init__(self, replace: bool = ...) -> None: ...

class RequestAuthorityResponse(_message.Message):
    __slots__ = ("csr", "key_id", "due_at")
    CSR_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    DUE_AT_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    key_id: str
    due_at: int
    def __init__(self, csr: _Optional[bytes] = ..., key_id: _Optional[str] = ..., due_at: _Optional[int] = ...) -> None: ...

class ImportAuthorityRequest(_message.Message):
    __slots__ = ("chain", "root", "activate")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ACTIVATE_FIELD_NUMBER: _ClassVar[int]
    chain: _containers.RepeatedScalarFieldContainer[bytes]
    root: bytes
    activate: bool
    def __init__(self, chain: _Optional[_Iterable[bytes]] = ..., root: _Optional[bytes] = ..., activate: bool = ...) -> None: ...

class ImportAuthorityResponse(_message.Message):
    __slots__ = ("authority_id", "root_id", "expires_at", "active")
    AUTHORITY_ID_FIELD_NUMBER: _ClassVar[int]
    ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    authority_id: str
    root_id: str
    expires_at: int
    active: bool
    def __init__(self, authority_id: _Optional[str] = ..., root_id: _Optional[str] = ..., expires_at: _Optional[int] = ..., active: bool = ...) -> None: ...
