from spire_hw._pb import plugin_types_pb2 as _plugin_types_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NotifyRequest(_message.Message):
    __slots__ = ("bundle_updated",)
    BUNDLE_UPDATED_FIELD_NUMBER: _ClassVar[int]
    bundle_updated: BundleUpdated
    def __init__(self, bundle_updated: _Optional[_Union[BundleUpdated, _Mapping]] = ...) -> None: ...

class NotifyResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BundleLoaded(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: _plugin_types_pb2.Bundle
    def __init__(self, bundle: _Optional[_Union[_plugin_types_pb2.Bundle, _Mapping]] = ...) -> None: ...

class NotifyAndAdviseRequest(_message.Message):
    __slots__ = ("bundle_loaded",)
    BUNDLE_LOADED_FIELD_NUMBER: _ClassVar[int]
    bundle_loaded: BundleLoaded
    def __init__(self, bundle_loaded: _Optional[_Union[BundleLoaded, _Mapping]] = ...) -> None: ...

class NotifyAndAdviseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BundleUpdated(_message.Message):
    __slots__ = ("bundle",)
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    bundle: _plugin_types_pb2.Bundle
    def __init__(self, bundle: _Optional[_Union[_plugin_types_pb2.Bundle, _Mapping]] = ...) -> None: ...
