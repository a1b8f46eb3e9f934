"""A saved folder is a whole model: it loads where our package is not installed, and gives equal logits."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.test_modeling import TEXT, TOWER, VISION
from tests.model.test_processing import noise
from tinymodal.compose.tiny import tiny_tokenizer
from tinymodal.model import modeling_tinymodal
from tinymodal.model.configuration_tinymodal import AUTO_MAP, TinyModalConfig
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration
from tinymodal.model.processing_tinymodal import TinyModalProcessor

PATIENCE_S = 280
"""The process takes about 15 s, most of it imports; below pytest's own limit of 300 s."""

SCRIPT = """
import importlib.util, json, sys
import torch, transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

assert importlib.util.find_spec("tinymodal") is None, "our package is in the way"
folder, own, out = sys.argv[1:]
known = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **known)
processor = AutoProcessor.from_pretrained(folder, **known)
inputs = processor(images=[folder + "/picture.png"] * 3, text=["<image> what?", "<image> or <image>?"])
found = {"config": type(config).__name__, "processor": type(processor).__name__}
classes = [AutoModelForImageTextToText]
if hasattr(transformers, "AutoModelForMultimodalLM"):
    classes.append(transformers.AutoModelForMultimodalLM)
for cls in classes:
    model, info = cls.from_pretrained(folder, output_loading_info=True, **known)
    assert not info["missing_keys"], info["missing_keys"]
    with torch.no_grad():
        found[cls.__name__] = type(model).__name__
        logits = model.eval()(**inputs).logits
core = AutoModel.from_pretrained(folder, **known).eval()
with torch.no_grad():
    states = core(**inputs).last_hidden_state
found["AutoModel"] = type(core).__name__
found["image_processor"] = type(AutoImageProcessor.from_pretrained(folder, **known)).__name__
tied = model.lm_head.weight is model.get_input_embeddings().weight
made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
model.save_pretrained(out + "/again")
processor.save_pretrained(out + "/again")
seen = {"logits": logits, "states": states, "made": made, "tied": tied, "inputs": dict(inputs)}

model = AutoModelForImageTextToText.from_pretrained(own, **known).eval()
pixels = torch.linspace(-1, 1, 3 * 24 * 24).view(1, 3, 24, 24)
with torch.no_grad():
    seen["own"] = model(input_ids=torch.tensor([[5] * 36 + [7]]), pixel_values=pixels).logits
torch.save(seen, out + "/seen.pt")
json.dump(found, open(out + "/found.json", "w"))
"""


def elsewhere(script: str, *args: object, home: Path) -> None:
    """Run a script in a process that has transformers and torch, and not this repository."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
    }
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
    }
    # -P: the working folder is not searched; -s: nor is the user's own site-packages.
    done = subprocess.run(
        [sys.executable, "-P", "-s", "-c", script, *map(str, args)],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def installed() -> bool:
    """Whether the interpreter itself carries our package."""
    try:
        return bool(importlib.metadata.version("tinymodal"))
    except importlib.metadata.PackageNotFoundError:
        return False


HIDE = """
import importlib.abc, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tinymodal":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
real = __import__("importlib.util").util.find_spec
__import__("importlib.util").util.find_spec = lambda name, *a: None if name == "tinymodal" else real(name, *a)
"""
"""Put before a script where the package is installed: importing it fails as if it were not."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, TinyModalForConditionalGeneration, TinyModalProcessor]:
    folder = tmp_path_factory.mktemp("hub") / "a-model.of-ours"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = TinyModalConfig(
        # A tied head that is capped: both must travel.
        text_config={**TEXT, "model_type": "gemma2", "head_dim": 8, "vocab_size": len(tokenizer)},
        vision_config=VISION,
        connectors={"image": {"name": "pixel_shuffle"}},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = TinyModalForConditionalGeneration(config).eval()
    processor = TinyModalProcessor.of(config, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    noise().save(folder / "picture.png")
    return folder, model, processor


def test_a_fresh_process_without_our_package_loads_it_by_every_auto_class(saved, tmp_path):
    folder, model, processor = saved
    # With a tower that transformers does not know, beside one that it does.
    own = TinyModalConfig(text_config=TEXT, vision_config=TOWER, image_token_id=5)
    with_own_tower = TinyModalForConditionalGeneration(own).eval()
    with_own_tower.save_pretrained(tmp_path / "own")

    elsewhere((HIDE if installed() else "") + SCRIPT, folder, tmp_path / "own", tmp_path, home=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {
        "config": "TinyModalConfig",
        "processor": "TinyModalProcessor",
        "image_processor": "TinyModalImageProcessor",
        "AutoModel": "TinyModalModel",
        "AutoModelForImageTextToText": "TinyModalForConditionalGeneration",
        "AutoModelForMultimodalLM": "TinyModalForConditionalGeneration",
    }
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    inputs = processor(images=[folder / "picture.png"] * 3, text=["<image> what?", "<image> or <image>?"])
    assert all(torch.equal(seen["inputs"][key], inputs[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(seen["logits"], model(**inputs).logits)
        assert torch.equal(seen["states"], model.model(**inputs).last_hidden_state)
    assert torch.equal(seen["made"], model.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert seen["tied"]
    pixels = torch.linspace(-1, 1, 3 * 24 * 24).view(1, 3, 24, 24)
    with torch.no_grad():
        expected = with_own_tower(input_ids=torch.tensor([[5] * 36 + [7]]), pixel_values=pixels).logits
    assert torch.equal(seen["own"], expected)

    # What that process saved is the same folder again, code included.
    again = tmp_path / "again"
    assert {f.name for f in folder.iterdir()} - {"picture.png"} == {f.name for f in again.iterdir()}
    for file in folder.glob("*.py"):
        assert file.read_bytes() == (again / file.name).read_bytes()
    reloaded = TinyModalForConditionalGeneration.from_pretrained(again).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)


def test_with_our_package_it_loads_without_trust(saved):
    folder, model, _ = saved
    again = TinyModalForConditionalGeneration.from_pretrained(folder).eval()
    inputs = TinyModalProcessor.from_pretrained(folder)(images=noise(), text="<image>")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert type(again) is TinyModalForConditionalGeneration


def test_a_folder_names_a_class_for_every_door_and_holds_its_file(saved):
    folder, _, _ = saved
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    for place in AUTO_MAP.values():
        file, name = place.split(".")
        tree = ast.parse((folder / f"{file}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_the_code_that_travels_needs_only_what_every_transformers_user_has():
    """Flat files that import each other relatively, and torch, transformers and what it needs itself, PIL."""
    allowed = {"torch", "transformers", "safetensors", "numpy", "PIL", *sys.stdlib_module_names}
    files = {file.stem for file in Path(modeling_tinymodal.__file__).parent.glob("*.py")}
    for file in Path(modeling_tinymodal.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.partition(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).partition(".")[0] in allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1
                assert node.module in files, file.name
