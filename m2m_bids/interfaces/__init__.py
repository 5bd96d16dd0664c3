"""Thin Nipype interfaces over the library."""
