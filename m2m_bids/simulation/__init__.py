"""Simulated ADNI-like cohorts with known transforms."""
