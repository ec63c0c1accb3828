"""Several processes compute what one does: gradients, descriptors, whole runs; and they leave together."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_resume import MODEL, ROOT, SHORT, differences

import eval
import train
from augmentations.year_wise import Augmentation
from losses.multi_similarity import MultiSimilarityLoss
from models.config import ModelConfig
from models.earthloc import EarthLoc
from retrieval.describe import Describer
from utils import distributed
from utils.arguments import run as run_script
from utils.checkpoint import load_checkpoint
from utils.runs import Run, make_optimizer
from utils.signals import EXIT_CODE

REGIONS, YEARS, SIZE = 8, 4, 16


def meeting_place():
    """-> where processes find each other, and what they need to know of it. As torchrun does, the parent keeps it: a
    port that was only looked for could be another's by the time the first process opens it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def spawn(function, world, *rest):
    """function(rank, *rest) in `world` processes that know each other -> what each returned."""
    results = mp.get_context("fork").SimpleQueue()
    place, environment = meeting_place()

    def body(rank):
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), **environment}
        with distributed.processes(torch.device("cpu"), 240):
            results.put((rank, function(rank, *rest)))

    children = [mp.get_context("fork").Process(target=body, args=(rank,)) for rank in range(world)]
    for child in children:
        child.start()
    found = dict(results.get() for _ in children)
    for child in children:
        child.join()
        assert child.exitcode == 0
    return [found[rank] for rank in range(world)]


# Gradients


def problem():
    """A small real model in float64, its views (B, Y, 3, S, S), labels, and a neutral mask with some pairs."""
    torch.manual_seed(0)
    model = EarthLoc(ModelConfig("resnet18", "layer1", "none", "gem", 8, SIZE)).double()
    views = torch.rand(REGIONS, YEARS, 3, SIZE, SIZE, dtype=torch.float64)
    labels = torch.arange(REGIONS).repeat_interleave(YEARS)
    shared = torch.zeros(REGIONS, REGIONS, dtype=torch.bool)
    shared[0, 5] = shared[5, 0] = shared[2, 3] = shared[3, 2] = True  # within a rank's part, and across
    return model, views, labels, shared[labels][:, labels]


def own_with_gradient(values):
    """The usual mistake: what others sent carries no gradient."""
    parts = [torch.empty_like(values) for _ in range(distributed.world())]
    dist.all_gather(parts, values.detach())
    parts[distributed.rank()] = values
    return torch.cat(parts)


def one_update(_, wrong=None):
    """train.update on this rank's part of the problem -> gradients, loss, BatchNorm's averages."""
    model, views, labels, neutral = problem()
    network = distributed.wrap(model)
    mine = distributed.part(REGIONS)
    used = SimpleNamespace(gather=distributed.gather)
    if wrong == "local negatives":
        used.gather = lambda values: values
        labels = labels[: (mine.stop - mine.start) * YEARS]
        neutral = neutral[mine.start * YEARS : mine.stop * YEARS, mine.start * YEARS : mine.stop * YEARS]
    if wrong == "detached gather":
        used.gather = own_with_gradient
    if wrong == "1 / world":
        for each in model.parameters():
            each.register_hook(lambda gradient: gradient / distributed.world())
    if wrong == "no average":
        network = model
    if wrong == "local BatchNorm":
        for module in model.modules():
            if isinstance(module, distributed.GlobalBatchNorm):
                module.__class__ = torch.nn.BatchNorm2d
    before, train.distributed = train.distributed, used
    try:
        run = Run(model, make_optimizer(model, 1e-3), network=network)
        loss, *_ = train.update(
            run, views[mine].flatten(0, 1), labels, neutral, MultiSimilarityLoss(base=0.5), 1e-3, "fp32"
        )
    finally:
        train.distributed = before
    gradients = torch.cat([each.grad.flatten() for each in model.parameters()])
    averages = torch.cat([each.double().flatten() for each in model.buffers()])
    return gradients.numpy(), float(loss), averages.numpy()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_those_of_one_process(world):
    gradients, loss, averages = one_update(0)
    assert np.abs(gradients).max() > 1e-3 and len(gradients) > 100_000
    for found in spawn(one_update, world):
        assert np.abs(found[0] - gradients).max() < 1e-10 and abs(found[1] - loss) < 1e-10
        assert np.abs(found[2] - averages).max() < 1e-10


