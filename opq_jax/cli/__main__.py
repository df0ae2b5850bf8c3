import sys

from opq_jax.cli.command import main

sys.exit(main())
