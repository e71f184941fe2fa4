"""`sparse-pretrain bench`, on a CPU."""

import json

import pytest

from sparse_pretrain import cli


def test_bench_writes_its_results(tmp_path, capsys):
    cli.main(["bench", "part=[ceilings]", "accelerator=cpu", "minutes=1", f"out={tmp_path}/results"])
    output = capsys.readouterr().out
    assert "ceilings/copy" in output
    (kept,) = (tmp_path / "results").glob("cpu_*.json")
    found = json.loads(kept.read_text())
    assert not found["rehearsal"]
    assert {row["case"] for row in found["rows"]} == {"copy", "matmul float32"}
    assert found["rows"][0]["extra"]["gb_per_s"] > 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("part=[fnn]", "part: found fnn; allowed: ceilings, products, operators, ffn, step, block, inference, pretrain; did you mean ffn?"),
        ("minutes=0", "minutes: found 0; allowed: at least 0.1"),
        ("accelerator=gpu", "accelerator: found gpu, but PyTorch sees no GPU here; allowed: auto, cpu"),
        ("out=/dev/null/x", "out: found /dev/null/x, which cannot be written"),
    ],
)  # fmt: skip
def test_wrong_options(option, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", option])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
