"""Where methods' weights come from: a URL, a torch.hub repo, or a file or folder at hand."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from models.weights import fit_
from utils.checkpoint import load_tensors

PUBLISHED, NONE = "published", "none"
OWN_PACKAGES = {each.parent.name for each in Path(__file__).parents[1].glob("*/__init__.py")}


def not_had(what: str, where: str, error: Exception | str) -> RuntimeError:
    """The one line for weights that can't be fetched."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RuntimeError(
        f"{what}: its weights could not be had from {where} ({reason}); bring them by hand and give --weights PATH"
    )


def fetched(what: str, url: str, name: str | None = None, sha: str | None = None) -> Path:
    """A published file in torch.hub's cache, where it is fetched once. sha: how its SHA-256 begins."""
    path = Path(torch.hub.get_dir(), "checkpoints", name or Path(urlparse(url).path).name)
    if not path.is_file():
        logging.info(f"{what}: fetching {url}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha, progress=False)
        except Exception as error:  # whatever the network or the server raise
            raise not_had(what, url, error) from error
    return path


def state_of(what: str, weights: str | Path, url: str, **fetching: str) -> dict[str, Tensor] | None:
    """`weights` of a method -> state dict: fetched from the URL, read from a file, or None for random ones."""
    if str(weights) == NONE:
        return None
    published = str(weights) == PUBLISHED
    path = fetched(what, url, **fetching) if published else Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no file {path}; --weights wants the one of {url}")
    try:
        state = load_tensors(path)
    except ValueError as error:
        if published:  # a page that says no, in place of the file
            path.unlink()
            raise not_had(what, url, "what came is no such file") from error
        raise
    return state.get("state_dict", state)


def fill(module: nn.Module, state: dict[str, Tensor] | None, what: str) -> None:
    """A state dict into a network, strictly. None leaves it as it is: random."""
    if state is not None:
        fit_(module, state, f"the file of {what}")


@contextmanager
def own_packages_hidden() -> Iterator[None]:
    """Inside, `import models` or `import utils` finds a hub repo's own, where it has such; after it, ours again."""

    def known() -> dict[str, object]:
        return {name: each for name, each in sys.modules.items() if name.split(".")[0] in OWN_PACKAGES}

    ours = known()
    for name in ours:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in known():
            del sys.modules[name]
        sys.modules.update(ours)


def from_hub(what: str, repo: str, entry: str, weights: str | Path, **settings: object) -> nn.Module:
    """A network from a repo with a hubconf.py, "owner/name:commit"; or, as weights, a folder that holds that repo.

    It runs the code of that repo, which also fetches the weights.
    """
    if str(weights) == NONE:
        raise ValueError(f"{what} comes from {repo} with its weights: there is no --weights none")
    local = str(weights) != PUBLISHED
    if local and not Path(weights, "hubconf.py").is_file():
        raise FileNotFoundError(f"{what}: {weights} has no hubconf.py; --weights wants a copy of {repo}")
    place, source = (str(weights), "local") if local else (repo, "github")
    logging.info(f"{what}: torch.hub.load({place!r}, {entry!r})")
    try:
        with own_packages_hidden():
            # A commit is neither branch nor tag, which the validation looks for.
            return torch.hub.load(
                place, entry, source=source, trust_repo=True, skip_validation=True, verbose=False, **settings
            )
    except Exception as error:  # whatever the network, the server or the repo's code raise
        raise not_had(what, place, error) from error


class HubNetwork(nn.Module):
    """Normalised images (B, 3, H, W) -> (B, D), by what `entry` of the repo `source` makes, see `from_hub`."""

    source: str
    entry: str
    settings: dict = {}

    def __init__(self, weights: str = "published") -> None:
        super().__init__()
        self.net = from_hub(type(self).__name__, self.source, self.entry, weights, **self.settings)

    def describe(self, images: Tensor) -> Tensor:
        return self.net(images)
