"""Find scans in BIDS datasets and describe derivatives."""
