"""Sphinx's settings for the book, and its pages of source code. build.py calls it."""

import importlib.util
import posixpath
import re
from pathlib import Path

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

SOURCES: set[str] = set()  # files that pages link to, found while they are written

project = "finematch"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = [".doctrees"]
html_theme = "furo"
html_title = "finematch"
html_favicon = "icon.svg"
html_copy_source = False
html_use_index = False
html_show_copyright = False

# MathJax as SVG is one file and needs no fonts, so it works from file:// in every browser
MATHJAX = (
    Path(importlib.util.find_spec("mathjax").submodule_search_locations[0]) / "static/mathjax/es5/tex-svg.js"
)
html_static_path = ["style.css", str(MATHJAX)]
html_css_files = ["style.css"]
mathjax_path = MATHJAX.name
mathjax3_config = {"options": {"enableMenu": False}}
# a page that is opened from the disk may not fetch others for the results' excerpts
html_js_files = [
    (None, {"body": "if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false"})
]

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # they come from the network
nb_merge_streams = True


class Links(SphinxPostTransform):
    """The links that MyST cannot follow: to a file of the repository that is no page (it gets a page of its own, with
    the same lines), and to an anchor that stands in a page as HTML, `<a id="...">`."""

    default_priority = 8  # before MyST looks for them among pages and headings

    def run(self):
        root = Path(self.config.book_root)
        html = "".join(node.astext() for node in self.document.findall(nodes.raw))
        anchors = set(re.findall(r'<a (?:id|name)="([^"]+)"', html))
        for node in list(self.document.findall(pending_xref)):
            if node["reftype"] != "myst" or node["refdomain"]:
                continue
            path, _, line = node["reftarget"].partition("#")
            name = posixpath.normpath(posixpath.join(posixpath.dirname(node["refdoc"]), path))
            if path in anchors:
                uri = f"#{path}"
            elif path and (root / name).is_file():
                SOURCES.add(name)
                uri = self.app.builder.get_relative_uri(node["refdoc"], f"source/{name}")
                uri += f"#{line}" if line else ""
            else:
                continue
            node.replace_self(nodes.reference("", "", *node.children, internal=True, refuri=uri))


def source_pages(app):
    """The files that pages link to, and the whole library; line 52 is the anchor `L52`, as on code hosts."""
    root = Path(app.config.book_root)
    library = [path.relative_to(root).as_posix() for path in (root / "src").rglob("*.py")]
    for name in sorted(SOURCES | set(library)):
        text = (root / name).read_text("utf-8")
        try:
            lexer = get_lexer_for_filename(name, text)
        except ClassNotFound:
            lexer = TextLexer()
        lines = highlight(text, lexer, HtmlFormatter(linenos="inline", linespans="L"))
        lines = re.sub(r'id="L-(\d+)"', r'id="L\1"', lines)
        yield f"source/{name}", {"title": name, "body": f"<h1>{name}</h1>\n{lines}"}, "page.html"


def setup(app):
    app.add_config_value("book_root", "", "html")  # the repository; build.py gives it
    app.add_post_transform(Links)
    app.connect("html-collect-pages", source_pages)
