"""Search of Chinese pages, by pairs of characters: no dictionary of words is needed."""

import re

from sphinx.application import Sphinx
from sphinx.search.zh import SearchChinese

CHINESE = "\u3400-\u9fff"
# What `pieces` does, for the query in the browser.
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
    """Words in Latin letters, and every Chinese character and pair of neighbours."""
    found = []
    for run in re.findall(rf"[{CHINESE}]+|[a-zA-Z0-9_]+", text):
        if re.match(rf"[{CHINESE}]", run):
            found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            found.append(run)
    return found


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
    app.add_search_language(SearchByPairs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
