"""State by images: what remembers nothing stays None."""

from diffalign.core.rows import Rows, select_rows


class Letters:
    def __init__(self, text):
        self.text = text

    def select(self, rows):
        return Letters("".join(self.text[row] for row in rows))


def test_rows_come_in_the_order_asked_and_may_repeat():
    state = Letters("abc")
    assert select_rows(state, [2, 0, 2]).text == "cac"
    assert select_rows(state, []).text == ""
    assert state.text == "abc"


def test_no_state_stays_none():
    assert select_rows(None, [0, 1]) is None


def test_what_can_select_is_rows():
    assert isinstance(Letters("a"), Rows)
    assert not isinstance("a", Rows)
