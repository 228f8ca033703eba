"""These tests need torch, torchax, diffusers, transformers and keras: `make test-interop`.

They are collected when asked for by their marker, and then none is skipped.
"""

import warnings

import pytest


def pytest_ignore_collect(collection_path, config):
    chosen = config.getoption("markexpr")
    return None if "interop" in chosen and "not interop" not in chosen else True


def pytest_collection_modifyitems(items):
    for item in items:
        if "networks" in item.path.parts:
            item.add_marker(pytest.mark.interop)


def pytest_configure():
    with warnings.catch_warnings():  # what they say while they are imported is not ours
        warnings.simplefilter("ignore")
        try:
            import diffusers  # noqa: F401
            import torch
        except ModuleNotFoundError:
            return
    torch.set_num_threads(1)
