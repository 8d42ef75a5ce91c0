"""The site of these pages, by Sphinx: `make docs` writes it to build/site/."""

import re

from sphinx.util.nodes import make_refnode

import t5jax

project = "t5jax"
author = "the authors of t5jax"
version = release = t5jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"t5jax {release}"
html_copy_source = False
html_show_copyright = False
smartquotes = False  # A quotation mark is often one to be typed.

# `make docs-links`: what a page starts itself, and names of examples.
linkcheck_ignore = [r"https?://localhost", r".*my-project-1234.*"]

# Links to a heading of another page.
myst_heading_anchors = 4

# `name` is code in a docstring, as it is in Markdown and in an editor.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False

# Types of other packages are named and not linked, so that a build asks no other site.
nitpick_ignore_regex = [("py:.*", r"(?!t5jax\b).*")]

_texts_of_attributes: dict[str, list[str]] = {}


def before_napoleon(app, what, name, obj, options, lines):
    """Escapes what is plain in Markdown and means something in reStructuredText."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"[*|]|_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = "".join(parts)
    if what == "module":
        # What is indented below a colon is code.
        for number in range(len(lines) - 2):
            if lines[number].endswith(":") and lines[number + 2].startswith("    "):
                lines[number] += ":"
    if what == "attribute":
        # Napoleon would take what stands before a colon for a type.
        _texts_of_attributes[name] = lines[:]
        lines.clear()


def after_napoleon(app, what, name, obj, options, lines):
    lines.extend(_texts_of_attributes.pop(name, []))


def link_where_documented(app, env, node, contnode):
    """Finds a class under the name by which users import it, such as `t5jax.data.Template`."""
    target = node.get("reftarget", "")
    if not target.startswith("t5jax."):
        return None
    name = target.rpartition(".")[2]
    for documented, entry in env.get_domain("py").objects.items():
        if documented.rpartition(".")[2] == name and entry.objtype in ("class", "data"):
            where = (node["refdoc"], entry.docname, entry.node_id)
            return make_refnode(app.builder, *where, contnode, documented)
    return contnode  # A type of the inside.


def keep_links_within_the_site(app, docname, source):
    """Pages link to a file of the project as its readers on a forge need it."""
    source[0] = source[0].replace("(../CONTRIBUTING.md)", "(contributing.md)")


def name_saved_files(app, docname, source):
    """Shows which file a block is to be saved as, which the pages say in a comment."""
    captioned = r"```{code-block} \2\n:caption: \1\n\n"
    source[0] = re.sub(r"<!-- saved as: (\S+) -->\n```(\w+)\n", captioned, source[0])


def setup(app):
    app.connect("source-read", name_saved_files)
    app.connect("source-read", keep_links_within_the_site)
    app.connect("autodoc-process-docstring", before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", after_napoleon, priority=600)
    app.connect("missing-reference", link_where_documented)
