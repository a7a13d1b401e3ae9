"""Repairing a damaged model by distilling the original into it."""
