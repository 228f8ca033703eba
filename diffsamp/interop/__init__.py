"""Readers of other libraries' configurations. Nothing in the package depends on them."""
