"""How the site is made of these pages: `make docs`, then open build/docs/index.html."""

from lmworks import __version__

project = "lmworks"
author = copyright = "the lmworks authors"
release = version = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"  # its fonts are the reader's own, and its scripts lie beside the pages
html_title = f"lmworks {__version__}"
html_copy_source = html_show_sourcelink = False
nitpicky = True
