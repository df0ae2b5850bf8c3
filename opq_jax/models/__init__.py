"""The networks of the paper's experiments, in Flax Linen; one module per family."""

from opq_jax.models.mobilenet import MobileNetV1

__all__ = ['MobileNetV1']
