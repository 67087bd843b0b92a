from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrolledEk(_message.Message):
    __slots__ = ("ek_hash", "comment", "created_at", "owner")
    EK_HASH_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ek_hash: str
    comment: str
    created_at: int
    owner: str
    def __init__(self, ek_hash: _Optional[str] = ..., comment: _Optional[str] = ..., created_at: _Optional[int] = ..., owner: _Optional[str] = ...) -> None: ...

class AllowEkRequest(_message.Message):
    __slots__ = ("ek_hash", "comment", "owner")
    EK_HASH_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ek_hash: str
    comment: str
    owner: str
    def __init__(self, ek_hash: _Optional[str] = ..., comment: _Optional[str] = ..., owner: _Optional[str] = ...) -> None: ...

class EnrollEksRequest(_message.Message):
    __slots__ = ("eks", "dry_run")
    EKS_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    eks: _containers.RepeatedCompositeFieldContainer[AllowEkRequest]
    dry_run: bool
    def __init__(self, eks: _Optional[_Iterable[_Union[AllowEkRequest, _Mapping]]] = ..., dry_run: bool = ...) -> None: ...

class EnrollEksResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EnrollEkResult]
    def __init__(self, results: _Optional[_Iterable[_Union[EnrollEkResult, _Mapping]]] = ...) -> None: ...

class EnrollEkResult(_message.Message):
    __slots__ = ("outcome", "message")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[EnrollEkResult.Outcome]
        ADDED: _ClassVar[EnrollEkResult.Outcome]
        UPDATED: _ClassVar[EnrollEkResult.Outcome]
        UNCHANGED: _ClassVar[EnrollEkResult.Outcome]
        REFUSED: _ClassVar[EnrollEkResult.Outcome]
    OUTCOME_UNSPECIFIED: EnrollEkResult.Outcome
    ADDED: EnrollEkResult.Outcome
    UPDATED: EnrollEkResult.Outcome
    UNCHANGED: EnrollEkResult.Outcome
    REFUSED: EnrollEkResult.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    outcome: EnrollEkResult.Outcome
    message: str
    def __init__(self, outcome: _Optional[_Union[EnrollEkResult.Outcome, str]] = ..., message: _Optional[str] = ...) -> None: ...

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
