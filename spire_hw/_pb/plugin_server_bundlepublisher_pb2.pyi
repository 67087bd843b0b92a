from spire_hw._pb import plugin_types_pb2 as _plugin_types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PublishBundleRequest(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: _plugin_types_pb2.Bundle
    def __init__(self, bundle: _Optional[_Union[_plugin_types_pb2.Bundle, _Mapping]] = ...) -> None: ...

class PublishBundleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
