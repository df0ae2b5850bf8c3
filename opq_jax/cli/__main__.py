import sys

from opq_jax.cli.command import run_process

sys.exit(run_process())
