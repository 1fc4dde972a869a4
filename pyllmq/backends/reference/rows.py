"""What all rows of this back end have."""

ORDER = 900
BECAUSE = "last row of each operation: runs anywhere, serves where nothing faster does"
