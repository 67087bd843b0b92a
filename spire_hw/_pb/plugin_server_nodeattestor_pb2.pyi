from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttestRequest(_message.Message):
    __slots__ = ("payload", "challenge_response")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CHALLENGE_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    challenge_response: bytes
    def __init__(self, payload: _Optional[bytes] = ..., challenge_response: _Optional[bytes] = ...) -> None: ...

class AttestResponse(_message.Message):
    __slots__ = ("challenge", "agent_attributes")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    AGENT_ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    challenge: bytes
    agent_attributes: AgentAttributes
    def __init__(self, challenge: _Optional[bytes] = ..., agent_attributes: _Optional[_Union[AgentAttributes, _Mapping]] = ...) -> None: ...

class AgentAttributes(_message.Message):
    __slots__ = ("spiffe_id", "selector_values", "can_reattest")
    SPIFFE_ID_FIELD_NUMBER: _ClassVar[int]
    SELECTOR_VALUES_FIELD_NUMBER: _ClassVar[int]
    CAN_REATTEST_FIELD_NUMBER: _ClassVar[int]
    spiffe_id: str
    selector_values: _containers.RepeatedScalarFieldContainer[str]
    can_reattest: bool
    def __init__(self, spiffe_id: _Optional[str] = ..., selector_values: _Optional[_Iterable[str]] = ..., can_reattest: bool = ...) -> None: ...
