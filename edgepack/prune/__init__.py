"""Leaving out of a model what it can best do without: layers, neurons, heads, tokens, single weights.

A checkpoint folder in, another out that transformers loads and edgepack exports; one method per file. Repairing what
that costs is `edgepack/heal`.
"""
