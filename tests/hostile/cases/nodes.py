"""DevIDs, identities and what is stored of them; servers that are hostile to agents."""

from __future__ import annotations

from typing import Final

from tests.hostile.cases.case import DE, FP, IA, IN, PD, RE, UN, Case

_DEVID: Final = "tpm_devid/server:"
_DRIFT: Final = "tpm/drift:change_that_nothing_explains"
_CUT_OFF: Final = "tpm/drift:node_that_was_sent_away"
_BEATS: Final = "tpm/heartbeats:answer_that_does_not_hold"
_CHALLENGE: Final = "unit/nodeattestor/tpm_wire:hostile_challenge_is_refused"
_REAL: Final = "integration/tpm/attestation:a_hostile_server_gets_no_statement"

CASES: Final = (
    Case(
        187,
        "no certificate, or fifty",
        IA,
        "devid: certificate is missing|more than 10|malformed|DevIDCert",
        (
            f"{_DEVID}the_certificate_is_missing_or_there_are_fifty",
            f"{_DEVID}without_a_certificate",
        ),
    ),
    Case(
        188,
        "a certificate nobody should trust",
        (*PD, *IA),
        r"\[devid_untrusted\]|devid: ",
        (f"{_DEVID}certificates_nobody_should_trust",),
    ),
    Case(
        189,
        "another key in the TPM than in the certificate",
        IA,
        r"certificate and TPM key are different keys \[devid_key_mismatch\]",
        (f"{_DEVID}the_key_in_the_tpm_is_another_than_the_certificates",),
    ),
    Case(
        190,
        "an attestation key that proves nothing",
        IA,
        r"\[ak_attributes\]",
        (f"{_DEVID}attestation_keys_that_prove_nothing",),
    ),
    Case(
        191,
        "a signature of another type",
        IA,
        "does not fit the key",
        (f"{_DEVID}a_signature_of_another_type_than_its_key",),
    ),
    Case(
        192,
        "a DevID that can leave",
        IA,
        r"\[devid_attributes\]",
        (f"{_DEVID}devid_keys_that_can_leave_or_came_from_elsewhere",),
    ),
    Case(
        193,
        "a statement about something else",
        IA,
        r"\[(certify_\w+|magic|nonce_mismatch)\]",
        (f"{_DEVID}statements_that_say_something_else",),
    ),
    Case(
        194,
        "a signature over something else",
        IA,
        "nonce signature does not verify",
        (f"{_DEVID}signatures_over_something_else",),
    ),
    Case(
        195,
        "half an answer",
        IA,
        "devid: answer is incomplete|is missing",
        (f"{_DEVID}half_an_answer_is_none",),
    ),
    Case(
        196,
        "an endorsement key that is not the certificate's",
        IA,
        r"\[ek_key_mismatch\]|\[ek_signing_key\]",
        (f"{_DEVID}endorsement_keys_that_are_not_the_certificates",),
    ),
    Case(
        197,
        "common names that are none",
        IA,
        "subject common name is not acceptable",
        (f"{_DEVID}common_names_that_are_not_acceptable",),
    ),
    Case(
        198,
        "another TPM under one identity",
        PD,
        r"\[duplicate_id\]",
        ("tpm/drift:another_tpm_under_one_identity",),
    ),
    Case(199, "two machines with one TPM identity", PD, r"\[cloned_tpm\]", (_DRIFT,)),
    Case(200, "a banned node", PD, "is banned", (_CUT_OFF,)),
    Case(
        201,
        "a banned node with another certificate",
        PD,
        "is banned",
        ("tpm/drift:banned_node_with_another_certificate",),
    ),
    Case(202, "a quarantined node, unchanged", PD, "quarantined", (_CUT_OFF,)),
    Case(
        203,
        "an evicted node's last exchange",
        IA,
        r"challenge: secret does not match \[secret_mismatch\]",
        ("tpm/drift:evicted_node_does_not_come_back_by_its_last_exchange",),
    ),
    Case(
        204,
        "an ID the node chose",
        IA,
        "unknown member spire_hw.id",
        ("tpm/envelope:node_cannot_choose_its_identity",),
    ),
    Case(
        205,
        "no policy for this node",
        FP,
        r"policy: no policy applies to this node \(default is deny\) \[no_policy\]",
        ("tpm/policies:no_policy_for_a_node_is_a_denial",),
    ),
    Case(
        206,
        "two exchanges of one node at once",
        RE,
        "this node is attesting already",
        ("tpm/envelope:one_node_has_one_exchange_at_a_time",),
    ),
    Case(
        207,
        "a client that goes away before the result",
        UN,
        "",
        ("server/aftermath:node_that_goes_away_after_its_answer_is_known_or_not",),
        "ends in no refusal: all is stored or nothing",
    ),
    Case(
        208,
        "a store that fails",
        IN,
        "internal error",
        ("server/aftermath:store_that_fails_at_any_statement_stores_nothing",),
    ),
    Case(
        209,
        "a CA that fails",
        IN,
        "internal error",
        ("server/aftermath:ca_that_cannot_sign_makes_no_node",),
    ),
    Case(
        210,
        "a policy that changed in between",
        PD,
        r"policy: PCR 4 is not among the allowed values.*\[pcr_mismatch\]",
        ("tpm/policies:of_two_versions_the_newer_is_applied",),
    ),
    Case(
        211,
        "a clock that jumps in between",
        DE,
        "",
        ("tpm/envelope:wall_clock_jump_does_not_expire_the_challenge",),
        "nothing is refused: the limit goes by the monotonic clock",
    ),
    Case(
        212,
        "a heartbeat with another node's certificate",
        PD,
        "",
        ("server/heartbeats:svid_that_was_superseded",),
    ),
    Case(
        213,
        "a heartbeat of another attestation key",
        IA,
        r"\[(quote_signature|nonce_mismatch|evidence_missing)\]",
        (_BEATS,),
    ),
    Case(
        214,
        "heartbeats withheld",
        DE,
        "",
        ("server/heartbeats:withheld_answers_end_the_stream_and_are_no_excuse",),
        "is a state by the clock, and no message is refused",
    ),
    Case(
        215,
        "10 000 refusals from one source",
        (*IA, *RE),
        r"\[ak_attributes\]",
        ("server/aftermath:one_source_does_not_fill_the_audit_log",),
    ),
    Case(216, "another nonce", IA, "nonce (must be 32 bytes|is missing)", (_CHALLENGE,)),
    Case(
        217,
        "PCRs that are none",
        IA,
        "PCR request is malformed|a list of numbers|more than 4 entries|unknown member",
        (_CHALLENGE,),
    ),
    Case(
        218,
        "a malformed credential or secret",
        IA,
        "challenge: (credential|secret) is malformed",
        (_CHALLENGE,),
    ),
    Case(
        219,
        "a credential for another key",
        IA,
        "TPM refused the credential",
        (f"{_REAL}[damaged credential]",),
    ),
    Case(220, "a quote without a credential", IA, "credential is missing", (_CHALLENGE,)),
    Case(
        221,
        "rounds without end",
        RE,
        "rounds",
        ("integration/tpm/logs:a_server_that_asks_without_end",),
    ),
    Case(
        222,
        "a request for other files",
        IA,
        "unknown member spire_hw.path|evidence asked for is not known",
        (_CHALLENGE,),
    ),
    Case(
        223,
        "logs for a server that was not verified",
        FP,
        "withheld",
        ("integration/tpm/logs:nothing_is_shown_to_a_server_nobody_verified",),
    ),
    Case(
        224,
        "a certificate that is not ours",
        IA,
        "",
        ("agent/lying_server:a_wrong_agent_svid_is_refused_as_often_as_it_comes",),
    ),
    Case(
        225,
        "a TPM that goes away in between",
        UN,
        "",
        (
            "integration/tpm/attestation:a_tpm_that_refuses_in_mid_exchange_ends_it_and_is_left_clean",
        ),
    ),
)
