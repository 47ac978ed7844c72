import dataclasses
import re

import pytest

from cvt.app.limits import MIB, megabytes
from cvt.app.texts import EN, TEXTS, ZH, preferred

FIELDS = [field.name for field in dataclasses.fields(EN)]
CHINESE = re.compile("[\u4e00-\u9fff]")


def slots(text):
    found = set(re.findall(r"\{(\w+)\}", text))
    return {"pixels" if name in ("millions", "ten_thousands") else name for name in found}


@pytest.mark.parametrize("name", FIELDS)
def test_both_languages_have_the_same_words_to_fill_in(name):
    english, chinese = getattr(EN, name), getattr(ZH, name)
    assert type(english) is type(chinese)
    if isinstance(english, dict):
        assert english.keys() == chinese.keys()
    elif isinstance(english, tuple):
        assert len(english) == len(chinese)
    else:
        assert slots(english) == slots(chinese)


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("locale", "other")])
def test_each_language_is_its_own(name):
    def text(texts):
        value = getattr(texts, name)
        return " ".join(value.values() if isinstance(value, dict) else [*value])

    assert CHINESE.search(text(ZH).replace(" ", ""))
    assert not CHINESE.search(text(EN).replace(" ", ""))


def test_the_sentence_about_limits_has_all_of_them():
    assert "12 pictures" in EN.limits()
    assert "20 MB and 50 million pixels" in EN.limits()
    assert "deletes them 5 minutes" in EN.limits()
    assert "12 张" in ZH.limits()
    assert "20 MB、5000 万像素" in ZH.limits()


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("zh-HK", "zh"),
        ("en-US,en;q=0.9,zh-CN;q=0.8", "en"),
        ("fr-FR,fr;q=0.9,zh;q=0.5,en;q=0.4", "zh"),
        ("fr", "en"),
        ("zh;q=x", "en"),
        ("en;q=0.2, zh;q=0.3", "zh"),
        (",,;q=,", "en"),
    ],
)
def test_the_language_is_the_one_that_the_browser_prefers(accepted, language):
    assert preferred(accepted) == language
    assert language in TEXTS


def test_sizes_are_short():
    assert megabytes(20 * MIB) == "20 MB"
    assert megabytes(MIB // 2) == "0.5 MB"
