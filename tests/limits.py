"""How long tests wait."""

# Seconds until another process counts as hung: so far beyond what any takes that no test fails
# because the machine is busy.
HUNG = 1800
