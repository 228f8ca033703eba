"""Samplers as jobs: one object, an exported program, a folder of samples."""
