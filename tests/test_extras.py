"""What a missing extra says, and what can be said before it is missed."""

import json
import sys

import pytest

import diffsamp as ds

FLOW = ds.processes.flow()


@pytest.fixture
def without(monkeypatch):
    def hide(*names):
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)

    return hide


def test_from_torch_names_its_extra(without):
    without("torch")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "diffsamp\[torch\]"'):
        ds.from_torch(object(), process=FLOW)


@pytest.fixture
def folder(tmp_path):
    """A pipeline's folder, whose weights nobody reads."""
    files = {
        "model_index.json": {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "clip_sample": False},
        "unet/config.json": {"in_channels": 3, "out_channels": 3, "sample_size": 8},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return tmp_path


def test_from_pretrained_names_its_extra(without, folder):
    without("diffusers")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "diffsamp\[diffusers\]"'):
        ds.from_pretrained(folder)


def test_folders_are_looked_at_before(without, folder):
    without("diffusers", "huggingface_hub")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ds.from_pretrained(folder / "nothing")
    with pytest.raises(FileNotFoundError, match=r"by its name, pip install"):
        ds.from_pretrained("somebody/something")
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        ds.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "model.bin")
    with pytest.raises(ValueError, match=r"as a pickle \(model\.bin\)"):
        ds.from_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "MotionAdapter"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="class MotionAdapter, which is not read"):
        ds.from_pretrained(folder)


def test_networks_name_theirs(without, tmp_path):
    net = ds.ScoreFn(lambda p, x, t: x, None, FLOW, prediction="velocity")
    without("flatbuffers")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "diffsamp\[export\]"'):
        ds.export_network(net, tmp_path / "net", shape=(2,))
