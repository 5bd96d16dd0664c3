"""Numbers that say whether a registered scan needs a look, and what a cohort's numbers say."""
