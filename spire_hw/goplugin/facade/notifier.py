"""Notifier over gRPC.

Source: `spire.plugin.server.notifier.v1`; events we do not know are answered well, as upstream asks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from spire_hw._pb import plugin_server_notifier_pb2 as pb
from spire_hw.goplugin.facade.values import bundle_from_pb, bundle_to_pb
from spire_hw.rpc.service import bind

if TYPE_CHECKING:
    from spire_hw.bundle.bundle import Bundle
    from spire_hw.goplugin.facade.link import Link
    from spire_hw.plugin.info import Side
    from spire_hw.plugin.notifier import Notifier
    from spire_hw.rpc.service import Call, Method

_SERVICE: Final = "/spire.plugin.server.notifier.v1.Notifier/"


def remote(link: Link, side: Side) -> RemoteNotifier:
    """Return the contract over an external plugin."""
    del side  # servers alone have them
    return RemoteNotifier(link)


def methods(plugin: Notifier, side: Side) -> list[Method]:
    """Return the service over an object of the contract."""
    del side
    return bind(pb.DESCRIPTOR.services_by_name["Notifier"], NotifierService(plugin))


class RemoteNotifier:
    """An external Notifier; see `spire_hw.plugin.notifier.Notifier`."""

    def __init__(self, link: Link) -> None:
        self._link = link

    async def notify_bundle_updated(self, bundle: Bundle) -> None:
        """Tell of a new bundle."""
        event = pb.BundleUpdated(bundle=bundle_to_pb(bundle))
        request = pb.NotifyRequest(bundle_updated=event)
        await self._link.unary(_SERVICE + "Notify", request, pb.NotifyResponse)

    async def notify_and_advise_bundle_loaded(self, bundle: Bundle) -> None:
        """Tell of the bundle at start."""
        event = pb.BundleLoaded(bundle=bundle_to_pb(bundle))
        request = pb.NotifyAndAdviseRequest(bundle_loaded=event)
        await self._link.unary(_SERVICE + "NotifyAndAdvise", request, pb.NotifyAndAdviseResponse)


class NotifierService:
    """The gRPC service over a Notifier."""

    def __init__(self, plugin: Notifier) -> None:
        self._plugin = plugin

    async def notify(self, request: pb.NotifyRequest, call: Call) -> pb.NotifyResponse:
        """Serve Notify."""
        if request.HasField("bundle_updated"):
            bundle = bundle_from_pb(request.bundle_updated.bundle)
            await self._plugin.notify_bundle_updated(bundle)
        return pb.NotifyResponse()

    async def notify_and_advise(
        self, request: pb.NotifyAndAdviseRequest, call: Call
    ) -> pb.NotifyAndAdviseResponse:
        """Serve NotifyAndAdvise."""
        if request.HasField("bundle_loaded"):
            bundle = bundle_from_pb(request.bundle_loaded.bundle)
            await self._plugin.notify_and_advise_bundle_loaded(bundle)
        return pb.NotifyAndAdviseResponse()
