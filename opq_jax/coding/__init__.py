"""Integer codes to bytes and back, at their entropy or below it."""

from opq_jax.coding.payload import decode_codes, encode_codes, entropy

__all__ = ['decode_codes', 'encode_codes', 'entropy']
