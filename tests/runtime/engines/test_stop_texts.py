"""Texts that end an answer, whatever the pieces it comes in, and the tokens that are reported of what is left."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metier.agents.sampling import WrittenToken, until_stop
from metier.runtime.engines.stop_texts import StopTexts
from metier.runtime.engines.thinking_asks import ReplyReader

PIECES = st.lists(st.text("ab\n", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3).map(tuple)


@given(PIECES, STOPS)
def test_an_answer_ends_before_the_first_text_that_stops_it(pieces: list[str], stops: tuple[str, ...]) -> None:
    stop, heard = StopTexts(stops), ""
    for number, piece in enumerate(pieces, 1):
        heard += stop.read(piece, last=number == len(pieces))
    whole = "".join(pieces)
    # Which of several comes first can be known only from what has been read: one that ends sooner wins.
    ends = [whole.find(one) + len(one) for one in stops if one in whole]
    assert stop.found == bool(ends)
    assert heard == whole if not ends else whole.startswith(heard)
    assert not any(one in heard for one in stops)
    if len(stops) == 1:
        assert heard == until_stop(whole, stops)


def written(text: str) -> list[WrittenToken]:
    return [WrittenToken(token=text, logprob=-0.5)]


def test_tokens_of_what_stopped_the_answer_are_not_reported() -> None:
    reader = ReplyReader(stop=("\n\n",))
    said = [reader.read(piece, [1], written=written(piece)) for piece in ("one", "\n", "two", "\n", "\n")]
    assert said == ["one", "", "\ntwo", "", ""]
    assert reader.full and reader.stopped and reader.answer == "one\ntwo"
    assert [token.token for token in reader.written] == ["one", "\n", "two"]


def test_what_was_held_back_is_the_end_of_a_reply_that_goes_on_no_further() -> None:
    reader = ReplyReader(stop=("END",))
    assert [reader.read("one EN", [1]), reader.read("", [2], last=True)] == ["one ", "EN"]
    assert not reader.stopped and reader.answer == "one EN"
