"""The stream, its envelope, challenge and answer."""

from __future__ import annotations

from typing import Final

from tests.hostile.cases.case import DE, FP, IA, PD, RE, UN, Case

_FIRST: Final = "tpm/envelope:first_message_is_refused"
_ANSWER: Final = "tpm/envelope:answer_is_refused"
_ORDER: Final = "server/attestation:messages_out_of_order_are_refused"
_LIMITS: Final = "server/attestation:messages_beyond_the_limits"
_SECRET: Final = "tpm/answer:wrong_secret_is_refused_with_one_message"  # noqa: S105
_MISMATCH: Final = r"challenge: secret does not match \[secret_mismatch\]"

CASES: Final = (
    Case(
        1,
        "stream or first message with nothing in it",
        IA,
        "missing|empty|ended before|expected",
        (f"{_FIRST}[empty payload]", _ORDER),
    ),
    Case(
        2,
        "an answer as the first message",
        IA,
        "expected attestation data|expected params|first message",
        (f"{_FIRST}[an answer first|a challenge first]", _ORDER),
    ),
    Case(3, "a second first message", IA, "expected a challenge response", (_ANSWER, _ORDER)),
    Case(
        4,
        "a wrong answer, then the right one",
        IA,
        _MISMATCH,
        ("server/attestation:a_right_answer_after_a_wrong_one_is_not_read",),
    ),
    Case(
        5,
        "silence after the challenge",
        DE,
        r"challenge: not answered in 30 s \[challenge_timeout\]",
        ("tpm/envelope:silence_ends_with_the_challenge_timeout",),
    ),
    Case(
        6,
        "half-closed after the challenge",
        IA,
        "stream ended before the challenge was answered",
        ("tpm/envelope:error_of_the_stream_passes_through", _ORDER),
    ),
    Case(7, "a message above the server's limit", RE, "limit|larger|exceed|too large", (_LIMITS,)),
    Case(
        8,
        "a payload of 64 KiB and a byte, an answer of 1 MiB and a byte",
        RE,
        r"(65537|1048577) bytes, limit",
        (
            "tpm/envelope:payload_over_64_kib_is_refused_before_reading",
            "tpm/envelope:answer_over_one_mib_is_refused",
            _LIMITS,
        ),
    ),
    Case(
        9,
        "a type nobody configured",
        FP,
        "no node attestor '.{0,64}' is configured",
        ("server/attestation:types_nobody_configured",),
    ),
    Case(
        10,
        "another attestor's payload",
        IA,
        "member EK is missing|devid: |member",
        (f"{_FIRST}[another attestor's message]", "tpm_devid/server:envelopes"),
    ),
    Case(11, "text in another encoding", IA, "envelope: not UTF-8 JSON", (_FIRST, _ANSWER)),
    Case(12, "a member twice", IA, "envelope: member .* appears twice", (_FIRST, _ANSWER)),
    Case(
        13,
        "numbers that are none",
        IA,
        "number not allowed here",
        (f"{_FIRST}[NaN|Infinity|huge float|5000 digits]",),
    ),
    Case(14, "100 000 open brackets", IA, "envelope: nested too deep", (_FIRST,)),
    Case(15, "more or less than one object", IA, "one JSON object expected", (_FIRST,)),
    Case(16, "a member that is null, empty or missing", IA, "envelope: AK.* is missing", (_FIRST,)),
    Case(
        17,
        "members of another type",
        IA,
        "envelope: .*(must be|number not allowed)",
        (_FIRST, _ANSWER),
    ),
    Case(18, "base64 in another form", IA, "AK.Public is not canonical base64", (_FIRST,)),
    Case(19, "a lone surrogate", IA, "envelope: text is not valid Unicode", (_FIRST,)),
    Case(20, "another dialect", IA, "dialect -?\\d is not supported|v must be", (_FIRST, _ANSWER)),
    Case(21, "an unknown member of our object", IA, "unknown member spire_hw", (_FIRST, _ANSWER)),
    Case(
        22,
        "no quote where one is required",
        PD,
        r"policy: this server requires a quote \[activation_only\]",
        (
            "tpm/envelope:evidence_without_a_quote_is_denied",
            "tpm/activation_only:a_policy_that_wants_more_is_not_met",
        ),
    ),
    Case(
        23,
        "no quote after quotes before",
        PD,
        r"policy: node attested with quotes before and may not fall back \[downgrade\]",
        (
            "server/attestation:node_that_was_quoted_never_falls_back_where_activation_is_enough",
            "tpm/activation_only:the_judge_hears_of_it",
        ),
    ),
    Case(
        24, "evidence before it was asked for", IA, "evidence sent before it was asked", (_FIRST,)
    ),
    Case(
        25,
        "many exchanges at once",
        RE,
        "attesting already|too many",
        ("tpm/exchanges:limits_by_key_by_source_and_in_all",),
    ),
    Case(
        88,
        "a wrong secret, part of it, more than it",
        IA,
        _MISMATCH,
        (f"{_SECRET}[wrong|empty|first 31 bytes|one byte more|last bit]",),
    ),
    Case(
        89,
        "the secret in another form",
        IA,
        f"{_MISMATCH}|Secret is not canonical base64",
        (f"{_SECRET}[in hex]", f"{_ANSWER}[secret in hex]"),
    ),
    Case(
        90,
        "the secret of another open exchange",
        IA,
        _MISMATCH,
        ("tpm/answer:secret_of_another_open_exchange_is_refused",),
    ),
    Case(
        91,
        "the right answer too late",
        DE,
        r"not answered in 30 s \[challenge_timeout\]",
        ("tpm/envelope:right_answer_after_the_time_limit_is_refused",),
    ),
    Case(92, "an earlier answer", IA, _MISMATCH, ("tpm/answer:replayed_answer_is_refused",)),
    Case(
        93,
        "an answer on a stream of its own",
        IA,
        "missing|expected|first message",
        ("server/attestation:an_answer_is_worth_nothing_on_another_stream",),
    ),
    Case(
        94,
        "an answer after a restart of the server",
        UN,
        "",
        ("server/attestation:a_restart_makes_open_challenges_worthless",),
        "a server is started anew each time",
    ),
    Case(
        95,
        "one machine's endorsement key, another's attestation key",
        IA,
        _MISMATCH,
        ("tpm/exchanges:the_thief_gets_no_further_than_the_challenge",),
    ),
    Case(
        96,
        "guesses over new streams",
        RE,
        "too many|rate|limit",
        ("server/attestation:guessing_is_limited_to_a_trickle",),
        "time stands still, so that guesses wait; cases 25 and 88 repeat the limit and the guess",
    ),
    Case(
        97,
        "a part that is missing, or was not asked for",
        IA,
        r"evidence asked for is missing|quotes must be a list|evidence that was not asked",
        (_ANSWER, "tpm/answer:evidence_that_was_not_asked_for_is_refused"),
    ),
)
