"""What images show in regions of the brain: arrays in, numbers and tables out."""
