"""The .opq file: writing, reading and checking it."""
