"""Machines other than this one that a package can be measured on."""
