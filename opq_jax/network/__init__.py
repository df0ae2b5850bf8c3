"""What a network does with its leaves: the second moments of what they read."""
