"""Grids, intensities and transforms of images in world space, without torch."""
