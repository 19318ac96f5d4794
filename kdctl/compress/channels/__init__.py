"""Which channels of a net can go together, which should, and the net without them."""
