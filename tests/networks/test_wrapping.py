"""The snippets of docs/wrapping.md that need PyTorch or Keras, after those that do not."""

import os
import re
import warnings
from pathlib import Path

import jax

os.environ.setdefault("KERAS_BACKEND", "jax")
PAGE = Path(__file__).parents[2] / "docs" / "wrapping.md"
WITH = ("python", "python keras", "python torch")


def test_every_snippet_runs(tmp_path, monkeypatch):
    """In order, in one namespace, with a user's default settings."""
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```([a-z -]+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in blocks} == {*WITH, "python no-run"}
    namespace = {}
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # Keras's own
        for i, (kind, snippet) in enumerate(blocks):
            if kind in WITH:
                exec(compile(snippet, f"wrapping.md, snippet {i}", "exec"), namespace)


def test_the_snippet_of_from_pretrained_names_what_exists():
    from diffsamp.jobs.pretrained import Pretrained

    (snippet,) = re.findall(
        r"^```python no-run\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    fields = {*Pretrained.__dataclass_fields__, *vars(Pretrained)}
    assert set(re.findall(r"model\.(\w+)", snippet)) <= fields
