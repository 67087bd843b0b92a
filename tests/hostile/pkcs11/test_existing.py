"""Rows 16, 65 and 66 of the fault list for a key that an operator has made, a root's perhaps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from spire_hw.errors import AlreadyExistsError, ErrorKind
from spire_hw.key import HashAlgorithm, KeyType, SignOptions
from spire_hw.log import get_logger
from spire_hw.pkcs11.errors import TokenError
from spire_hw.pkcs11.existing import make_key
from spire_hw.pkcs11.pool.pin import Refusals
from spire_hw.pkcs11.pool.place import Pins, place_of_uri
from spire_hw_sim.pkcs11faults import Fault, Faults
from spire_hw_sim.softhsm import SoftHsm

if TYPE_CHECKING:
    from spire_hw.pkcs11.existing import ExistingKey
    from spire_hw_sim.tokenrig import TokenRig

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.hsm,
    pytest.mark.skipif(SoftHsm.find_module() is None, reason="SoftHSM is not installed"),
]
SHA384 = SignOptions(HashAlgorithm.SHA384)
CKA_EXTRACTABLE, CKA_EC_POINT = 0x162, 0x181


class Root:
    """Makes one key on a token that fails as planned."""

    def __init__(self, rig: TokenRig) -> None:
        self.faults = Faults(rig.folder / "faults", rig.hsm.module)
        uri = (
            f"pkcs11:token=spire;object=root?module-path={rig.hsm.module}&pin-source={rig.pin_file}"
        )
        environment = {**rig.hsm.environment, **self.faults.environment()}
        self.place = replace(place_of_uri(uri), environment=environment)
        self._pins = Pins(Refusals())

    async def make(self) -> ExistingKey:
        guard = self._pins.guard(self.place)
        return await make_key(self.place, guard, get_logger("test"), KeyType.EC_P384)


@pytest.mark.parametrize(
    ("fault", "words", "kind"),
    [
        (
            Fault("C_GetAttributeValue", attributes={CKA_EXTRACTABLE: "01"}),
            "violates policy: EXTRACTABLE",
            ErrorKind.FAILED_PRECONDITION,
        ),
        (
            Fault("C_GetAttributeValue", attributes={CKA_EC_POINT: None}),
            "does not show its public half",
            ErrorKind.INTERNAL,
        ),
        (
            Fault("C_Sign", signature="flipped"),
            "does not verify",
            ErrorKind.FAILED_PRECONDITION,
        ),
    ],
    ids=["evidence", "public half", "signature"],
)
async def test_faults_65_and_66_a_root_that_is_unfit_is_not_left_behind(
    rig: TokenRig, fault: Fault, words: str, kind: ErrorKind
) -> None:
    root = Root(rig)
    root.faults.set(fault)
    with pytest.raises(TokenError, match=words) as caught:
        await root.make()
    assert caught.value.kind is kind
    assert rig.objects() == []
    root.faults.clear()
    key = await root.make()
    await key.sign(bytes(48), SHA384)
    await key.close()
    # One that is fit stays where it is, whoever asks for another.
    made = rig.objects()
    with pytest.raises(AlreadyExistsError, match='labelled "root"'):
        await root.make()
    assert rig.objects() == made
