"""A report to look at: one HTML file without scripts, fonts or anything else from elsewhere.

    render(document) -> str          the page
    package_document(...) -> dict    the document of a package

A document is plain JSON. Every part may be missing, and a picture stands in the page only where its data is there:

    title           str
    facts           {label: text or number}, shown in this order
    verdict         "pass" | "fail" | "incomplete"
    measurements    rows of evidence/validation.json; those with a verdict are shown as budgets
    points          [{"label", "kind": "preset" | "allocated", "bytes", "bits_per_weight", "mean_kld", "ci95": [lo, hi],
                    "predicted_kld", "chosen"}]: size against divergence; all but label, kind and bytes may be null
    tensors         [{"name", "type", "bits"}]: bits per weight of each tensor, scales included
    details         evidence/details.json, see `edgepack/measure/details.py`
    waterfall       [{"step", "bytes", "mean_kld", ...}]: after each step; further numbers go into its table
    choice          `auto` of evidence/plan.json: what an automatic plan chose between
    notes           [str]: at the foot of the page

The same document gives the same bytes. Every text in it may come from a stranger: see `markup.py`.
"""

from edgepack.report.document import package_document
from edgepack.report.page import render

__all__ = ["package_document", "render"]
