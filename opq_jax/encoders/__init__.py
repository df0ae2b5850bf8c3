"""Which code a weight gets: rounding, error feedback, a trellis, layer by layer."""
