r"""Orders of operators: what is to be done, and who has signed that it is (pure).

An order file is canonical JSON, `{"order": {...}, "signatures": {"<name>": "<hex>"}}`. What each
operator signs with Ed25519 is `"spire-hw signer order v1\n"` followed by the canonical JSON of the
order. It names one action and its target, when it expires, and a record of this signer's audit log
with its chain value: it fits no other log, and none that was rewritten. Each is carried out once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from spire_hw.errors import DeniedError, EncodingError, InvalidInputError
from spire_hw_signer.audit.chain import LogHead
from spire_hw_signer.audit.record import (
    MAX_TEXT,
    canonical,
    load_canonical,
    parse_time,
    time_text,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

WHAT: Final = "order file"
MAX_ORDER_BYTES: Final = 64 * 1024
MAX_LIFE: Final = timedelta(days=7)
_DOMAIN: Final = b"spire-hw signer order v1\n"
_NONCE: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)
_HASH: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}", re.ASCII)
_GENERATION: Final = re.compile(
    r"([^/@]{1,255})/([^/@]{1,64})/([A-Za-z0-9._+-]{1,255})@([0-9]{1,9})", re.ASCII
)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", re.ASCII)
_MAX_SEQ: Final = 2**63 - 1
_MAX_SIGNATURES: Final = 64


class Action(Enum):
    """What operators may have done; the target of each is told beside it."""

    KEY_RESTORE = "key.restore"  # trust domain/server/key id@generation
    KEY_DESTROY = "key.destroy"  # likewise
    CLIENT_REVOKE = "client.revoke"  # identity of a client, as in the policy
    CLIENT_UNREVOKE = "client.unrevoke"  # likewise
    POLICY_RELOAD = "policy.reload"  # SHA-256 of the policy, hexadecimal
    CLOCK_ACCEPT = "clock.accept"  # nothing
    LOG_SEAL = "log.seal"  # what `log seal -dryRun` shows

    @classmethod
    def parse(cls, text: str) -> Action:
        """Return the action of a name.

        Raises:
            InvalidInputError: there is none; the message lists those there are.
        """
        for one in cls:
            if one.value == text:
                return one
        known = ", ".join(one.value for one in cls)
        raise InvalidInputError(f"action {text[:64]!a} is unknown; use one of {known}")


# What one operator may do at once: it takes rights away and gives none.
ALONE: Final = frozenset({Action.CLIENT_REVOKE})


class OrderError(DeniedError):
    """An order that is not carried out.

    Attributes:
        code: stable word for machines, such as `expired`.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"order refused: {message} [{code}]")
        self.code = code


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be done.

    Attributes:
        action: what.
        target: to what; its form hangs on the action.
        expires: it is not carried out after that.
        log: id of the audit log of the signer that is meant.
        head: a record of that log and its chain value.
        nonce: 16 bytes in hexadecimal; each is good for once.
        comment: why, for the log's readers.
    """

    action: Action
    target: str
    expires: datetime
    log: str
    head: LogHead
    nonce: str
    comment: str = ""

    def content(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "action": self.action.value,
            "comment": self.comment,
            "expires": time_text(self.expires),
            "head": self.head.hash.hex(),
            "log": self.log,
            "nonce": self.nonce,
            "seq": self.head.seq,
            "target": self.target,
        }

    def statement(self) -> bytes:
        """Return what operators sign."""
        return _DOMAIN + canonical(self.content())


@dataclass(frozen=True, slots=True)
class SignedOrder:
    """An order and what was signed of it, by the names of operators; nothing is verified yet."""

    order: Order
    signatures: Mapping[str, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the file."""
        signatures = {name: made.hex() for name, made in self.signatures.items()}
        return canonical({"order": self.order.content(), "signatures": signatures}) + b"\n"

    def sign(self, name: str, key: Ed25519PrivateKey) -> SignedOrder:
        """Return it with one more signature.

        Raises:
            InvalidInputError: a name that is none, or one that has signed.
        """
        check_name(name)
        if name in self.signatures:
            raise InvalidInputError(
                f"{name} has signed this order already; if that was with a wrong key, make a new one"
            )
        made = key.sign(self.order.statement())
        return replace(self, signatures={**self.signatures, name: made})


@dataclass(frozen=True, slots=True)
class Operators:
    """Who may order, and how many have to agree.

    Attributes:
        keys: the operators' keys by their names; empty when one at the admin socket is enough.
        required: how many of them.
    """

    keys: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    required: int = 0

    def need_order(self, action: Action) -> bool:
        """Tell whether an action needs an order file."""
        return bool(self.required) and action not in ALONE

    def describe(self) -> str:
        """Return whose signatures an order needs."""
        return f"{self.required} of {', '.join(sorted(self.keys))}"


def check_name(name: str) -> str:
    """Return a name an operator can have.

    Raises:
        InvalidInputError: it is none.
    """
    if _NAME.fullmatch(name) is None:
        raise InvalidInputError(
            f"operator {name[:64]!a} is no name: 1 to 64 letters, digits, '.', '_', '@' and '-'"
        )
    return name


def parse_generation(target: str) -> tuple[str, str, int]:
    """Return owner, key id and generation of a target.

    Raises:
        InvalidInputError: it is no generation of a key.
    """
    found = _GENERATION.fullmatch(target)
    if found is None:
        raise InvalidInputError(
            f"target {target[:300]!a} is no generation of a key; expected TRUST-DOMAIN/SERVER/"
            "KEY-ID@GENERATION as `spire-hw-signer key list` shows it"
        )
    return f"{found[1]}/{found[2]}", found[3], int(found[4])


