from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class CheckDevIdRequest(_message.Message):
    __slots__ = ("csr", "public_area", "ak", "attest", "signature")
    CSR_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_AREA_FIELD_NUMBER: _ClassVar[int]
    AK_FIELD_NUMBER: _ClassVar[int]
    ATTEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    csr: bytes
    public_area: bytes
    ak: bytes
    attest: bytes
    signature: bytes
    def __init__(self, csr: _Optional[bytes] = ..., public_area: _Optional[bytes] = ..., ak: _Optional[bytes] = ..., attest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class DevIdNode(_message.Message):
    __slots__ = ("agent_id",)
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    def __init__(self, agent_id: _Optional[str] = ...) -> None: ...
