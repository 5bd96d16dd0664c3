"""Registration by other programs, behind the call that the evaluation also makes of M2M-Reg."""
