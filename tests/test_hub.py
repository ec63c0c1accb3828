"""One line to load, save and publish a model, offline."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.hub
from models.config import ModelConfig
from models.earthloc import EarthLoc, load_model
from models.geoclip import GeoCLIP, GeoClipConfig
from models.geoclip_weights import checkpoint_of

ROOT = Path(__file__).parents[1]
TINY = ModelConfig("resnet18", "layer1", "none", "gem", 16, 64, {"gem_grid": 2})
FOREIGN = ModelConfig("resnet18", "layer2", descriptor_dim=16, image_size=32, aggregator_settings={"mix_depth": 1})


def tiny(seed=0, config=TINY):
    torch.manual_seed(seed)
    return EarthLoc(config).eval()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A test that reaches for the network has failed."""
    monkeypatch.setattr(models.hub, "hf_hub_download", lambda *values, **more: pytest.fail(f"asked for {values}"))


def test_torch_hub_loads_what_ships_and_what_is_given(tmp_path):
    shipped = torch.hub.load(str(ROOT), "earthloc", source="local")
    assert shipped.config == load_model(ROOT / "weights" / "earth.safetensors").config and not shipped.training
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    loaded = torch.hub.load(str(ROOT), "earthloc", source="local", weights=str(tmp_path / "bare.pth"))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))


def test_torch_hub_loads_geoclip(tmp_path):
    torch.manual_seed(0)
    model = GeoCLIP(GeoClipConfig("resnet18", image_size=32, sigmas=(1.0,))).eval()
    torch.save(checkpoint_of(model, torch.zeros(3, 2)), tmp_path / "best.pt")
    loaded = torch.hub.load(str(ROOT), "geoclip", source="local", weights=tmp_path / "best.pt")
    points = torch.tensor([[10.0, 20.0]])
    assert torch.equal(loaded.embed_points(points), model.embed_points(points)) and not loaded.training


def test_what_is_saved_is_loaded_with_the_same_bits(tmp_path):
    model, images = tiny(), torch.rand(2, 3, 64, 64)
    model.save_pretrained(tmp_path / "saved")
    assert {each.name for each in (tmp_path / "saved").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    loaded = EarthLoc.from_pretrained(tmp_path / "saved")
    assert loaded.config == model.config and not loaded.training and torch.equal(loaded(images), model(images))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["backbone"] == "resnet18" and config["interface"]["mean"] == [0.485, 0.456, 0.406]


def test_config_json_stands_in_for_lost_metadata(tmp_path):
    """The shapes of GeM do not tell the image size."""
    tiny().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")
    assert EarthLoc.from_pretrained(tmp_path).config == tiny().config
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    assert EarthLoc.from_pretrained(tmp_path).config.image_size == ModelConfig().image_size != 64


@pytest.mark.parametrize("place", ["file", "folder", "repository"])
@pytest.mark.parametrize("dialect", ["backbone.model.", "backbone."])
def test_released_and_republished_weights_load_from_anywhere(place, dialect, tmp_path, monkeypatch):
    model, images = tiny(config=FOREIGN), torch.rand(2, 3, 32, 32)
    state = {key.replace("backbone.model.", dialect): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "best_model.torch")
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return str(tmp_path / name)

    monkeypatch.setattr(models.hub, "hf_hub_download", download)
    given = {
        "file": (tmp_path / "best_model.torch",),
        "folder": (tmp_path, "best_model.torch"),
        "repository": ("someone/earthloc", "best_model.torch"),
    }[place]
    loaded = EarthLoc.from_pretrained(*given, **({"revision": "v1"} if place == "repository" else {}))
    assert torch.equal(loaded(images), model(images))
    assert asked == ([("someone/earthloc", "best_model.torch", {"revision": "v1"})] if place == "repository" else [])


def test_a_runs_folder_gives_its_best(tmp_path):
    for seed, name in enumerate(("best.pt", "last.pt")):
        torch.save({"model": tiny(seed).state_dict(), "model_config": vars(tiny().config)}, tmp_path / name)
    assert torch.equal(EarthLoc.from_pretrained(tmp_path).fc.weight, tiny(0).fc.weight)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model.safetensors or best.pt or last.pt; give filename="):
        EarthLoc.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="gone.pt: no such file or folder"):
        EarthLoc.from_pretrained(tmp_path / "gone.pt")


RUN = {"dataset_path": "/somewhere/data/earth", "lr": 0.001, "resume": "/secret/last.pt", "loss": "multi_similarity"}
RECALLS = {"1": 57.14, "5": 70.0, "10": 75.0, "20": 80.0, "100": 88.9}
RESULTS = {"dataset": "/somewhere/data", "sets": {"Alps": {"recalls": RECALLS}}, "average": {"recalls": RECALLS}}


def test_the_card_tells_the_runs_own_flags_and_recalls_but_no_paths(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(RUN))
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    tiny().save_pretrained(tmp_path / "a", model_card_kwargs={"run": tmp_path / "run", "results": tmp_path})
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| `--lr` | 0.001 |" in card and "| `--dataset_path` | earth |" in card
    assert "| Alps | 57.1 | 70.0 | 75.0 | 80.0 | 88.9 |" in card and "| average | 57.1" in card
    assert "/somewhere" not in card and "secret" not in card and "| image_size | 64 |" in card
    tiny().save_pretrained(tmp_path / "b")
    card = (tmp_path / "b" / "README.md").read_text()
    assert "## Training" not in card and "## Results" not in card
    with pytest.raises(FileNotFoundError, match="results.json: no such file; give the folder of a run"):
        tiny().save_pretrained(tmp_path / "c", model_card_kwargs={"results": tmp_path / "run"})


def test_push_uploads_the_same_folder(monkeypatch):
    from huggingface_hub import hub_mixin

    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **more):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **more):
            sent.update({each.name: each.stat().st_size for each in Path(folder_path).iterdir()}, **more)
            return "url"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    assert tiny().push_to_hub("someone/earthloc") == "url"
    assert {"model.safetensors", "config.json", "README.md"} <= sent.keys() and sent["repo_id"] == "someone/earthloc"
