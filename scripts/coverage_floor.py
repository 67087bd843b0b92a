"""Prints line coverage by room from build/coverage.json; fails when the security core is below its floor."""

from __future__ import annotations

import json
import sys
from pathlib import Path

FLOOR = 90.0
# The security core: a room and the paths its files start with.
CORE = {
    "server ca": ("server/spire_hw_server/ca/",),
    "server api": ("server/spire_hw_server/api/",),
    "server admission": ("server/spire_hw_server/admission.py",),
    "server entries, bundles": (
        "server/spire_hw_server/entries.py",
        "server/spire_hw_server/bundles.py",
    ),
    "library x509": ("spire_hw/x509/",),
    "library jose": ("spire_hw/jose/",),
    "library svid": ("spire_hw/svid/",),
    "library bundle": ("spire_hw/bundle/",),
    "tpm verifier": tuple(
        f"spire_hw/tpm/{name}.py"
        for name in (
            *("wire", "public", "credential", "verify"),
            *("ekcert", "ekmodel", "certificate", "certsig", "crl", "der"),
        )
    ),
    "tpm makers": tuple(
        f"spire_hw/tpm/{name}.py" for name in ("cabinet", "caimport", "castore", "crlfiles")
    ),
    "tpm attestor, server": (
        "plugins/spire_hw_plugins/nodeattestor/tpm/server.py",
        "plugins/spire_hw_plugins/nodeattestor/tpm/exchanges.py",
        "plugins/spire_hw_plugins/nodeattestor/tpm/wire.py",
        "plugins/spire_hw_plugins/nodeattestor/tpm/config.py",
    ),
    "posture": ("spire_hw/posture/", "server/spire_hw_server/posture/"),
    "pkcs11, host side": tuple(
        f"spire_hw/pkcs11/{name}/" for name in ("pool", "inventory", "keyring", "cluster")
    ),
    "keymanager remote": ("plugins/spire_hw_plugins/keymanager/remote/",),
    "signer": tuple(
        f"server/spire_hw_signer/{name}"
        for name in (
            *(
                "audit/",
                "devicelog/",
                "policy.py",
                "purpose.py",
                "tokenpurpose.py",
                "rates.py",
                "replay.py",
            ),
            *("admission.py", "service.py", "generating.py", "orders.py", "actions.py", "keys.py"),
        )
    ),
    "evidence": ("spire_hw/evidence/",),
    "transport": ("spire_hw/transport/",),
    "rpc": ("spire_hw/rpc/",),
}


def main(report: Path) -> int:
    """Print the table and return the exit status."""
    files = json.loads(report.read_text())["files"]
    low = []
    for room, starts in CORE.items():
        held = {n: f["summary"] for n, f in files.items() if n.startswith(starts)}
        lines = sum(s["num_statements"] for s in held.values())
        if not lines:
            low.append(f"{room}: no file was measured")
            continue
        share = 100 * sum(s["covered_lines"] for s in held.values()) / lines
        mark = "" if share >= FLOOR else "  below the floor"
        sys.stdout.write(f"{room:<26} {share:6.1f} %  of {lines} lines{mark}\n")
        if mark:
            worst = sorted(
                held.items(), key=lambda item: item[1]["covered_lines"] - item[1]["num_statements"]
            )
            names = ", ".join(f"{n} ({s['percent_covered']:.0f} %)" for n, s in worst[:3])
            low.append(f"{room}: {share:.1f} % is below {FLOOR:g} %; see {names}")
    for line in low:
        sys.stderr.write(f"coverage: {line}\n")
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/coverage.json")))
