"""Sphinx: the site of docs/, with the API read from the docstrings. `make docs` builds it without a network."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pdrop

project = "pdrop"
author = "The pdrop developers"
project_copyright = "The pdrop developers, Apache-2.0"
version = release = pdrop.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pdrop {release}"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing_ext"]

default_role = "literal"  # docstrings put code into single backquotes
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# types in signatures that have no entry of their own here (other projects' and the inner ones); roles stay strict
nitpick_ignore_regex = [("py:class", r"([\w.]+\.)?[A-Z]\w*"), ("py:obj", r"typing\..*")]


def property_in_words(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes "Per layer: tokens" for a type and its text, unless the first line has no colon."""
    if what == "property":
        lines.insert(0, "\\ ")


def files_outside(app: Any, page: str, source: list[str]) -> None:
    """Links to Markdown outside docs/ (tables of results/reference) are to files: it is not a page of the site."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", files_outside)
    app.connect("autodoc-process-docstring", property_in_words, priority=400)