@pytest.mark.parametrize("wrong", ["local negatives", "detached gather", "1 / world", "no average", "local BatchNorm"])
def test_each_usual_mistake_is_noticed(wrong):
    gradients, _, _ = one_update(0)
    for found in spawn(one_update, 2, wrong):
        assert np.abs(found[0] - gradients).max() > 1e-4


def test_global_batchnorm_also_where_an_activation_follows():
    """timm's layer of the EfficientNet; torch's own BatchNorm on the whole batch is the expectation."""
    norm_act = pytest.importorskip("timm.layers").BatchNormAct2d

    def body(_):
        torch.manual_seed(0)
        x, layer = torch.randn(8, 3, 5, 5, dtype=torch.float64), torch.nn.Sequential(norm_act(3)).double()
        distributed.use_global_batchnorm(layer)
        trained = layer(x[distributed.part(8)])
        return trained.detach().numpy(), layer.eval()(x).detach().numpy(), layer[0].running_var.numpy()

    trained, evaluated, variance = body(0)
    parts = spawn(body, 2)
    assert np.abs(np.concatenate([part[0] for part in parts]) - trained).max() < 1e-12
    assert all(np.abs(part[1] - evaluated).max() < 1e-12 for part in parts)
    assert all(np.abs(part[2] - variance).max() < 1e-12 for part in parts)


