"""BundlePublisher over gRPC.

Source: `spire.plugin.server.bundlepublisher.v1`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import plugin_server_bundlepublisher_pb2 as pb
from spire_hw.goplugin.facade.values import bundle_from_pb, bundle_to_pb
from spire_hw.rpc.service import bind

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.plugin.bundlepublisher import BundlePublisher
    from spire_hw.plugin.info import Side
    from spire_hw.rpc.service import Call, Method

_PUBLISH: Final = "/spire.plugin.server.bundlepublisher.v1.BundlePublisher/PublishBundle"


def remote(link: Link, side: Side) -> RemoteBundlePublisher:
    """Return the contract over an external plugin."""
    del side  # servers alone have them
    return RemoteBundlePublisher(link)


def methods(plugin: BundlePublisher, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    del side
    descriptor = pb.DESCRIPTOR.services_by_name["BundlePublisher"]
    return bind(descriptor, BundlePublisherService(plugin))


class RemoteBundlePublisher:
    """An external BundlePublisher; see `spire_hw.plugin.bundlepublisher.BundlePublisher`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def publish_bundle(self, bundle: Bundle) -> None:
        """Publish a bundle."""
        request = pb.PublishBundleRequest(bundle=bundle_to_pb(bundle))
        await self._link.unary(_PUBLISH, request, pb.PublishBundleResponse)


class BundlePublisherService:
    """The gRPC service over a BundlePublisher."""

    def __init__(self, plugin: BundlePublisher) -> None:
        self._plugin = plugin

    async def publish_bundle(
        self, request: pb.PublishBundleRequest, call: Call
    ) -> pb.PublishBundleResponse:
        """Serve PublishBundle."""
        await self._plugin.publish_bundle(bundle_from_pb(request.bundle))
        return pb.PublishBundleResponse()
