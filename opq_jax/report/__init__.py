"""What a file holds: sizes, tables, plots, verification, accuracy."""
