"""Bundles: the trust domain's own, and those of foreign trust domains."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from spire_hw._pb import server_bundle_pb2 as pb
from spire_hw._pb import types_pb2
from spire_hw.bundle.bundle import Bundle
from spire_hw.errors import (
    ErrorKind,
    InvalidInputError,
    NotFoundError,
    SpireHwError,
)
from spire_hw.rpc import convert
from spire_hw.rpc.status import item_status
from spire_hw_server.api.entry import tried
from spire_hw_server.datastore.records import BundleDeletion

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from spire_hw.rpc.service import Call
    from spire_hw.spiffeid import TrustDomain
    from spire_hw_server.api.audit import Audit
    from spire_hw_server.api.limits import Limits
    from spire_hw_server.bundles import Bundles
    from spire_hw_server.datastore.interface import Datastore


class BundleService:
    """`spire.api.server.bundle.v1.Bundle`."""

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        store: Datastore,
        bundles: Bundles,
        limits: Limits,
        audit: Audit,
    ) -> None:
        self._trust_domain = trust_domain
        self._store = store
        self._bundles = bundles
        self._limits = limits
        self._audit = audit
        self._whole: tuple[Bundle, types_pb2.Bundle] | None = None

    async def count_bundles(
        self, request: pb.CountBundlesRequest, call: Call
    ) -> pb.CountBundlesResponse:
        """Return how many bundles there are, our own included."""
        del request, call
        return pb.CountBundlesResponse(count=len(await self._store.list_bundles()))

    async def get_bundle(self, request: pb.GetBundleRequest, call: Call) -> types_pb2.Bundle:
        """Return the trust domain's own bundle."""
        del call
        bundle = self._bundles.own
        if not bundle.x509_authorities and not bundle.jwt_authorities:
            raise NotFoundError("bundle not found")
        if request.HasField("output_mask"):
            return convert.bundle_to_pb(bundle, request.output_mask)
        if self._whole is None or self._whole[0] is not bundle:
            self._whole = (bundle, convert.bundle_to_pb(bundle))
        return self._whole[1]

    async def append_bundle(self, request: pb.AppendBundleRequest, call: Call) -> types_pb2.Bundle:
        """Add authorities to the own bundle."""
        if not request.x509_authorities and not request.jwt_authorities:
            raise InvalidInputError("no authorities to append")
        addition = Bundle(
            self._trust_domain,
            x509_authorities=convert.x509_roots_from_pb(request.x509_authorities),
            jwt_authorities=convert.jwt_authorities_from_pb(request.jwt_authorities),
        )
        try:
            bundle = await self._bundles.append(addition)
        except NotFoundError as e:
            raise SpireHwError(f"could not append: {e.message}", kind=ErrorKind.INTERNAL) from e
        call.log.info("bundle appended", sequence=bundle.sequence)
        return convert.bundle_to_pb(
            bundle, request.output_mask if request.HasField("output_mask") else None
        )

    async def publish_jwt_authority(
        self, request: pb.PublishJWTAuthorityRequest, call: Call
    ) -> pb.PublishJWTAuthorityResponse:
        """Add a downstream server's JWT key to the own bundle."""
        await self._limits.publish(call)
        if not request.HasField("jwt_authority"):
            raise InvalidInputError("missing JWT authority")
        keys = convert.jwt_authorities_from_pb([request.jwt_authority])
        self._audit.note(call, jwt_authority_key_id=keys[0].kid)
        bundle = await self._bundles.append(Bundle(self._trust_domain, jwt_authorities=keys))
        return pb.PublishJWTAuthorityResponse(
            jwt_authorities=[convert.jwt_authority_to_pb(k) for k in bundle.jwt_authorities]
        )

    async def publish_wit_authority(
        self, request: pb.PublishWITAuthorityRequest, call: Call
    ) -> pb.PublishWITAuthorityResponse:
        """Refuse: WIT-SVIDs are not there."""
        del request, call
        raise SpireHwError("WIT-SVIDs are not supported", kind=ErrorKind.UNIMPLEMENTED)

    async def list_federated_bundles(
        self, request: pb.ListFederatedBundlesRequest, call: Call
    ) -> pb.ListFederatedBundlesResponse:
        """Return foreign bundles by trust domain, whole or page by page."""
        del call
        if request.page_size < 0:
            raise InvalidInputError("page size is negative")
        foreign = [
            b
            for b in await self._store.list_bundles()
            if b.trust_domain != self._trust_domain and b.trust_domain.name > request.page_token
        ]
        page = foreign[: request.page_size] if request.page_size else foreign
        more = len(page) < len(foreign)
        mask = request.output_mask if request.HasField("output_mask") else None
        return pb.ListFederatedBundlesResponse(
            bundles=[convert.bundle_to_pb(b, mask) for b in page],
            next_page_token=page[-1].trust_domain.name if more else "",
        )

    async def get_federated_bundle(
        self, request: pb.GetFederatedBundleRequest, call: Call
    ) -> types_pb2.Bundle:
        """Return one foreign bundle."""
        self._audit.note(call, trust_domain_id=request.trust_domain)
        trust_domain = self._foreign(request.trust_domain)
        bundle = await self._bundles.get(trust_domain)
        return convert.bundle_to_pb(
            bundle, request.output_mask if request.HasField("output_mask") else None
        )

    async def batch_create_federated_bundle(
        self, request: pb.BatchCreateFederatedBundleRequest, call: Call
    ) -> pb.BatchCreateFederatedBundleResponse:
        """Store bundles of trust domains that have none yet; each item has its own status."""
        response = pb.BatchCreateFederatedBundleResponse()
        mask = request.output_mask if request.HasField("output_mask") else None
        for message in request.bundle:
            bundle, error = await self._item(message, call, self._create)
            result = response.results.add(status=item_status(error))
            if bundle is not None:
                result.bundle.CopyFrom(convert.bundle_to_pb(bundle, mask))
        await self._bundles.refresh()
        return response

    async def batch_update_federated_bundle(
        self, request: pb.BatchUpdateFederatedBundleRequest, call: Call
    ) -> pb.BatchUpdateFederatedBundleResponse:
        """Change foreign bundles; each item has its own status."""
        response = pb.BatchUpdateFederatedBundleResponse()
        named = request.input_mask if request.HasField("input_mask") else None
        mask = request.output_mask if request.HasField("output_mask") else None

        async def update(message: types_pb2.Bundle) -> Bundle:
            new = self._parsed(message)
            return await self._store.update_bundle(
                new.trust_domain, lambda held: _overlaid(held, new, named)
            )

        for message in request.bundle:
            bundle, error = await self._item(message, call, update)
            result = response.results.add(status=item_status(error))
            if bundle is not None:
                result.bundle.CopyFrom(convert.bundle_to_pb(bundle, mask))
        await self._bundles.refresh()
        return response

    async def batch_set_federated_bundle(
        self, request: pb.BatchSetFederatedBundleRequest, call: Call
    ) -> pb.BatchSetFederatedBundleResponse:
        """Store foreign bundles whether there were any or not; each item has its own status."""
        response = pb.BatchSetFederatedBundleResponse()
        mask = request.output_mask if request.HasField("output_mask") else None

        async def store(message: types_pb2.Bundle) -> Bundle:
            return await self._store.set_bundle(self._parsed(message))

        for message in request.bundle:
            bundle, error = await self._item(message, call, store)
            result = response.results.add(status=item_status(error))
            if bundle is not None:
                result.bundle.CopyFrom(convert.bundle_to_pb(bundle, mask))
        await self._bundles.refresh()
        return response

    async def batch_delete_federated_bundle(
        self, request: pb.BatchDeleteFederatedBundleRequest, call: Call
    ) -> pb.BatchDeleteFederatedBundleResponse:
        """Delete foreign bundles; each item has its own status."""
        try:
            mode = BundleDeletion(request.mode)
        except ValueError as e:
            raise InvalidInputError(f"delete mode {request.mode} is unknown") from e
        response = pb.BatchDeleteFederatedBundleResponse()
        for name in request.trust_domains:
            _, error = await tried(self._delete(name, mode))
            self._audit.item(call, error, trust_domain_id=name, mode=mode.name)
            response.results.add(status=item_status(error), trust_domain=name)
        await self._bundles.refresh()
        return response

    async def _create(self, message: types_pb2.Bundle) -> Bundle:
        return await self._store.create_bundle(self._parsed(message))

    async def _delete(self, name: str, mode: BundleDeletion) -> None:
        await self._store.delete_bundle(self._foreign(name), mode)

    async def _item(
        self,
        message: types_pb2.Bundle,
        call: Call,
        action: Callable[[types_pb2.Bundle], Awaitable[Bundle]],
    ) -> tuple[Bundle | None, SpireHwError | None]:
        bundle, error = await tried(action(message))
        self._audit.item(call, error, trust_domain_id=message.trust_domain)
        return bundle, error

    def _foreign(self, name: str) -> TrustDomain:
        trust_domain = convert.trust_domain_from_pb(name)
        if trust_domain == self._trust_domain:
            raise InvalidInputError(f'"{name}" is this server\'s own trust domain')
        return trust_domain

    def _parsed(self, message: types_pb2.Bundle) -> Bundle:
        self._foreign(message.trust_domain)
        return convert.bundle_from_pb(message)


def _overlaid(held: Bundle, new: Bundle, mask: types_pb2.BundleMask | None) -> Bundle:
    """Return a stored bundle with the fields replaced that a mask names."""
    if mask is None:
        return new
    return replace(
        held,
        x509_authorities=new.x509_authorities if mask.x509_authorities else held.x509_authorities,
        jwt_authorities=new.jwt_authorities if mask.jwt_authorities else held.jwt_authorities,
        refresh_hint_s=new.refresh_hint_s if mask.refresh_hint else held.refresh_hint_s,
        sequence=new.sequence if mask.sequence_number else held.sequence,
    )
