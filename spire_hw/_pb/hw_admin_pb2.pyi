from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolledEk(_message.Message):
    __slots__ = ("ek_hash", "comment", "created_at")
    EK_HASH_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ek_hash: str
    comment: str
    created_at: int
    def __init__(self, ek_hash: _Optional[str] = ..., comment: _Optional[str] = ..., created_at: _Optional[int] = ...) -> None: ...

class AllowEkRequest(_message.Message):
    __slots__ = ("ek_hash", "comment")
    EK_HASH_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    ek_hash: str
    comment: str
    def __init__(self, ek_hash: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...

class DenyEkRequest(_message.Message):
    __slots__ = ("ek_hash",)
    EK_HASH_FIELD_NUMBER: _ClassVar[int]
    ek_hash: str
    def __init__(self, ek_hash: _Optional[str] = ...) -> None: ...

class DenyEkResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEksRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEksResponse(_message.Message):
    __slots__ = ("eks", "next_page_token")
    EKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    eks: _containers.RepeatedCompositeFieldContainer[EnrolledEk]
    next_page_token: str
    def __init__(self, eks: _Optional[_Iterable[_Union[EnrolledEk, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
