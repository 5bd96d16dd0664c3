"""The M2M-Reg method in pure PyTorch: tensors in, tensors out."""
