"""The parts of a diffusers folder, read without executing anything that lies in it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp

from diffsamp._core.files import read_json
from diffsamp._core.types import DType, Value

__all__ = ["find_folder", "load_component", "load_text_pipeline"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FIX = 'pip install "diffsamp[diffusers]"'


def find_folder(name: str | os.PathLike[str]) -> Path:
    """The folder itself, or where huggingface_hub has put the model of that name.

    Raises:
      FileNotFoundError: neither; nothing is downloaded.
    """
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists():
        raise FileNotFoundError(
            f"{folder} is no diffusers pipeline: it has no model_index.json. A single network is "
            "`ds.from_torch(module, ..)`."
        )
    text = os.fspath(name)
    if text.count("/") == 1 and not text.startswith((".", "/")):
        try:
            from huggingface_hub import snapshot_download
        except ModuleNotFoundError:
            raise FileNotFoundError(
                f"there is no folder {text}; to find a model by its name, {_FIX}."
            ) from None
        try:
            return Path(snapshot_download(text, local_files_only=True))
        except Exception as error:  # of several kinds, by version
            raise FileNotFoundError(
                f"there is no folder {text}, and no model of that name in huggingface_hub's cache. "
                f"Download it first: hf download {text}"
            ) from error
    raise FileNotFoundError(f"there is no folder {text}.")


def expect_safetensors(folder: Path) -> None:
    """Raise unless a component's weights are there as safetensors.

    Raises:
      FileNotFoundError: the folder, or weights in it, are missing.
      ValueError: they are a pickle, which can run any code when it is read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; model_index.json names it.")
    names = [path.name for path in folder.iterdir()]
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        raise ValueError(
            f"{folder} holds its weights as a pickle ({', '.join(pickles)}), which can run any "
            "code when it is read. Convert it once, where you trust it: load the pipeline with "
            "diffusers and save_pretrained(.., safe_serialization=True)."
        )
    raise FileNotFoundError(f"{folder} holds no weights (*.safetensors).")


def load_component(
    folder: Path,
    kind: str,
    dtype: DType = None,
    variant: str | None = None,
    expect: Callable[[Mapping[str, Value]], None] = lambda config: None,
) -> tuple[Value, Mapping[str, Value]]:
    """(module, its config) of diffusers' class `kind`; `expect` raises if the config will not do.

    Raises:
      ModuleNotFoundError: diffusers is missing.
      FileNotFoundError, ValueError: as for `expect_safetensors`; a class that diffusers has not;
        weights that do not fit the config.
    """
    expect_safetensors(folder)
    config = read_json(folder / "config.json")
    expect(config)
    diffusers = _diffusers()
    cls = getattr(diffusers, kind, None)
    if cls is None:
        raise ValueError(
            f"diffusers {diffusers.__version__} has no class {kind}, which {folder} needs."
        )
    options = _options(dtype, variant)
    try:
        with _quiet():
            module = cls.from_pretrained(folder, **options)
    except (RuntimeError, ValueError) as error:  # shapes, names, fields
        raise ValueError(f"{folder} cannot be read as a {kind}: {error}") from error
    return module.eval().requires_grad_(False), config


def load_text_pipeline(folder: Path, dtype: DType = None, variant: str | None = None) -> Value:
    """The folder's pipeline with its tokenizers and text encoders, and nothing else.

    Raises:
      ModuleNotFoundError: diffusers or transformers is missing.
      ValueError: the pipeline's class is unknown, or weights are a pickle.
    """
    diffusers = _diffusers()
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"prompts need transformers: {_FIX}", name="transformers"
        ) from error
    index = read_json(folder / "model_index.json")
    parts = {n: v for n, v in index.items() if isinstance(v, list) and len(v) == 2}
    read = ("text_encoder", "tokenizer", "scheduler")
    wanted = {name for name, kind in parts.items() if name.startswith(read) and kind[0]}
    for name in wanted:
        if name.startswith("text_encoder"):
            expect_safetensors(folder / name)
    cls = getattr(diffusers, str(index.get("_class_name")), None)
    if cls is None or not hasattr(cls, "encode_prompt"):
        raise ValueError(
            f"{index.get('_class_name')} of {folder} has no prompts that diffusers could encode; "
            "pass the network's own conditions as `cond`."
        )
    absent = {name: None for name in parts if name not in wanted}
    options = _options(dtype, variant)
    with _quiet():
        pipeline = cls.from_pretrained(folder, **absent, **options)
    for name in ("unet", "transformer"):  # of which they read sizes and the dtype
        if name in parts:
            config = types.SimpleNamespace(**read_json(folder / name / "config.json"))
            stub = types.SimpleNamespace(config=config, dtype=options["torch_dtype"])
            setattr(pipeline, name, stub)
    return pipeline


def _diffusers() -> Value:
    try:
        import diffusers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"from_pretrained needs diffusers: {_FIX}", name="diffusers"
        ) from error
    return diffusers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers and transformers say of names of arguments that are to change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _options(dtype: DType, variant: str | None) -> dict[str, Value]:
    import torch

    options = {
        "use_safetensors": True,
        "torch_dtype": torch.float32 if dtype is None else getattr(torch, jnp.dtype(dtype).name),
        # needs the package accelerate, which it would otherwise ask for aloud
        "low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None,
    }
    return options if variant is None else options | {"variant": variant}
