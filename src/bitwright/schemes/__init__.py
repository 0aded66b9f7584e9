"""Schemes: which numbers exist. One file each; ``catalog.load("schemes", name)`` finds them."""
