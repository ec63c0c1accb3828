"""One line to load, save or publish a model: `from_pretrained`, `save_pretrained`, `push_to_hub`.

huggingface_hub's mixin with our own reading and writing: every file that `read_model` knows loads, from a path, from a
folder or from the Hugging Face hub; a path or a folder needs no network.
"""

import json
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import ModelCard, PyTorchModelHubMixin, hf_hub_download
from torch import nn

from models.config import EnsembleConfig, ModelConfig
from models.weights import CONFIG_FILE, HUB_FILE, interface, save_safetensors

FOLDER_FILES = (HUB_FILE, "best.pt", "last.pt")  # what a folder is looked through for, the first one counts
PAPER = "https://arxiv.org/abs/2403.06758"
SHOWN_RECALLS = ("1", "5", "10", "20", "100")
# Flags that say nothing about the weights, or where somebody's files lie.
UNTOLD = {"device", "log_dir", "num_workers", "process_timeout", "resume", "traceback"}


class HubMixin(PyTorchModelHubMixin, library_name="earthloc", paper_url=PAPER):
    """What EarthLoc and Ensemble take from the hub. A class has a `config` and is made from one."""

    @classmethod
    def from_pretrained(cls, source: str | Path, filename: str | None = None, **download: object) -> nn.Module:
        """The model (an EarthLoc, or an Ensemble) in eval mode, of a file, a folder, or a repository of the hub
        ("name/earthloc").

        source: a file as for `load_model` (ours, a checkpoint of train.py, released weights, TorchGeo's); a folder of
        `save_pretrained` or of a training run. filename: in a folder or a repository, if it is none of the usual ones.
        download: revision, cache_dir, token, local_files_only … as `huggingface_hub.hf_hub_download` takes them.
        Raises FileNotFoundError or ValueError that names the file; the hub's own errors where a download fails.
        """
        path = Path(source)
        if path.is_dir():
            path = _file_in(path, filename)
        elif not path.is_file():
            if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
                raise FileNotFoundError(f"{source}: no such file or folder, and no repository's name (NAME/REPOSITORY)")
            path = Path(hf_hub_download(str(source), filename or HUB_FILE, **download))
        from models.earthloc import load_model  # whose models have this class as a base

        return load_model(path).eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        save_safetensors(self, save_directory / HUB_FILE, half=False)
        text = json.dumps(asdict(self.config) | {"interface": interface(self)}, indent=2)
        (save_directory / CONFIG_FILE).write_text(text + "\n")

    def generate_model_card(
        self, run: str | Path | None = None, results: str | Path | None = None, **_: object
    ) -> ModelCard:
        """run: folder of the training, with config.json. results: folder of an evaluation by eval.py, with
        results.json; default: the run's own, if it has one. Both come by `model_card_kwargs` of `save_pretrained`."""
        flags = _read_json(Path(run) / CONFIG_FILE) if run is not None else None
        if results is None and run is not None and (Path(run) / "results.json").is_file():
            results = run
        found = _read_json(Path(results) / "results.json") if results is not None else None
        return ModelCard(model_card(self.config, interface(self), flags, found))


def _file_in(folder: Path, filename: str | None) -> Path:
    names = FOLDER_FILES if filename is None else (filename,)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder}: holds no {' or '.join(names)}; give filename=, or a folder with one")
    return found


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give the folder of a run of train.py or eval.py") from None
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error}); is it the folder of a run?") from error


def model_card(
    config: ModelConfig | EnsembleConfig, takes: dict, flags: dict | None = None, results: dict | None = None
) -> str:
    """README.md of a repository: the model's shape, what it takes and gives (see `interface`), a line of use, and if
    given the flags it was trained with (config.json of a run) and its recalls (results.json)."""
    shapes = asdict(config).get("members", [asdict(config)])
    lines = [
        "---",
        "library_name: earthloc",
        "pipeline_tag: image-feature-extraction",
        "tags: [visual-place-recognition, image-retrieval, earth-observation, astronaut-photography]",
        "---",
        f"# EarthLoc, {config.name}",
        "",
        f"Describes photos of Earth from orbit, to find where they were taken by retrieval ([paper]({PAPER})).",
        "",
        "```python",
        'model = EarthLoc.from_pretrained("NAME/REPOSITORY")  # from models.earthloc, in a clone of the code',
        f"descriptors = model(images)  # {takes['input']} -> {takes['output']}",
        "```",
        "",
        *_table(("", *[""] * len(shapes)), [(name, *(f"{each[name]}" for each in shapes)) for name in shapes[0]]),
    ]
    if flags is not None:
        told = {name: value for name, value in flags.items() if name not in UNTOLD and value is not None}
        for name in ("dataset_path", "weights"):  # the file's name, not where it lies
            told |= {name: Path(told[name]).name} if name in told else {}
        lines += ["", "## Training", "", *_table(("flag", "value"), [(f"`--{k}`", f"{v}") for k, v in told.items()])]
    if results is not None:
        rows = [(name, each) for name, each in results["sets"].items()] + [("average", results["average"])]
        shown = [
            (name, *(f"{each['recalls'][k]:.1f}" for k in SHOWN_RECALLS)) for name, each in rows if each.get("recalls")
        ]
        lines += ["", "## Results", "", f"Recall@N in percent, evaluated on {Path(results['dataset']).name}.", ""]
        lines += _table(("set", *(f"R@{k}" for k in SHOWN_RECALLS)), shown)
    return "\n".join(lines) + "\n"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]