@pytest.mark.parametrize("group", ["none", "image", "batch", "year"])
def test_parts_are_augmented_as_in_the_whole_batch(group):
    images = torch.randint(0, 256, (8, 4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = Augmentation(16, group, clouds=0.5, haze=0.5, hue=0.1)
    whole = augment(images, torch.Generator().manual_seed(5))
    for size in (2, 4):
        for start in range(0, 8, size):
            rows = slice(start, start + size)
            part = augment(images[rows], torch.Generator().manual_seed(5), rows, 8)
            assert torch.equal(part, whole[rows]) if group != "none" else torch.allclose(part, whole[rows])


def halves(_, resumed):
    """Six updates, or three and three more as after a resume -> all weights and averages."""

    def start():
        model = problem()[0].float()
        return Run(model, make_optimizer(model, 1e-3), network=distributed.wrap(model))

    _, views, labels, neutral = problem()
    views = views[distributed.part(REGIONS)].flatten(0, 1).float()
    run = start()
    for step in range(6):
        if resumed and step == 3:
            before, run = run, start()
            run.model.load_state_dict(before.model.state_dict())
            run.optimizer.load_state_dict(before.optimizer.state_dict())
        train.update(run, views, labels, neutral, MultiSimilarityLoss(base=0.5), 1e-3, "fp32")
    assert not any(key.startswith("module.") for key in run.model.state_dict())
    return torch.cat([each.flatten().double() for each in run.model.state_dict().values()]).numpy()


def test_a_resumed_run_of_four_adds_in_the_same_order():
    """With three ranks and more the order of a sum shows in its last bits."""
    whole, parts = spawn(halves, 4, False), spawn(halves, 4, True)
    assert all(np.array_equal(whole[0], each) for each in whole + parts)


# Description, gathering


@pytest.mark.parametrize("count", [0, 1, 5, 13])
def test_descriptors_are_the_same_bits_without_padding(world, tmp_path, count):
    files = sorted(world.path.rglob("*.jpg"))[:count]
    if count > 3:
        (tmp_path / "broken.jpg").write_bytes(b"?")
        files[3] = tmp_path / "broken.jpg"
    torch.manual_seed(0)
    model = EarthLoc(ModelConfig("resnet18", "layer1", "none", "gem", 8, 32))

    def body(_):
        return Describer(model, 32, batch_size=2, rotations=(0, 90), progress=False)(files)

    expected, failures = body(0)
    for found, failed in spawn(body, 3):
        assert found.dtype == np.float32 and np.array_equal(found, expected, equal_nan=True) and failed == failures
    assert len(failures) == (count > 3)


def test_what_goes_wrong_on_the_first_is_raised_on_all():
    def body(rank):
        try:
            distributed.from_first(lambda: int("x"))
        except ValueError as error:
            return str(error)

    assert spawn(body, 2) == ["invalid literal for int() with base 10: 'x'"] * 2


def test_a_batch_that_does_not_divide():
    def body(_):
        with pytest.raises(ValueError, match="--batch_size 9 does not divide among 2 processes; 8 would"):
            distributed.part(9)
        return distributed.part(8)

    assert spawn(body, 2) == [slice(0, 4), slice(4, 8)]


# Whole runs

NUMBERS = itertools.count()


class Child:
    """A process that runs a script's main, forked: nothing is imported anew. It leads a process group of its own."""

    def __init__(self, script, folder, flags, environment, place=None):
        self.log, self.place = folder / f"output_{next(NUMBERS)}", place
        self.pid = os.fork()
        if not self.pid:
            try:
                os.setsid()
                output = os.open(self.log, os.O_WRONLY | os.O_CREAT)
                os.dup2(output, 1)
                os.dup2(output, 2)
                sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
                sys.argv = [f"{script.__name__}.py", *flags]
                os.chdir(folder)
                os.environ |= environment
                run_script(script.main, script.parse_arguments(flags))
                code = 0
            except SystemExit as leaving:
                code = leaving.code
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            os._exit(code)

    def say(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self):
        """-> exit code; the test's own time-out ends a wait for nothing."""
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except BaseException:
            os.killpg(self.pid, signal.SIGKILL)
            raise


def start(world, script, folder, flags):
    """The script in `world` processes, as torchrun starts them, but none looks after the others -> Children."""
    place, environment = meeting_place()
    return [
        Child(
            script,
            folder,
            flags,
            {} if world == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **environment},
            place,
        )
        for rank in range(world)
    ]


def signal_to_second(patch, number, call):
    """The second process, once forked, gets the signal after that update (0: the first one)."""
    update, calls = train.update, itertools.count()

    def patched(*values):
        result = update(*values)
        if distributed.rank() == 1 and next(calls) == call:
            signal.raise_signal(number)
        return result

    patch.setattr(train, "update", patched)


def finish(children, codes):
    found = [each.wait() for each in children]
    assert found == codes, "\n".join(each.say() for each in children)
    return [each.say() for each in children]


def words(world, *more):
    return ["--dataset_path", str(world.path), *MODEL, *SHORT, "--num_workers", "0", *map(str, more)]


def newest(folder, log="r"):
    return max((folder / "logs" / log).iterdir())


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """Folder in which two processes trained undisturbed, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    outputs = finish(start(2, train, folder, words(world)), [0, 0])
    return folder, outputs


def test_two_processes_train_as_one_does(world, two, tmp_path, monkeypatch):
    """Up to rounding, which grows from iteration to iteration: batches, draws, loss and clusters are the same."""
    monkeypatch.chdir(tmp_path)
    one = load_checkpoint(train.main(train.parse_arguments(words(world))) / "last.pt")
    other = load_checkpoint(newest(two[0]) / "last.pt")
    assert differences(one["clusters"], other["clusters"]) == [] and other["iteration"] == 10
    for key, value in one["model"].items():
        assert torch.allclose(value.double(), other["model"][key].double(), atol=2e-4, rtol=1e-3), key
    assert "Done: 10 iterations" in two[1][0] and "Done" not in two[1][1]
    assert not list(newest(two[0]).glob("rank1/*.pt")) and (newest(two[0]) / "rank1" / "debug.log").exists()


def test_two_processes_train_with_photos_as_one_does(photo_world, tmp_path, monkeypatch):
    """Each has its part of the quadruplets and its part of the pairs, through the network together."""
    monkeypatch.chdir(tmp_path)
    flags = "--positives", "years+photos", "--cluster_draw", "photos", "--iterations", "6", "--num_workers", "0"
    flags = words(photo_world, *flags)
    finish(start(2, train, tmp_path, [*flags, "--log_dir", "two"]), [0, 0])
    one, two = (
        load_checkpoint(folder / "last.pt")
        for folder in (train.main(train.parse_arguments(flags)), newest(tmp_path, "two"))
    )
    assert differences([one["clusters"], one["shares"]], [two["clusters"], two["shares"]]) == []
    for key, value in one["model"].items():
        assert torch.allclose(value.double(), two["model"][key].double(), atol=2e-4, rtol=1e-3), key


def test_a_signal_to_any_one_stops_all_and_they_resume_with_the_same_bits(world, two, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_to_second(patch, signal.SIGTERM, 4)
        outputs = finish(start(2, train, tmp_path, words(world)), [EXIT_CODE, EXIT_CODE])
    assert "SIGTERM: stopped before iteration 6 of 10" in outputs[0]
    stopped = newest(tmp_path)
    assert load_checkpoint(stopped / "last.pt")["iteration"] == 5
    finish(start(2, train, tmp_path, words(world, "--resume", "auto")), [0, 0])
    assert newest(tmp_path) != stopped
    assert differences(load_checkpoint(newest(two[0]) / "last.pt"), load_checkpoint(newest(tmp_path) / "last.pt")) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_when_one_dies_or_hangs_the_others_leave_with_an_error(world, tmp_path, monkeypatch, number):
    signal_to_second(monkeypatch, number, 4)
    first, second = start(2, train, tmp_path, words(world, "--process_timeout", 20))
    try:
        assert first.wait() == 2 and "error: " in first.say()
    finally:
        os.killpg(second.pid, signal.SIGKILL)
        os.waitpid(second.pid, 0)


def test_evaluation_by_two_gives_the_same_files(world, two, tmp_path):
    flags = [
        "--resume",
        str(newest(two[0]) / "best.pt"),
        "--dataset_path",
        str(world.path),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--num_workers",
        "0",
        "--batch_size",
        "4",
        "--descriptors",
        "none",
    ]
    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        finish(start(count, eval, tmp_path / str(count), flags), [0] * count)
    for name in ("results.json", "predictions.csv", "predictions.jpg"):
        one, other = (newest(tmp_path / count, "eval") / name for count in "12")
        assert one.read_bytes() == other.read_bytes(), name
    assert json.loads((newest(tmp_path / "2", "eval") / "results.json").read_text())["sets"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("torchrun", path=str(Path(sys.executable).parent)), reason="no torchrun here")
def test_torchrun_with_four_processes_is_stopped_and_resumed(world, tmp_path):
    """A signal to torchrun itself, which passes it on; with four ranks the sums of gradients have an order, too."""
    torchrun = [
        str(Path(sys.executable).with_name("torchrun")),
        "--standalone",
        "--nproc_per_node",
        "4",
        str(ROOT / "train.py"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def go(folder, *more):
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*torchrun, *words(world, *more)],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )

    output, _ = (whole := go(tmp_path / "whole")).communicate()
    assert whole.returncode == 0, output
    process = go(tmp_path / "parts")
    assert any("Iteration 0: " in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    output, _ = (rest := go(tmp_path / "parts", "--resume", "auto")).communicate()
    assert rest.returncode == 0, output
    whole, parts = (load_checkpoint(newest(tmp_path / name) / "last.pt") for name in ("whole", "parts"))
    assert differences(whole, parts) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not shutil.which("torchrun", path=str(Path(sys.executable).parent)), reason="no torchrun here")
def test_two_machines_train_as_one_with_as_many_processes(world, tmp_path):
    """docs/training.md's two commands on loopback, each machine with a folder of its own: no disk is shared."""
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"]

    def go(folder, *more):
        folder.mkdir()
        return subprocess.Popen(
            [*torchrun, *more, str(ROOT / "train.py"), *words(world)],
            cwd=folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def finish_all(processes):
        outputs = [process.communicate()[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
        return outputs

    finish_all([go(tmp_path / "one", "--standalone")])
    with socket.socket() as looked_for:
        looked_for.bind(("127.0.0.1", 0))
        port = str(looked_for.getsockname()[1])
    meeting = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", port]
    outputs = finish_all([go(tmp_path / str(node), *meeting, "--node_rank", str(node)) for node in (0, 1)])
    assert "Done: 10 iterations" in outputs[0] and "Done" not in outputs[1]
    one, two = (load_checkpoint(newest(tmp_path / name) / "last.pt") for name in ("one", "0"))
    assert differences(one, two) == []
    assert not list(newest(tmp_path / "1").rglob("*.pt")) and (newest(tmp_path / "1") / "rank1" / "debug.log").exists()
