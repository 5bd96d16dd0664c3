"""Nipype workflows of the app."""
