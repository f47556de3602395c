"""Sphinx settings: ``make docs`` builds docs/build/html, and every warning is an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "forebear"
author = "The forebear authors"
release = version = version_of("forebear")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_pages"]
exclude_patterns = ["build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4

# References between pages, to headings and to files are checked. Those of docstrings to the package's inner modules
# are not: the API pages show public names alone.
smartquotes = False  # they would join the two dashes of an option
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]
suppress_warnings = ["epub.unknown_project_files"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"forebear {release}"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
