"""How much of every layer to prune, and how finely to quantize the rest."""