def check_target(action: Action, target: str) -> None:
    """Check the form of a target, so that nobody signs what cannot be carried out.

    Raises:
        InvalidInputError: the action cannot be done to it.
    """
    if action in {Action.KEY_RESTORE, Action.KEY_DESTROY}:
        parse_generation(target)
    if action is Action.POLICY_RELOAD and target and _HASH.fullmatch(target) is None:
        raise InvalidInputError(
            f"target {target[:300]!a} is no policy; expected what `spire-hw-signer policy hash` "
            "prints, or nothing"
        )
    if action in {Action.CLIENT_REVOKE, Action.CLIENT_UNREVOKE} and not target:
        raise InvalidInputError("a target is required: the client's name in the policy")


def parse_order(data: bytes) -> SignedOrder:
    """Read an order file.

    Raises:
        EncodingError: it is none, or not spelled as `SignedOrder.encode` does.
    """
    if len(data) > MAX_ORDER_BYTES:
        raise EncodingError(WHAT, f"is larger than {MAX_ORDER_BYTES} bytes")
    whole = load_canonical(data.removesuffix(b"\n"), WHAT)
    if set(whole) != {"order", "signatures"}:
        raise EncodingError(WHAT, "expected the members order and signatures")
    return SignedOrder(_read_order(whole["order"]), _read_signatures(whole["signatures"]))


def verify_order(
    signed: SignedOrder,
    operators: Operators,
    *,
    now: datetime,
    log: str,
    hash_at: bytes | None,
    is_used: bool,
) -> tuple[str, ...]:
    """Check that an order is to be carried out, here and now.

    Args:
        signed: the order.
        operators: who may order.
        now: the time.
        log: id of the audit log.
        hash_at: what the audit log has as chain value of the record that the order names.
        is_used: the nonce was used before.

    Returns:
        The names of those who signed it.

    Raises:
        OrderError: it is not.
    """
    order = signed.order
    names = _verify_signatures(signed, operators)
    if len({_raw(operators.keys[name]) for name in names}) < max(1, operators.required):
        raise OrderError(
            "too_few", f"{', '.join(names) or 'nobody'} signed, needed are {operators.describe()}"
        )
    if order.log != log:
        raise OrderError("other_log", f"it is for the signer whose audit log is {order.log}")
    if hash_at is None or hash_at != order.head.hash:
        raise OrderError(
            "other_head", f"the audit log has another record {order.head.seq} than it names"
        )
    if is_used:
        raise OrderError("replayed", "it was carried out before")
    if now >= order.expires:
        raise OrderError("expired", f"it expired at {time_text(order.expires)}")
    if order.expires - now > MAX_LIFE:
        raise OrderError("too_long", f"it is valid for more than {MAX_LIFE.days} days")
    return names


def _verify_signatures(signed: SignedOrder, operators: Operators) -> tuple[str, ...]:
    statement = signed.order.statement()
    for name, signature in signed.signatures.items():
        key = operators.keys.get(name)
        if key is None:
            raise OrderError("unknown_operator", f"{name} is no operator of this signer")
        try:
            key.verify(signature, statement)
        except InvalidSignature as e:
            text = f"the signature of {name} does not hold"
            raise OrderError("signature", text) from e
    return tuple(sorted(signed.signatures))


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def _read_order(members: Any) -> Order:
    names = {"action", "comment", "expires", "head", "log", "nonce", "seq", "target"}
    if not isinstance(members, dict) or set(members) != names:
        raise EncodingError(WHAT, f"expected an order with the members {', '.join(sorted(names))}")
    seq = members["seq"]
    if type(seq) is not int or not 1 <= seq <= _MAX_SEQ:
        raise EncodingError(WHAT, "seq is not a whole number from 1")
    for name, pattern in {"head": _HASH, "log": _NONCE, "nonce": _NONCE}.items():
        if not isinstance(members[name], str) or pattern.fullmatch(members[name]) is None:
            raise EncodingError(WHAT, f"{name} is not lower-case hexadecimal of its length")
    for name in ("comment", "target", "action", "expires"):
        text = members[name]
        if not isinstance(text, str) or len(text) > MAX_TEXT or not text.isprintable():
            raise EncodingError(WHAT, f"{name} is not one line of text")
    try:
        action = Action.parse(members["action"])
        expires = parse_time(members["expires"])
    except InvalidInputError as e:
        raise EncodingError(WHAT, e.message) from e
    return Order(
        action=action,
        target=members["target"],
        expires=expires,
        log=members["log"],
        head=LogHead(seq, bytes.fromhex(members["head"])),
        nonce=members["nonce"],
        comment=members["comment"],
    )


def _read_signatures(members: Any) -> dict[str, bytes]:
    if not isinstance(members, dict) or len(members) > _MAX_SIGNATURES:
        raise EncodingError(WHAT, f"expected up to {_MAX_SIGNATURES} signatures by name")
    found = {}
    for name, text in members.items():
        if _NAME.fullmatch(name) is None:
            raise EncodingError(WHAT, "a signature has no operator's name")
        if not isinstance(text, str) or _SIGNATURE.fullmatch(text) is None:
            raise EncodingError(WHAT, f"the signature of {name} is not 64 bytes in hexadecimal")
        found[name] = bytes.fromhex(text)
    return found
