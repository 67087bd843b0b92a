from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from spire_hw.errors import ChainError
from spire_hw.x509.chain import UnknownAuthorityError, find_paths, verify_chain

if TYPE_CHECKING:
    from tests.unit.spire_hw.x509.conftest import Mint

NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


class Tree:
    """A root, an intermediate and a leaf below it; and a leaf right below the root."""

    def __init__(self, mint: Mint) -> None:
        self.mint = mint
        self.root_key, self.middle_key, self.leaf_key = mint.key(), mint.key(), mint.key()
        self.root = self.anchor()
        self.middle = self.intermediate()
        self.leaf = self.end("middle", self.middle_key)
        self.direct = self.end("root", self.root_key)

    def anchor(self, **shape: object) -> x509.Certificate:
        shape.setdefault("usage", self.mint.usage())
        return self.mint.certificate("root", self.root_key, "root", self.root_key, **shape)  # type: ignore[arg-type]

    def intermediate(self, **shape: object) -> x509.Certificate:
        shape.setdefault("usage", self.mint.usage())
        return self.mint.certificate("middle", self.middle_key, "root", self.root_key, **shape)  # type: ignore[arg-type]

    def end(
        self, issuer: str, key: ec.EllipticCurvePrivateKey, **shape: object
    ) -> x509.Certificate:
        shape.setdefault("ca", False)
        return self.mint.certificate("leaf", self.leaf_key, issuer, key, **shape)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tree(mint: Mint) -> Tree:
    return Tree(mint)


def test_paths_with_and_without_intermediates(tree: Tree) -> None:
    assert verify_chain(tree.direct, [], [tree.root], NOW) == [tree.direct, tree.root]
    assert verify_chain(tree.leaf, [tree.middle], [tree.root], NOW) == [
        tree.leaf,
        tree.middle,
        tree.root,
    ]


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 2048),
        rsa.generate_private_key(65537, 3072),
    ],
)
def test_keys_of_other_kinds_at_every_place(
    tree: Tree, mint: Mint, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
) -> None:
    root = mint.certificate("other", key, "other", key)
    leaf = mint.certificate("leaf", key, "other", key, ca=False)
    assert verify_chain(leaf, [], [root], NOW) == [leaf, root]
    middle = mint.certificate("between", key, "root", tree.root_key)
    below = mint.certificate("leaf", tree.leaf_key, "between", key, ca=False)
    assert verify_chain(below, [middle], [tree.root], NOW) == [below, middle, tree.root]


def test_a_root_in_the_chain_and_an_intermediate_as_anchor_are_fine(tree: Tree) -> None:
    assert verify_chain(tree.leaf, [tree.middle, tree.root], [tree.root], NOW)[-1] == tree.root
    assert verify_chain(tree.leaf, [], [tree.middle], NOW) == [tree.leaf, tree.middle]


def test_the_right_root_is_found_among_several(tree: Tree, mint: Mint) -> None:
    key = mint.key()
    others = [mint.certificate("root", key, "root", key), mint.certificate("x", key, "x", key)]
    assert verify_chain(tree.direct, [], [*others, tree.root], NOW)[-1] == tree.root


def test_there_is_a_path_to_each_root_that_signed_it(tree: Tree, mint: Mint) -> None:
    twin = tree.anchor(usage=None)  # the same name and key in another certificate
    stranger = mint.certificate("else", mint.key(), "else", mint.key())
    namesake = mint.certificate("root", mint.key(), "root", mint.key())
    roots = [stranger, tree.root, namesake, twin]
    assert find_paths(tree.leaf, [tree.middle], roots, NOW) == [
        [tree.leaf, tree.middle, tree.root],
        [tree.leaf, tree.middle, twin],
    ]
    assert find_paths(tree.direct, [], iter([tree.root]), NOW) == [[tree.direct, tree.root]]


def test_no_path_to_any_root(tree: Tree, mint: Mint) -> None:
    stranger = mint.certificate("else", mint.key(), "else", mint.key())
    namesake = mint.certificate("root", mint.key(), "root", mint.key())
    for roots in ([], [stranger]):
        with pytest.raises(UnknownAuthorityError, match="no authority that is trusted here"):
            find_paths(tree.leaf, [tree.middle], roots, NOW)
    with pytest.raises(UnknownAuthorityError, match="signed by an unknown authority"):
        find_paths(tree.leaf, [tree.middle], [namesake], NOW)
    with pytest.raises(ChainError, match="has expired"):
        find_paths(tree.leaf, [tree.middle], [tree.root, namesake], NOW + 1000 * HOUR)


def test_roots_need_no_key_usage(tree: Tree) -> None:
    bare = tree.anchor(usage=None)
    assert verify_chain(tree.leaf, [tree.middle], [bare], NOW)[-1] == bare


def test_cross_signed_intermediates_are_tried_both(tree: Tree, mint: Mint) -> None:
    foreign = mint.certificate("middle", tree.middle_key, "elsewhere", mint.key())
    for order in ([foreign, tree.middle], [tree.middle, foreign]):
        assert verify_chain(tree.leaf, order, [tree.root], NOW)[1] == tree.middle


