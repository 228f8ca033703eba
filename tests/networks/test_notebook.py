"""The notebook that begins and ends in PyTorch; what it claims, it asserts itself."""

import notebook_runs as notebooks


def test_notebook_runs(tmp_path):
    (path,) = filter(notebooks.needs_torch, notebooks.ALL)
    done = notebooks.run(path, tmp_path)
    kinds = [
        kind
        for cell in done.cells
        for out in cell.get("outputs", ())
        for kind in [*out.get("data", ())]
    ]
    assert kinds.count("image/png") == 1, "the pictures of both"
    assert (tmp_path / "plan-6.json").is_file()
