"""Search of Chinese, by pairs of characters, which needs no dictionary; and of parts of names."""

import re

from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.search.zh import SearchChinese

CHINESE = "\u3400-\u9fff"
# The same for the query in the browser; only pairs, which are narrower than characters.
SPLITTER = """
function splitQuery(query) {
  const pieces = [];
  for (const run of query.match(/[\\u3400-\\u9fff]+|[a-zA-Z0-9_]+/g) || []) {
    if (!/[\\u3400-\\u9fff]/.test(run) || run.length === 1) pieces.push(run);
    else for (let i = 0; i + 1 < run.length; i++) pieces.push(run.slice(i, i + 2));
  }
  return pieces;
}
"""


def pieces(text: str) -> list[str]:
    """Words, the parts of words like `warmup_epochs`, Chinese characters and pairs of those."""
    found = []
    for run in re.findall(rf"[{CHINESE}]+|[^\W{CHINESE}]+", text):
        if re.match(rf"[{CHINESE}]", run):
            found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            found += dict.fromkeys([run, *filter(None, run.split("_"))])
    return found


class SearchByParts(SearchEnglish):
    """Sphinx' English search, which finds `warmup_epochs` by `warmup`, too."""

    def split(self, input: str) -> list[str]:
        """Split a text into the terms of the index."""
        return pieces(input)


class SearchByPairs(SearchChinese):
    """Sphinx' Chinese search without jieba; of the browser's stemmers there is an English one."""

    language_name = "English"  # names the stemmer in JavaScript
    js_splitter_code = SPLITTER

    def split(self, input: str) -> list[str]:
        """Split a text into the terms of the index."""
        found = pieces(input)
        self.latin_terms.update(piece for piece in found if piece.isascii())
        return found

    def word_filter(self, word: str) -> bool:
        """Whether a term enters the index: a single letter does not, a Chinese character does."""
        return len(word) > 1 or not word.isascii()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the search with Sphinx."""
    app.add_search_language(SearchByParts)
    app.add_search_language(SearchByPairs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
