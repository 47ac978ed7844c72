"""The site: `make docs` builds `en/` and, with the tag `zh`, `zh/`, offline.

Both trees have the same file names, so that a page has its translation at the same place.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
# Nothing here may ask the network, or wait for it.
os.environ |= {"HF_HUB_OFFLINE": "1", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}

from cvt import __version__  # noqa: E402

CHINESE = tags.has("zh")  # noqa: F821

project = "cvt-vision"
author = "The cvt-vision authors"
version = release = __version__
language = "zh_CN" if CHINESE else "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "site_search",
    "pages",
]
locale_dirs = [str(HERE / "locale")]
exclude_patterns = ["**.ipynb_checkpoints"]
smartquotes = False  # --resume is no dash
templates_path = ["_templates"]


# Markdown and notebooks
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # they are executed, and tested, before they are committed
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The reference
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
doctest_test_doctest_blocks = "default"
doctest_global_setup = """
import os, tempfile
_start, _folder = os.getcwd(), tempfile.TemporaryDirectory()
os.chdir(_folder.name)
from transformers.utils import logging as _logging
_logging.disable_progress_bar()
_logging.set_verbosity_error()
"""
doctest_global_cleanup = "os.chdir(_start); _folder.cleanup()"

# Pages
html_title = "cvt-vision"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {"index": [], "commands": []}
html_show_sourcelink = False
html_copy_source = False
html_last_updated_fmt = None
html_favicon = "_static/logo.svg"
html_theme_options = {
    "logo": {
        "image_light": "_static/logo.svg",
        "image_dark": "_static/logo.svg",
        "text": "cvt-vision",
    },
    "navbar_align": "left",
    "navbar_end": ["language", "theme-switcher"],
    "navbar_persistent": ["search-button-field"],
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
    "search_bar_text": "搜索文档" if CHINESE else "Search the docs",
}
html_context = {
    "default_mode": "auto",
    "other": ("en", "English") if CHINESE else ("zh", "中文"),
}
project_copyright = "The cvt-vision authors, Apache-2.0"
