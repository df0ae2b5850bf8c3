"""Masks, codebooks and codes; and what makes a training loop use them."""
