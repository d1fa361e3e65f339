"""CaseOps: golden forms, exact inversion, and refusal of everything malformed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.data import caseops
from pgolf.data.caseops import ALLCAPS, CAPNEXT, ESC, MARKERS, TITLE, CaseOpsError

ANY_CHARACTER = st.characters(exclude_categories=["Cs"])
WORDY = st.text(st.sampled_from("abzABZ .\n1ßÉé日" + MARKERS), max_size=40)


@pytest.mark.golden
def test_golden_forms(golden):
    for line in golden("caseops.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert caseops.encode(row["text"]) == row["encoded"]
        assert caseops.decode(row["encoded"]) == row["text"]


@pytest.mark.golden
def test_golden_malformed_forms_are_refused(golden):
    for line in golden("caseops_malformed.jsonl").read_text().splitlines():
        with pytest.raises(CaseOpsError):
            caseops.decode(json.loads(line)["encoded"])


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("lower", "lower"),
        ("Word", TITLE + "word"),
        ("A", TITLE + "a"),
        ("AB", ALLCAPS + "ab"),
        ("eBay", f"e{CAPNEXT}bay"),
        ("HeLLo", f"{TITLE}he{CAPNEXT}l{CAPNEXT}lo"),
        ("ABc", f"{TITLE}a{CAPNEXT}bc"),
        ("aB", f"a{CAPNEXT}b"),
        ("a1B", f"a1{TITLE}b"),
        ("éB", f"é{TITLE}b"),
        ("ÉB", f"É{TITLE}b"),
        (TITLE + "B", ESC + TITLE + TITLE + "b"),
        ("a" + ESC, "a" + ESC + ESC),
    ],
)
def test_each_rule(text, encoded):
    assert caseops.encode(text) == encoded
    assert caseops.decode(encoded) == text


@given(st.text(ANY_CHARACTER) | WORDY)
def test_round_trip_of_any_text(text):
    encoded = caseops.encode(text)
    assert caseops.decode(encoded) == text
    assert not any("A" <= character <= "Z" for character in encoded)


@given(WORDY)
def test_lenient_decoding_never_fails_and_agrees_on_well_formed_text(text):
    lenient = caseops.decode(text, strict=False)
    try:
        assert caseops.decode(text) == lenient
    except CaseOpsError as error:
        assert text[error.position] in MARKERS


def test_capnext_at_the_start_of_a_word():
    assert caseops.decode(CAPNEXT + "ab") == "Ab"


@pytest.mark.parametrize(
    ("encoded", "position", "reason"),
    [
        (TITLE, 0, "TITLE is not followed by an ASCII letter"),
        ("x " + ALLCAPS + "1", 2, "ALLCAPS is not followed by an ASCII letter"),
        (CAPNEXT + "é", 0, "CAPNEXT is not followed by an ASCII letter"),
        (TITLE + CAPNEXT + "a", 0, "TITLE is not followed by an ASCII letter"),
        ("ab" + TITLE + "c", 2, "TITLE stands inside a word"),
        ("ab" + ALLCAPS + "c", 2, "ALLCAPS stands inside a word"),
        (TITLE + TITLE + "a", 0, "TITLE is doubled"),
        (ALLCAPS + ALLCAPS + "a", 0, "ALLCAPS is doubled"),
        ("a" + CAPNEXT + CAPNEXT + "b", 1, "CAPNEXT is doubled"),
        ("x" + ESC, 1, "ESC ends the text"),
        (ESC + "!", 0, "ESC is not followed by a marker character"),
    ],
)
def test_malformed_text_names_place_and_reason(encoded, position, reason):
    with pytest.raises(CaseOpsError) as caught:
        caseops.decode(encoded)
    assert (caught.value.position, caught.value.reason) == (position, reason)
    assert reason in str(caught.value)


def test_long_runs_take_linear_time():
    text = "a" * 300_000 + "B" * 300_000 + "c" * 300_000 + " " + "d" * 300_000
    assert caseops.decode(caseops.encode(text)) == text
