"""Boot logs and measurement lists."""

from __future__ import annotations

from typing import Final

from tests.hostile.cases.case import FP, IA, PD, RE, Case

_BOOT: Final = "tpm/boot_log:"
_IMA: Final = "tpm/ima_list:"
_HOLD: Final = "tpm/logs:logs_that_do_not_hold_are_refused"
_STATES: Final = "tpm/policies:boot_states_that_policy_does_not_allow"
_AMBIGUOUS: Final = r"log: Secure Boot state is ambiguous \[secureboot_ambiguous\]"
_FILES: Final = (
    "tpm/policies:files_that_are_neither_listed_nor_signed_by_a_key_of_the_policy",
    "tpm/policies:one_file_among_many_signed_ones",
)

CASES: Final = (
    Case(
        150,
        "no log, or nothing in it",
        IA,
        r"log: boot log is missing \[log_missing\]",
        (_HOLD, f"{_BOOT}no_bytes_are_not_no_policy"),
    ),
    Case(151, "another log than announced", IA, r"\[log_announced\]", (_HOLD,)),
    Case(
        152,
        "a log that unpacks to too much, or not at all",
        (*IA, *RE),
        "log: larger than 524288 bytes|log: compressed data is malformed",
        (_HOLD, f"{_BOOT}compressed_logs_are_one_bounded_stream"),
    ),
    Case(
        153,
        "a log that was cut",
        IA,
        r"log: ends early in event|after the last event|not a crypto-agile log",
        (f"{_BOOT}cut_anywhere", f"{_BOOT}event_larger_than_the_rest"),
    ),
    Case(
        154,
        "padding",
        IA,
        "bytes after the last event",
        (f"{_BOOT}padding_after_the_last_event",),
    ),
    Case(
        155,
        "not a crypto-agile log",
        IA,
        "not a crypto-agile log",
        (f"{_BOOT}not_crypto_agile",),
    ),
    Case(
        156,
        "a malformed table of algorithms",
        IA,
        "algorithm table is malformed",
        (f"{_BOOT}algorithm_table",),
    ),
    Case(157, "wrong digests", IA, "has the wrong digests", (f"{_BOOT}digests_of_an_event",)),
    Case(
        158,
        "too many events",
        RE,
        "more than 4096 events",
        (f"{_BOOT}too_many_events",),
    ),
    Case(
        159,
        "a PCR that does not exist",
        IA,
        r"PCR number \d+ does not exist",
        (f"{_BOOT}pcr_that_does_not_exist", f"{_BOOT}but_for_the_note_at_the_end"),
    ),
    Case(
        160,
        "a log of another boot, an event dropped or moved",
        IA,
        r"does not replay \[log_replay\]",
        (
            f"{_BOOT}another_machine_or_boot",
            f"{_BOOT}one_event_dropped_doubled_or_moved",
            "tpm/logs:a_log_of_another_boot_is_refused",
        ),
    ),
    Case(
        161,
        "data that was exchanged",
        IA,
        r"does not match its digest \[log_event_digest\]",
        (
            f"{_BOOT}data_exchanged_while_the_digest_stays",
            f"{_BOOT}every_byte_of_every_event_of_pcr_7",
        ),
    ),
    Case(
        162,
        "a type under which nothing is checked",
        IA,
        r"\[log_type\]|no-action event with a digest|\[secureboot_ambiguous\]|\[log_order\]",
        (
            f"{_BOOT}type_under_which_nothing_is_checked",
            f"{_BOOT}variable_relabelled_as_an_authority",
            f"{_BOOT}authority_relabelled_as_a_variable",
        ),
    ),
    Case(
        163,
        "separators in another order",
        IA,
        r"\[log_order\]",
        (
            f"{_BOOT}separator_under_another_type",
            f"{_BOOT}two_separators_or_none",
            f"{_BOOT}variable_after_the_separator",
        ),
    ),
    Case(164, "an error of the firmware", PD, r"\[firmware_error\]", (_STATES,)),
    Case(
        165,
        "a variable twice, of another owner, of odd value",
        IA,
        _AMBIGUOUS,
        (
            f"{_BOOT}variable_twice",
            f"{_BOOT}wrong_owner",
            f"{_BOOT}secure_boot_of_odd_size_or_value",
        ),
    ),
    Case(
        166,
        "a malformed variable",
        IA,
        r"log: variable event \d+ is malformed",
        (f"{_BOOT}variable_events",),
    ),
    Case(
        167,
        "a malformed signature list",
        IA,
        "log: signature list is malformed",
        (f"{_BOOT}signature_lists",),
    ),
    Case(
        168,
        "authorities that contradict Secure Boot",
        IA,
        _AMBIGUOUS,
        (
            f"{_BOOT}authority_before_the_separator",
            f"{_BOOT}on_without_authority_after_the_separator",
            f"{_BOOT}on_without_keys",
        ),
    ),
    Case(
        169,
        "Secure Boot off, debug mode, a revoked loader",
        PD,
        r"\[(secureboot|debug_mode|dma_protection|boot_image_revoked)\]",
        (_STATES, "tpm/policies:a_kernel_that_is_not_listed_and_a_loader_that_is_revoked"),
    ),
    Case(170, "an old revocation list", PD, r"\[dbx_old\]", (_STATES,)),
    Case(
        171,
        "a malformed locality",
        IA,
        "startup locality event is malformed",
        (f"{_BOOT}startup_locality",),
    ),
    Case(
        172,
        "a no-action event that says something",
        IA,
        r"no-action event with a digest|\[log_type\]",
        (f"{_BOOT}no_action_with_a_digest", f"{_BOOT}no_action_that_looks_like_a_variable"),
    ),
    Case(
        173,
        "an image after the hand-over",
        IA,
        r"image measured after hand-over \[log_order\]",
        (f"{_BOOT}measured_after_the_hand_over", f"{_BOOT}the_hand_over_is_told_by_its_digest"),
    ),
    Case(
        174,
        "a policy of PCR 7 alone",
        FP,
        "PCR 7 alone does not identify what was booted",
        ("tpm/policies:pcr_7_alone_is_refused_when_the_policy_is_loaded",),
    ),
    Case(
        175,
        "a list that is too large",
        RE,
        "ima: (more than 100000 entries|line longer|part larger|larger than)",
        (
            _HOLD,
            f"{_IMA}unpacks_to_too_much",
            f"{_IMA}long_lines",
            "tpm/logs:logs_that_will_be_too_large_end_it_before_the_challenge",
        ),
    ),
    Case(
        176,
        "a malformed line",
        IA,
        r"ima: line \d+ is malformed",
        (f"{_IMA}malformed_line", f"{_IMA}malformed_record"),
    ),
    Case(
        177,
        "a hash of other fields",
        IA,
        r"does not match its hash \[ima_hash\]",
        (_HOLD, f"{_IMA}template_hash_does_not_match_the_fields"),
    ),
    Case(
        178,
        "a list that does not replay",
        IA,
        r"list does not replay to PCR 10 \[ima_replay\]",
        (_HOLD, f"{_IMA}no_prefix_replays"),
    ),
    Case(
        179,
        "another boot aggregate",
        IA,
        r"boot aggregate does not match \[boot_aggregate\]",
        (
            f"{_IMA}no_boot_aggregate",
            f"{_IMA}boot_aggregate_twice",
            f"{_IMA}boot_aggregate_of_another_boot",
        ),
    ),
    Case(
        180,
        "a part that does not go on from the last",
        (*PD, *IA),
        r"\[ima_rollback\]|\[ima_replay\]",
        (
            f"{_IMA}contradicts_what_is_known",
            f"{_IMA}gap_or_overlap",
            "tpm/logs:a_part_that_begins_elsewhere_is_told_to_the_judge",
            "tpm/logs:a_rewritten_list_is_told_to_the_judge",
        ),
    ),
    Case(
        181,
        "fewer entries than before",
        PD,
        r"list was rewritten \[ima_rollback\]",
        (
            f"{_IMA}fewer_entries_than_before",
            "tpm/logs:a_list_that_got_shorter_is_told_to_the_judge",
        ),
    ),
    Case(
        182,
        "the old position after a reset",
        IA,
        r"list must start at entry 0.*\[ima_restart\]",
        ("tpm/logs:after_a_reset_the_list_starts_anew", _HOLD),
    ),
    Case(
        183,
        "more violations than allowed",
        PD,
        r"ima: 7 violations.*\[ima_violation\]",
        ("tpm/policies:violations_above_the_permitted_number",),
    ),
    Case(
        184,
        "a file nobody vouches for",
        PD,
        r"a file is not in policy.*\[ima_unknown_file\]",
        _FILES,
    ),
    Case(
        185,
        "names with escapes and steps up",
        (*IA, *PD),
        r"\[ima_unknown_file\]|line \d+ is malformed",
        (*_FILES, f"{_IMA}a_newline_in_a_name_only_fits_the_binary_form"),
    ),
    Case(
        186,
        "an old kernel",
        PD,
        r"kernel extends SHA-1 into the SHA-256 bank \[ima_padded_sha1\]",
        (
            f"{_IMA}padded_sha1_needs_leave",
            "tpm/policies:old_kernels_are_accepted_by_a_policy_that_says_so_alone",
        ),
    ),
)
