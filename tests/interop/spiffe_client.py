"""Run by `test_workload_clients.py` in a process of its own: PyPI's `spiffe` brings its own messages.

Prints one JSON object per line: what the client got, then one for every rotation it sees.
"""

from __future__ import annotations

import json
import sys

from spiffe import WorkloadApiClient, X509Source


def tell(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    socket = sys.argv[1]
    with WorkloadApiClient(socket) as client:
        context = client.fetch_x509_context()
        svid = context.default_svid
        bundle = context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        assert bundle is not None
        token = client.fetch_jwt_svid(audience={"db"})
        checked = client.validate_jwt_svid(token.token, audience="db")
        jwt_bundles = client.fetch_jwt_bundles()
        jwt_bundle = jwt_bundles.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
        assert jwt_bundle is not None
        tell(
            x509=str(svid.spiffe_id),
            serial=str(svid.leaf.serial_number),
            chain=len(svid.cert_chain),
            authorities=len(bundle.x509_authorities),
            jwt=str(token.spiffe_id),
            audience=sorted(token.audience),
            validated=str(checked.spiffe_id),
            jwt_authorities=len(jwt_bundle.jwt_authorities),
        )
    with X509Source(socket_path=socket) as source:
        seen = str(source.svid.leaf.serial_number)
        tell(source=seen)

        def changed() -> None:
            tell(rotated=str(source.svid.leaf.serial_number))

        source.subscribe_for_updates(changed)
        sys.stdin.read()  # until the test has seen enough


if __name__ == "__main__":
    main()
