import pytest

from cvt.app import sessions as module
from cvt.app.limits import KEPT_SECONDS, PICTURES
from cvt.app.sessions import Picture, Sessions


def picture(name, size=10):
    return Picture(name, name.encode().ljust(size, b"."), [0.5, 0.5])


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def names(session):
    return [each.name for each in session.pictures]


def test_new_pictures_come_first_and_become_the_current_ones():
    sessions = Sessions()
    session = sessions.add("one", [picture("a"), picture("b")])
    session.current = 1
    session = sessions.add("one", [picture("c")])
    assert names(session) == ["c", "a", "b"]
    assert session.current == 0
    assert sessions.get("one") is session
    assert sessions.get("two") is None


def test_a_picture_that_is_given_again_moves_to_the_front():
    sessions = Sessions()
    sessions.add("one", [picture("a"), picture("b")])
    assert names(sessions.add("one", [picture("b")])) == ["b", "a"]


def test_the_oldest_pictures_beyond_the_limit_are_dropped():
    sessions = Sessions()
    for i in range(PICTURES + 3):
        session = sessions.add("one", [picture(str(i))])
    assert len(session.pictures) == PICTURES
    assert session.pictures[0].name == str(PICTURES + 2)


def test_what_is_not_used_is_dropped_and_what_is_used_stays():
    clock = Clock()
    sessions = Sessions(clock)
    sessions.add("one", [picture("a")])
    sessions.add("two", [picture("b")])
    clock.now = KEPT_SECONDS - 1
    assert sessions.get("one")
    clock.now = KEPT_SECONDS + 1
    sessions.drop_expired()
    assert len(sessions) == 1
    assert sessions.get("two") is None
    assert sessions.get("one")
    sessions.forget("one")
    sessions.forget("one")
    assert len(sessions) == 0


def test_the_visitors_are_limited(monkeypatch):
    monkeypatch.setattr(module, "VISITORS", 3)
    sessions = Sessions()
    for i in range(5):
        sessions.add(str(i), [picture("a")])
        sessions.get("0")
    assert [name for name in "01234" if sessions.get(name)] == ["0", "3", "4"]


@pytest.mark.parametrize("most", [100, 1000])
def test_the_bytes_are_limited(monkeypatch, most):
    monkeypatch.setattr(module, "STORE_BYTES", most)
    sessions = Sessions()
    for i in range(20):
        sessions.add(str(i), [picture("a", size=most // 4)])
    assert len(sessions) == 4
    assert sessions.get("19")
