from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HeartbeatRequest(_message.Message):
    __slots__ = ("hello", "answer", "cannot_answer")
    class Hello(_message.Message):
        __slots__ = ("boot_id", "can_answer")
        BOOT_ID_FIELD_NUMBER: _ClassVar[int]
        CAN_ANSWER_FIELD_NUMBER: _ClassVar[int]
        boot_id: str
        can_answer: bool
        def __init__(self, boot_id: _Optional[str] = ..., can_answer: bool = ...) -> None: ...
    class CannotAnswer(_message.Message):
        __slots__ = ("reason",)
        REASON_FIELD_NUMBER: _ClassVar[int]
        reason: str
        def __init__(self, reason: _Optional[str] = ...) -> None: ...
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    CANNOT_ANSWER_FIELD_NUMBER: _ClassVar[int]
    hello: HeartbeatRequest.Hello
    answer: HeartbeatReply
    cannot_answer: HeartbeatRequest.CannotAnswer
    def __init__(self, hello: _Optional[_Union[HeartbeatRequest.Hello, _Mapping]] = ..., answer: _Optional[_Union[HeartbeatReply, _Mapping]] = ..., cannot_answer: _Optional[_Union[HeartbeatRequest.CannotAnswer, _Mapping]] = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("quotes", "boot_log", "ima", "ima_from", "boot_id")
    class Quote(_message.Message):
        __slots__ = ("attest", "signature", "values")
        ATTEST_FIELD_NUMBER: _ClassVar[int]
        SIGNATURE_FIELD_NUMBER: _ClassVar[int]
        VALUES_FIELD_NUMBER: _ClassVar[int]
        attest: bytes
        signature: bytes
        values: _containers.RepeatedCompositeFieldContainer[HeartbeatReply.BankValues]
        def __init__(self, attest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., values: _Optional[_Iterable[_Union[HeartbeatReply.BankValues, _Mapping]]] = ...) -> None: ...
    class BankValues(_message.Message):
        __slots__ = ("bank", "pcrs")
        BANK_FIELD_NUMBER: _ClassVar[int]
        PCRS_FIELD_NUMBER: _ClassVar[int]
        bank: str
        pcrs: _containers.RepeatedCompositeFieldContainer[HeartbeatReply.PcrValue]
        def __init__(self, bank: _Optional[str] = ..., pcrs: _Optional[_Iterable[_Union[HeartbeatReply.PcrValue, _Mapping]]] = ...) -> None: ...
    class PcrValue(_message.Message):
        __slots__ = ("pcr", "value")
        PCR_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        pcr: int
        value: bytes
        def __init__(self, pcr: _Optional[int] = ..., value: _Optional[bytes] = ...) -> None: ...
    QUOTES_FIELD_NUMBER: _ClassVar[int]
    BOOT_LOG_FIELD_NUMBER: _ClassVar[int]
    IMA_FIELD_NUMBER: _ClassVar[int]
    IMA_FROM_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    quotes: _containers.RepeatedCompositeFieldContainer[HeartbeatReply.Quote]
    boot_log: bytes
    ima: _containers.RepeatedScalarFieldContainer[bytes]
    ima_from: int
    boot_id: str
    def __init__(self, quotes: _Optional[_Iterable[_Union[HeartbeatReply.Quote, _Mapping]]] = ..., boot_log: _Optional[bytes] = ..., ima: _Optional[_Iterable[bytes]] = ..., ima_from: _Optional[int] = ..., boot_id: _Optional[str] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("challenge", "state")
    class Challenge(_message.Message):
        __slots__ = ("nonce", "quotes", "boot_log", "ima_from", "timeout_ms", "reset_count")
        NONCE_FIELD_NUMBER: _ClassVar[int]
        QUOTES_FIELD_NUMBER: _ClassVar[int]
        BOOT_LOG_FIELD_NUMBER: _ClassVar[int]
        IMA_FROM_FIELD_NUMBER: _ClassVar[int]
        TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
        RESET_COUNT_FIELD_NUMBER: _ClassVar[int]
        nonce: bytes
        quotes: _containers.RepeatedCompositeFieldContainer[HeartbeatResponse.Selection]
        boot_log: bool
        ima_from: int
        timeout_ms: int
        reset_count: int
        def __init__(self, nonce: _Optional[bytes] = ..., quotes: _Optional[_Iterable[_Union[HeartbeatResponse.Selection, _Mapping]]] = ..., boot_log: bool = ..., ima_from: _Optional[int] = ..., timeout_ms: _Optional[int] = ..., reset_count: _Optional[int] = ...) -> None: ...
    class Selection(_message.Message):
        __slots__ = ("bank", "pcrs")
        BANK_FIELD_NUMBER: _ClassVar[int]
        PCRS_FIELD_NUMBER: _ClassVar[int]
        bank: str
        pcrs: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, bank: _Optional[str] = ..., pcrs: _Optional[_Iterable[int]] = ...) -> None: ...
    class State(_message.Message):
        __slots__ = ("state", "reasons", "message", "next_ms", "reattest")
        STATE_FIELD_NUMBER: _ClassVar[int]
        REASONS_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        NEXT_MS_FIELD_NUMBER: _ClassVar[int]
        REATTEST_FIELD_NUMBER: _ClassVar[int]
        state: str
        reasons: _containers.RepeatedScalarFieldContainer[str]
        message: str
        next_ms: int
        reattest: bool
        def __init__(self, state: _Optional[str] = ..., reasons: _Optional[_Iterable[str]] = ..., message: _Optional[str] = ..., next_ms: _Optional[int] = ..., reattest: bool = ...) -> None: ...
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    challenge: HeartbeatResponse.Challenge
    state: HeartbeatResponse.State
    def __init__(self, challenge: _Optional[_Union[HeartbeatResponse.Challenge, _Mapping]] = ..., state: _Optional[_Union[HeartbeatResponse.State, _Mapping]] = ...) -> None: ...

class NodePosture(_message.Message):
    __slots__ = ("agent_id", "state", "reasons", "message", "since", "last_good_at", "last_seen_at", "policy", "policy_version", "by_operator", "connected")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    LAST_GOOD_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_SEEN_AT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    BY_OPERATOR_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    state: str
    reasons: _containers.RepeatedScalarFieldContainer[str]
    message: str
    since: int
    last_good_at: int
    last_seen_at: int
    policy: str
    policy_version: int
    by_operator: bool
    connected: bool
    def __init__(self, agent_id: _Optional[str] = ..., state: _Optional[str] = ..., reasons: _Optional[_Iterable[str]] = ..., message: _Optional[str] = ..., since: _Optional[int] = ..., last_good_at: _Optional[int] = ..., last_seen_at: _Optional[int] = ..., policy: _Optional[str] = ..., policy_version: _Optional[int] = ..., by_operator: bool = ..., connected: bool = ...) -> None: ...

class EvidenceRecord(_message.Message):
    __slots__ = ("id", "agent_id", "made_at", "occasion", "verdict", "state", "findings", "policy", "policy_version", "policy_sha256", "evidence_sha256", "summary", "has_document")
    class Finding(_message.Message):
        __slots__ = ("rule", "code", "message", "action")
        RULE_FIELD_NUMBER: _ClassVar[int]
        CODE_FIELD_NUMBER: _ClassVar[int]
        MESSAGE_FIELD_NUMBER: _ClassVar[int]
        ACTION_FIELD_NUMBER: _ClassVar[int]
        rule: str
        code: str
        message: str
        action: str
        def __init__(self, rule: _Optional[str] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., action: _Optional[str] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    MADE_AT_FIELD_NUMBER: _ClassVar[int]
    OCCASION_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_SHA256_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    HAS_DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    id: int
    agent_id: str
    made_at: int
    occasion: str
    verdict: str
    state: str
    findings: _containers.RepeatedCompositeFieldContainer[EvidenceRecord.Finding]
    policy: str
    policy_version: int
    policy_sha256: str
    evidence_sha256: str
    summary: str
    has_document: bool
    def __init__(self, id: _Optional[int] = ..., agent_id: _Optional[str] = ..., made_at: _Optional[int] = ..., occasion: _Optional[str] = ..., verdict: _Optional[str] = ..., state: _Optional[str] = ..., findings: _Optional[_Iterable[_Union[EvidenceRecord.Finding, _Mapping]]] = ..., policy: _Optional[str] = ..., policy_version: _Optional[int] = ..., policy_sha256: _Optional[str] = ..., evidence_sha256: _Optional[str] = ..., summary: _Optional[str] = ..., has_document: bool = ...) -> None: ...

class GetStateRequest(_message.Message):
    __slots__ = ("agent_id",)
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    def __init__(self, agent_id: _Optional[str] = ...) -> None: ...

class ListStatesRequest(_message.Message):
    __slots__ = ("states", "page_size", "page_token")
    STATES_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedScalarFieldContainer[str]
    page_size: int
    page_token: str
    def __init__(self, states: _Optional[_Iterable[str]] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListStatesResponse(_message.Message):
    __slots__ = ("nodes", "next_page_token")
    NODES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[NodePosture]
    next_page_token: str
    def __init__(self, nodes: _Optional[_Iterable[_Union[NodePosture, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListEvidenceRequest(_message.Message):
    __slots__ = ("agent_id", "page_size", "page_token")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    page_size: int
    page_token: str
    def __init__(self, agent_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEvidenceResponse(_message.Message):
    __slots__ = ("records", "next_page_token")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedCompositeFieldContainer[EvidenceRecord]
    next_page_token: str
    def __init__(self, records: _Optional[_Iterable[_Union[EvidenceRecord, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class GetEvidenceRequest(_message.Message):
    __slots__ = ("agent_id", "id")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    id: int
    def __init__(self, agent_id: _Optional[str] = ..., id: _Optional[int] = ...) -> None: ...

class GetEvidenceResponse(_message.Message):
    __slots__ = ("record", "document")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    record: EvidenceRecord
    document: bytes
    def __init__(self, record: _Optional[_Union[EvidenceRecord, _Mapping]] = ..., document: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("agent_id", "comment")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    comment: str
    def __init__(self, agent_id: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...

class QuarantineRequest(_message.Message):
    __slots__ = ("agent_id", "comment")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    comment: str
    def __init__(self, agent_id: _Optional[str] = ..., comment: _Optional[str] = ...) -> None: ...
