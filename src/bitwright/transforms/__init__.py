"""Transforms: function-preserving rewrites that come before the method."""
