"""Multi-modal deformable registration of BIDS datasets with M2M-Reg."""

__version__ = "0.1.0"
