"""Output patterns, report layout, thresholds and default weights."""
