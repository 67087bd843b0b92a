from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spire_hw.errors import NotReadyError
from spire_hw_agent.storage import AgentData, Storage
from spire_hw_sim.pki import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CA = Authority("example.org")
OTHER = Authority("example.org")
SVID = (CA.identity("spiffe://example.org/spire/agent/x/1").chain_der[0],)
FILE = "agent-data.json"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Storage]:
    made = Storage(tmp_path)
    yield made
    made.close()


def reopened(directory: Path) -> AgentData:
    again = Storage(directory)
    try:
        return again.load()
    finally:
        again.close()


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    first = Storage(tmp_path)
    assert first.load() == AgentData()
    first.store_bundle((CA.der, OTHER.der))
    first.store_svid(SVID, reattestable=True)
    first.close()
    assert reopened(tmp_path) == AgentData(SVID, (CA.der, OTHER.der), reattestable=True)


def test_the_format_is_upstreams(storage: Storage, tmp_path: Path) -> None:
    storage.store_bundle((CA.der,))
    document = json.loads((tmp_path / FILE).read_text())
    pem = base64.b64decode(document["bundle"][0]).decode()
    assert ssl.PEM_cert_to_DER_cert(pem) == CA.der
    assert document["svid"] == []
    assert document["reattestable"] is False
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_members_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"bootstrap_use": 2, "connection_attempts": 7}))
    storage = Storage(tmp_path)
    storage.store_bundle((CA.der,))
    storage.close()
    document = json.loads((tmp_path / FILE).read_text())
    assert (document["bootstrap_use"], document["connection_attempts"]) == (2, 7)


def test_dropping_the_svid_keeps_the_bundle(storage: Storage, tmp_path: Path) -> None:
    storage.store_bundle((CA.der,))
    storage.store_svid(SVID, reattestable=True)
    storage.drop_svid()
    assert storage.load() == AgentData(bundle=(CA.der,))
    assert json.loads((tmp_path / FILE).read_text())["svid"] == []


def test_one_process_at_a_time(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="in use by another agent"):
        Storage(tmp_path)


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotReadyError, match="cannot be used"):
        Storage(tmp_path / "file")


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "else").write_text("{}")
    (tmp_path / FILE).symlink_to(tmp_path / "else")
    with pytest.raises(NotReadyError):
        reopened(tmp_path)


def test_writers_in_threads_lose_nothing(storage: Storage, tmp_path: Path) -> None:
    bundles = [(CA.der,), (OTHER.der,), (CA.der, OTHER.der)]

    def store_bundles() -> None:
        for number in range(30):
            storage.store_bundle(bundles[number % 3])

    def store_svids() -> None:
        for number in range(30):
            storage.store_svid(SVID, reattestable=bool(number % 2))

    threads = [threading.Thread(target=t) for t in (store_bundles, store_svids)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    storage.close()
    storage._lock_fd = os.open(os.devnull, os.O_RDONLY)
    assert reopened(tmp_path) == AgentData(SVID, bundles[2], reattestable=True)


_KILLED = """
import os, sys, threading
from pathlib import Path
from spire_hw_agent.storage import Storage
der = bytes.fromhex(sys.argv[2])
storage = Storage(Path(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    storage.store_bundle((der,) * (1 + number % 40))
"""


def test_kill_9_leaves_the_old_or_the_new_content(tmp_path: Path) -> None:
    for _ in range(4):
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", _KILLED, str(tmp_path), CA.der.hex()], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        with child.stdout:
            child.stdout.readline()
            while not (tmp_path / FILE).exists():
                pass
            child.kill()
            child.wait()
        found = reopened(tmp_path)
        assert found.bundle
        assert set(found.bundle) == {CA.der}
    kept = {p.name for p in tmp_path.iterdir()}
    assert kept <= {FILE, f".{FILE}.new", ".spire-hw-agent.lock"}


def _good() -> bytes:
    def line(der: bytes) -> str:
        return base64.b64encode(ssl.DER_cert_to_PEM_cert(der).encode()).decode()

    document = {"svid": [line(SVID[0])], "bundle": [line(CA.der)], "reattestable": True}
    return json.dumps(document).encode()


GOOD = _good()
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return the file cut, with bytes changed, with members replaced, or as something else."""
    kind = draw(st.sampled_from(["cut", "bytes", "member", "other"]))
    if kind == "cut":
        return GOOD[: draw(st.integers(0, len(GOOD) - 1))]
    if kind == "bytes":
        raw = bytearray(GOOD)
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        return bytes(raw)
    if kind == "member":
        document = json.loads(GOOD)
        document[draw(st.sampled_from(sorted(document)))] = draw(_json)
        return json.dumps(document).encode()
    return draw(st.binary(max_size=64) | _json.map(lambda v: json.dumps(v).encode()))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=damaged())
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    try:
        found = reopened(tmp_path)
    except NotReadyError as e:
        assert FILE in e.message  # noqa: PT017 - both ends are right
        assert "remove the file" in e.message  # noqa: PT017
        assert (tmp_path / FILE).read_bytes() == content
    else:
        assert all(isinstance(der, bytes) for der in (*found.svid, *found.bundle))
