"""A small plugin of every type, good or bad; run as a program: sample_plugin.py TYPE [bad]."""

from __future__ import annotations

import sys
from datetime import timedelta

from spire_hw.bundle.bundle import X509Root
from spire_hw.config.schema import Model, decode, faults
from spire_hw.errors import InvalidInputError, UnavailableError
from spire_hw.goplugin.guest import serve
from spire_hw.key import KeyType, SoftwareSigner, generate_private_key
from spire_hw.plugin.credentialcomposer import CredentialComposer, JwtSvidAttributes
from spire_hw.plugin.info import PluginKind
from spire_hw.plugin.nodeattestor import AttestedIdentity
from spire_hw.plugin.upstreamauthority import UpstreamX509Ca
from spire_hw.spiffeid import agent_id
from spire_hw.x509.authority import X509Authority
from spire_hw.x509.csr import parse_csr
from spire_hw.x509.issue import issue_ca_certificate

BAD = sys.argv[2:] == ["bad"]


class Config(Model):
    pass


class Life:
    def __init__(self, host):
        self.host = host

    def validate(self, config):
        return faults(config, Config)

    async def configure(self, config):
        decode(config, Config)

    async def close(self):
        pass


class NodeAttestor(Life):
    async def attest(self, request):
        if not BAD:
            raise InvalidInputError("nobody is let in here")
        return AttestedIdentity(agent_id(self.host.trust_domain, "x", "1"), [], can_reattest=True)


class WorkloadAttestor(Life):
    async def attest(self, process):
        if BAD:
            raise UnavailableError("no idea")
        return [f"uid:{process.uid}"]


class SVIDStore(Life):
    async def put_x509_svid(self, svid, metadata):
        if BAD:
            raise UnavailableError("the store is away")

    async def delete_x509_svid(self, metadata):
        pass


class Notifier(Life):
    async def notify_bundle_updated(self, bundle):
        if BAD:
            raise UnavailableError("nobody listens")

    async def notify_and_advise_bundle_loaded(self, bundle):
        pass


class BundlePublisher(Life):
    async def publish_bundle(self, bundle):
        if BAD:
            raise UnavailableError("nobody listens")


class Composer(Life, CredentialComposer):
    async def compose_workload_jwt_svid(self, spiffe_id, attributes):
        more = {"sub": "spiffe://check.test/root"} if BAD else {"team": "blue"}
        return JwtSvidAttributes({**attributes.claims, **more})


class UpstreamAuthority(Life):
    async def mint_x509_ca(self, csr, preferred_ttl):
        spki, now = parse_csr(csr).spki, self.host.clock.now()
        span = {"not_before": now, "not_after": now + timedelta(hours=2)}
        domain = self.host.trust_domain
        signer = SoftwareSigner(generate_private_key(KeyType.EC_P256))
        root = await issue_ca_certificate(None, trust_domain=domain, signer=signer, **span)
        if BAD:
            yield UpstreamX509Ca((root,), (X509Root(root),))
            return
        authority = X509Authority(root, signer)
        made = await issue_ca_certificate(authority, trust_domain=domain, spki=spki, **span)
        yield UpstreamX509Ca((made,), (X509Root(root),))


CLASSES = {
    PluginKind.NODE_ATTESTOR: NodeAttestor,
    PluginKind.WORKLOAD_ATTESTOR: WorkloadAttestor,
    PluginKind.SVID_STORE: SVIDStore,
    PluginKind.NOTIFIER: Notifier,
    PluginKind.BUNDLE_PUBLISHER: BundlePublisher,
    PluginKind.CREDENTIAL_COMPOSER: Composer,
    PluginKind.UPSTREAM_AUTHORITY: UpstreamAuthority,
}

if __name__ == "__main__":
    wanted = PluginKind(sys.argv[1])
    sys.exit(serve(wanted, CLASSES[wanted]))