def test_an_unknown_authority_is_told_apart(tree: Tree, mint: Mint) -> None:
    key = mint.key()
    same_name = mint.certificate("root", key, "root", key)
    for roots in ([same_name], []):
        with pytest.raises(UnknownAuthorityError):
            verify_chain(tree.direct, [], roots, NOW)
    with pytest.raises(UnknownAuthorityError):
        verify_chain(tree.leaf, [], [tree.root], NOW)


def test_time_is_passed_in(tree: Tree) -> None:
    edges = tree.end("root", tree.root_key, start=NOW, end=NOW + HOUR)
    verify_chain(edges, [], [tree.root], NOW)
    verify_chain(edges, [], [tree.root], NOW + HOUR)
    with pytest.raises(ChainError, match="expired"):
        verify_chain(edges, [], [tree.root], NOW + HOUR + timedelta(seconds=1))
    with pytest.raises(ChainError, match="not valid before"):
        verify_chain(edges, [], [tree.root], NOW - timedelta(seconds=1))


def test_every_certificate_has_to_be_in_time(tree: Tree) -> None:
    past = {"start": NOW - 2 * HOUR, "end": NOW - HOUR}
    with pytest.raises(ChainError, match="expired"):
        verify_chain(tree.leaf, [tree.intermediate(**past)], [tree.root], NOW)
    with pytest.raises(ChainError):
        verify_chain(tree.direct, [], [tree.anchor(**past)], NOW)


def test_issuers_have_to_be_certificate_authorities(tree: Tree, mint: Mint) -> None:
    for wrong in (
        tree.intermediate(ca=False),
        tree.intermediate(ca=None),
        tree.intermediate(usage=mint.usage(key_cert_sign=False)),
    ):
        with pytest.raises(ChainError):
            verify_chain(tree.leaf, [wrong], [tree.root], NOW)
    for wrong in (tree.anchor(ca=False), tree.anchor(ca=None)):
        with pytest.raises(ChainError):
            verify_chain(tree.direct, [], [wrong], NOW)


def test_an_svid_cannot_issue_svids(tree: Tree, mint: Mint) -> None:
    below = mint.certificate("below", mint.key(), "leaf", tree.leaf_key, ca=False)
    with pytest.raises(ChainError):
        verify_chain(below, [tree.direct], [tree.root], NOW)


def test_path_length_is_kept(tree: Tree) -> None:
    short = tree.anchor(path_length=0)
    verify_chain(tree.direct, [], [short], NOW)
    with pytest.raises(ChainError):
        verify_chain(tree.leaf, [tree.middle], [short], NOW)


def test_a_ca_is_no_leaf_and_a_leaf_no_root(tree: Tree, mint: Mint) -> None:
    with pytest.raises(ChainError):
        verify_chain(tree.middle, [], [tree.root], NOW)
    with pytest.raises(ChainError):
        verify_chain(tree.direct, [], [tree.direct], NOW)
    alone = mint.certificate("self", tree.leaf_key, "self", tree.leaf_key, ca=False)
    with pytest.raises(ChainError):
        verify_chain(alone, [], [alone], NOW)


def test_unknown_critical_extensions_are_refused(tree: Tree) -> None:
    value = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    verify_chain(tree.end("root", tree.root_key, extra=((value, False),)), [], [tree.root], NOW)
    with pytest.raises(ChainError):
        verify_chain(tree.end("root", tree.root_key, extra=((value, True),)), [], [tree.root], NOW)


def test_weak_keys_anywhere_in_the_chain_are_refused(tree: Tree, mint: Mint) -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 - to be refused
    leaf = mint.certificate("leaf", weak, "root", tree.root_key, ca=False)
    with pytest.raises(ChainError, match="key"):
        verify_chain(leaf, [], [tree.root], NOW)
    middle = mint.certificate("weak", weak, "root", tree.root_key)
    below = mint.certificate("leaf", tree.leaf_key, "weak", weak, ca=False)
    with pytest.raises(ChainError, match="key"):
        verify_chain(below, [middle], [tree.root], NOW)


def _ladder(tree: Tree, count: int) -> tuple[x509.Certificate, list[x509.Certificate]]:
    above, key = "root", tree.root_key
    rungs = []
    for i in range(count):
        own = tree.mint.key()
        rungs.append(tree.mint.certificate(f"rung{i}", own, above, key))
        above, key = f"rung{i}", own
    return tree.end(above, key), rungs


def test_ten_certificates_are_enough(tree: Tree) -> None:
    leaf, rungs = _ladder(tree, 9)
    assert len(verify_chain(leaf, rungs, [tree.root], NOW)) == 11
    leaf, rungs = _ladder(tree, 10)
    with pytest.raises(ChainError, match="more than 10"):
        verify_chain(leaf, rungs, [tree.root], NOW)


def test_certificates_that_sign_each_other_do_not_blow_up_the_search(
    tree: Tree, mint: Mint
) -> None:
    key = mint.key()
    same = [mint.certificate("x", key, "x", key) for _ in range(9)]
    with pytest.raises(UnknownAuthorityError):
        verify_chain(tree.end("x", key), same, [tree.root], NOW)
    keys = [mint.key() for _ in range(9)]
    ring = [
        mint.certificate(f"{i}", keys[i], f"{(i + 1) % 9}", keys[(i + 1) % 9]) for i in range(9)
    ]
    with pytest.raises(UnknownAuthorityError):
        verify_chain(tree.end("0", keys[0]), ring, [tree.root], NOW)
