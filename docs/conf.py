"""The docs site: Sphinx, MyST-NB and furo over the outputs that are stored in the notebooks. Nothing is executed here."""
import re
import sys
from configparser import ConfigParser
from html import escape
from pathlib import Path

from docutils.nodes import SkipNode
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
import docsite as made  # noqa: E402  tools/docsite.py

cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
project, author, release = cfg["lib_name"], cfg["author"], cfg["version"]
project_copyright = cfg["copyright"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.linkcode"]
exclude_patterns = ["pages/_*"]  # included by other pages
smartquotes = False  # obs["batch"] stays what can be typed
nitpicky = True  # every reference must resolve ...
nitpick_ignore_regex = [("py:.*", r"(?!scformer_nb\.).*|.*\.[A-Z]")]  # ... but other libraries' types, and type variables

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
linkcode_resolve = made.source_page  # [source] leads to the notebook

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}
html_math_renderer = "mathml"


def mathml(text, block):
    "An equation as MathML, which browsers draw without any script; the number of \\tag stands at its right."
    from docutils.utils.math import MathError
    from docutils.utils.math.latex2mathml import tex2mathml
    tag = re.search(r"\\tag\{(.*?)\}", text)
    plain = re.sub(r"\\[Bb]igg?(?=\W)|\\tag\{.*?\}", "", text).replace(r"\texttt", r"\mathtt").replace(r"\dots", r"\ldots")
    try:
        drawn = tex2mathml(plain, as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("equation %r: %s", text, error)
        drawn = f"<code>{escape(text)}</code>"
    return f'<div class="math">{drawn}{f"<span>({tag[1]})</span>" if tag else ""}</div>' if block else drawn


def math(self, node):
    "For Sphinx: the node of an equation, within a line or as a block."
    self.body.append(mathml(node.astext(), node.tagname != "math"))
    raise SkipNode


def setup(app):
    made.prepare()
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("autodoc-process-docstring", made.add_docments)
