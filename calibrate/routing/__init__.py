"""A small Mixture-of-Experts language model of our own: trained from scratch, its routing recorded."""
