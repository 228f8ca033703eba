"""Small pretrained models that ship with the package.

Each model lives in its own module and needs the optional dependencies of
`pip install "diffsamp[models]"`; importing this package alone needs none of them.

* `diffsamp.models.digits`: a diffusion transformer of 8x8 handwritten digits.
"""
