"""One strict JAX for all tests: four devices, no silent promotion, no warnings (pyproject.toml)."""

import os

# tests compile far more than they compute: without LLVM's slowest passes they take half as long
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_llvm_disable_expensive_passes=true'
)

import hypothesis
import jax

jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

hypothesis.settings.register_profile(
  'opq', deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile('opq')
