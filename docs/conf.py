"""How Sphinx builds the documentation: ``make docs``. Nothing is fetched during the build."""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import sklora

project = "sklora"
author = copyright = "sklora developers"
version = release = sklora.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

# Every cross-reference in our own pages has to lead somewhere. Other projects' inventories would
# have to be downloaded, so their names stay without a link.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(numpy|sklearn|skops|skorch|torch|safetensors)\..*")]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
# The class pages list the members: numpydoc shall not list them again.
default_role = "literal"
numpydoc_show_class_members = False
# numpydoc writes types where they are explained.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
toc_object_entries_show_parents = "hide"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "backreferences_dir": "generated/backreferences",
    "doc_module": "sklora",
    "filename_pattern": r"[\\/]plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "ignore_repr_types": r"matplotlib\.",
    "parallel": True,  # as many examples at a time as the command's --jobs says
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = f"sklora {release}"
html_static_path = ["_static"]
html_css_files = ["sklora.css"]
html_show_sourcelink = False
# Nothing stands below these pages.
html_sidebars = {"getting_started": [], "comparison": []}
html_theme_options = {
    "logo": {"text": "sklora"},
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}


def write_inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext()))
    raise SkipNode


def write_math_block(translator, node):
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app):
    # MathML, which browsers draw themselves: MathJax would be fetched from a server by each reader.
    app.add_html_math_renderer("mathml", (write_inline_math, None), (write_math_block, None))
