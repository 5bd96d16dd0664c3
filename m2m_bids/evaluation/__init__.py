"""Measures of overlap, folding and landmarks: arrays in, numbers out."""
