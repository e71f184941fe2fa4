"""The command from end to end on a small task: what it finds, writes, continues and refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from sparse_pretrain import cli, sparsest
from sparse_pretrain.config import SparsestConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.exposition import phases
from sparse_pretrain.exposition.connections import connections
from sparse_pretrain.exposition.networks import Shape, accuracy
from sparse_pretrain.exposition.search import Mask
from sparse_pretrain.exposition.summary import Summary, pruning_text, search_text
from sparse_pretrain.exposition.trials import Lab, Outcome, Trial, read, stacks
from sparse_pretrain.paths import config_dir
from sparse_pretrain.schema import load

SMALL = {
    "points": 1000,
    "target": 0.51,
    "training.epochs": 2,
    "training.batch_size": 50,
    "search.structure_draws": 2,
    "search.max_neurons": 3,
    "search.finalists": 2,
    "search.finalist_draws": 2,
    "pruning.methods": ["snip", "gmp", "imp", "rigl", "sr_ste", "transposable"],
    "pruning.widths": [4, 8],
    "pruning.targets": [12, 30],
    "pruning.patterns": ["2:4"],
    "pruning.draws": 2,
    "pruning.rounds": 2,
    "accelerator": "cpu",
}


def config(out: Path, **changes) -> SparsestConfig:
    cfg = SparsestConfig(out=str(out))
    for option, value in (SMALL | changes).items():
        *groups, name = option.split(".")
        target = cfg
        for group in groups:
            target = getattr(target, group)
        assert hasattr(target, name), option
        setattr(target, name, value)
    return cfg


def results(out: Path) -> dict:
    """Everything the command found, whatever the order and the time."""
    values = json.loads((out / sparsest.RESULT_FILE).read_text())
    del values["settings"]["out"]
    return values | {"trials": read(out / sparsest.TRIALS_FILE)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    sparsest.run(config(out))
    return out


def test_what_it_writes(whole):
    values = results(whole)
    assert (whole / "sparsest.png").read_bytes().startswith(b"\x89PNG")
    sparse = values["sparsest"]
    assert sparse["accuracy"] >= 0.51
    assert sparse["weights"] == min(row["weights"] for row in values["frontier"] if row["best"]["accuracy"] >= 0.51)
    assert {(row["method"], row["target"], row["network"]) for row in values["pruning"]} == {
        *((method, target, network) for method in ("snip", "gmp", "imp", "rigl", "sr_ste") for target in ("12", "30")
          for network in ("4-4-4", "8-8-8")),
        *((method, "2:4", network) for method in ("sr_ste", "transposable") for network in ("4-4-4", "8-8-8")),
    }  # fmt: skip
    assert all(row["trainings"] == 2 for row in values["pruning"])
    assert values["settings"]["training"]["epochs"] == 2
    assert values["versions"]["torch"] == torch.__version__


def test_the_parameters_it_writes_are_the_network_s(whole):
    """In the file they are without disconnected neurons, and reach the accuracy that was found in training."""
    values, lab = results(whole), Lab(config(whole), whole / sparsest.TRIALS_FILE, torch.device("cpu"))
    for which in ("sparsest", "counterpart"):
        found = values[which]
        layers = [(torch.tensor(layer["weight"]), torch.tensor(layer["bias"])) for layer in found["layers"]]
        shape = Shape(layers[0][0].shape[0])
        rows = shape.join([w.unsqueeze(0) for w, _ in layers], [b.unsqueeze(0) for _, b in layers])
        assert float(accuracy(rows, shape, lab.task.x, lab.task.y)) == pytest.approx(found["accuracy"], abs=2e-3)
        (after,) = connections(rows, shape)
        assert (after.kept, after.weights, after.parameters) == (
            found["weights"],
            found["weights"],
            found["parameters"],
        )


def test_a_network_alone_is_what_it_is_in_a_stack(whole):
    lab = Lab(config(whole), whole / sparsest.TRIALS_FILE, torch.device("cpu"))
    for kind in {(trial.method, trial.network if trial.method != "mask" else "") for trial in lab.outcomes}:
        trial = next(t for t in lab.outcomes if t.method == kind[0] and (t.network == kind[1] or t.method == "mask"))
        assert lab.judge(*lab.parameters([trial])) == [lab.outcomes[trial]]


def test_the_yaml_says_the_defaults():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert load(SparsestConfig, cli._plain(compose("sparsest"))) == SparsestConfig()


def test_the_same_command_does_nothing_again(whole, capsys):
    before, picture = (whole / sparsest.TRIALS_FILE).read_bytes(), (whole / sparsest.FIGURE_FILE).read_bytes()
    sparsest.run(config(whole))
    assert (whole / sparsest.TRIALS_FILE).read_bytes() == before
    assert (whole / sparsest.FIGURE_FILE).read_bytes() == picture
    assert "\n0 networks trained" in capsys.readouterr().out


def test_more_draws_cost_only_their_own(whole, tmp_path):
    """Trained beside others, and so in other stacks, every network comes out the same."""
    (tmp_path / sparsest.TRIALS_FILE).write_bytes(
        b"".join((whole / sparsest.TRIALS_FILE).read_bytes().splitlines(True)[::2])
    )
    sparsest.run(config(tmp_path))
    assert results(tmp_path) == results(whole)
    sparsest.run(config(tmp_path, **{"pruning.draws": 3}))
    more = results(tmp_path)["trials"]
    assert results(whole)["trials"].items() < more.items()
    assert {trial.draw for trial in more.keys() - results(whole)["trials"].keys()} == {2}


def test_killed_it_goes_on_to_the_same_results(whole, tmp_path):
    out = tmp_path / "out"
    options = [f"{option}={json.dumps(value) if isinstance(value, list) else value}" for option, value in SMALL.items()]
    command = [sys.executable, "-m", "sparse_pretrain.cli", "sparsest", f"out={out}", *options]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(["kernels", os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    trials = out / sparsest.TRIALS_FILE
    deadline = time.monotonic() + 120
    while (
        process.poll() is None
        and time.monotonic() < deadline
        and not (trials.is_file() and trials.stat().st_size > 2000)
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / sparsest.RESULT_FILE).exists()
    trained = len(read(trials))
    assert 0 < trained < len(read(whole / sparsest.TRIALS_FILE))
    with open(trials, "a") as file:
        file.write('{"method": "gmp", "netw')  # as a line that a full disk cut short
    sparsest.run(config(out))
    assert results(out) == results(whole)


def test_other_settings_need_another_folder(whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"out: found .*training.epochs=2 where these have 3"):
        sparsest.run(config(whole, **{"training.epochs": 3}))
    monkeypatch.chdir(tmp_path)
    folders = {sparsest.resolve_out(SparsestConfig(seed=seed)) for seed in (1, 2)}
    assert len(folders) == 2
    other = SparsestConfig(target=0.9)
    other.pruning.draws = 1
    assert sparsest.resolve_out(other) in folders  # which networks are wanted does not change what they are


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.999, "search.max_neurons": 1}, "target: found 0.999, which no structure of up to 1 neurons a layer reached"),
        ({"search.structure": [3, 3, 3], "search.max_weights": 11}, "search.max_weights: found 11, with which no mask of 3-3-3 has"),
        ({"search.structure": [9, 9, 9]}, "search.masks_per_count: found null, for every mask of 9-9-9"),
    ],
    ids=["target", "max_weights", "masks"],
)  # fmt: skip
def test_what_turns_out_not_to_be_possible(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        sparsest.run(config(tmp_path, **changes))
    assert message in str(error.value)


def test_stacks_are_of_one_kind_and_complete():
    trials = [
        Trial(method, network, target, 0.1, "cosine", draw)
        for draw in range(200)
        for method, network, target in [
            ("structure", "3-3-3", ""), ("structure", "2-5-1", ""), ("mask", "01 10/11 01/11 11", ""),
            ("gmp", "8-8-8", "20"), ("gmp", "8-8-8", "30"), ("ste", "8-8-8", "2:4"), ("ste", "8-8-8", "20"),
        ]
    ]  # fmt: skip
    found = list(stacks(trials, 1024))
    assert sorted(map(str, trials)) == sorted(str(trial) for stack in found for trial in stack)
    for stack in found:
        assert len({(trial.method, max(trial.structure), ":" in trial.target) for trial in stack}) == 1
    assert max(len(stack) for stack in found if stack[0].network == "8-8-8") == 128
    assert any(len({trial.target for trial in stack}) == 2 for stack in found)


def test_settings_take_turns():
    cfg = SparsestConfig()
    cfg.training.schedules = ["cosine", "constant"]
    trials = phases.trainings(cfg, "gmp", "8-8-8", "20", 5)
    assert [(trial.lr, trial.schedule) for trial in trials] == [
        (0.1, "cosine"), (0.05, "cosine"), (0.1, "constant"), (0.05, "constant"), (0.1, "cosine"),
    ]  # fmt: skip
    assert [trial.draw for trial in trials] == list(range(5))


def outcome(accuracy_: float, weights: int, kept: int | None = None, disconnected: int = 0) -> Outcome:
    return Outcome(accuracy_, kept or weights, weights, weights + 5, disconnected)


def test_finalists_are_the_best_of_each_number_of_weights():
    masks = ["01 10/01 10/01 10", "01 10/01 11/01 10", "01 10/11 01/01 10", "01 10/01 10/01 11"]
    found = [
        (Trial("mask", mask, "", 0.1, "cosine", draw), outcome(share, Mask.parse(mask).weights))
        for mask, shares in zip(masks, [(0.6, 0.5), (0.7, 0.8), (0.75, 0.76), (0.9, 0.5)], strict=True)
        for draw, share in enumerate(shares)
    ]
    assert list(phases.finalists_of(found, 2)) == [masks[0], masks[3], masks[1]]


def test_summary_and_tables():
    def trial(method, network, target="", draw=0):
        return Trial(method, network, target, 0.1, "cosine", draw)

    summary = Summary(
        0.95,
        (2, 2, 2),
        [(trial("structure", "2-2-2"), outcome(0.97, 14))],
        [(trial("mask", "a"), outcome(0.96, 12)), (trial("mask", "a", draw=1), outcome(0.6, 12)), (trial("mask", "b"), outcome(0.8, 11))],
        [
            (trial("gmp", "8-8-8", "20"), outcome(0.951, 18, 20, 2)),
            (trial("gmp", "8-8-8", "20", 1), outcome(0.99, 19, 20, 0)),
            (trial("gmp", "4-4-4", "16"), outcome(0.7, 10, 16, 4)),
            (trial("snip", "8-8-8", "20"), outcome(0.5, 0, 20, 7)),
            (trial("ste", "8-8-8", "2:4"), outcome(0.999, 84, 88, 1)),
        ],
    )  # fmt: skip
    assert list(summary.frontier) == [11, 12, 14]
    assert summary.frontier[12].best[1].accuracy == 0.96
    assert summary.sparsest == (trial("mask", "a"), outcome(0.96, 12))
    assert summary.counterpart() == (trial("gmp", "4-4-4", "16"), outcome(0.7, 10, 16, 4))
    text = pruning_text(summary)
    rows = [line.split() for line in text.splitlines()]
    assert ["gmp", "18", "8", "70.0%", "16%", "2.0"] in rows  # 47 of 56 kept weights are on paths
    assert ["snip", "-", "-", "-", "100%", "7.0"] in rows
    assert ["ste", "2:4", "8", "84", "99.9%", "99.9%", "5%", "1.0"] in rows
    rows = [line.split() for line in search_text(summary, 9).splitlines()]
    assert ["12", "1", "2", "96.0%"] in rows
    assert "9 dense structures were tried" in search_text(summary, 9)


@pytest.mark.gpu
def test_on_a_gpu(whole, tmp_path):
    """The same counts, and every network at least a network; rounding differs, and small nets take off from it."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    sparsest.run(config(tmp_path, accelerator="gpu"))
    here, there = results(tmp_path)["trials"], results(whole)["trials"]
    for trial in here.keys() & there.keys():
        assert here[trial].kept == there[trial].kept
