"""What every other package stands on: trees, files that appear whole, compiled loops."""
