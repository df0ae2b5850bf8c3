"""A page that runs a compressed network in a browser; see `experiments.demo_page.make`."""
