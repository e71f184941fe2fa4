import re
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from sparse_pretrain import report
from sparse_pretrain.config import ReportConfig
from sparse_pretrain.errors import UserError
from sparse_pretrain.reporting import figures
from sparse_pretrain.reporting.run_data import labels, read_run

HOSTILE = "<b>&'\"x"


class Balanced(HTMLParser):
    """Checks that every element is closed in order; collects ids and references."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], [], [], Counter()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.handle_attributes(attrs)

    def handle_startendtag(self, tag, attrs):
        self.handle_attributes(attrs)

    def handle_attributes(self, attrs):
        for key, value in attrs:
            if key == "id":
                self.ids.append(value)
            if key in ("href", "xlink:href", "src"):
                self.references.append(value)
            self.references += re.findall(r"url\((.*?)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(make_run, tmp_path):
    folders = [
        make_run("ste", layer_prefix=HOSTILE),
        make_run("dense"),
        make_run("fst", name=f"fst {HOSTILE}"),
        make_run("fst", until=230, seed=2),
    ]
    report.make_report(folders, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_page_is_well_formed_and_escaped(page):
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert parser.tags["svg"] == 2
    assert parser.tags["details"] == 5
    assert not parser.tags["b"]
    assert not parser.tags["script"]
    assert "&lt;b&gt;&amp;&#x27;&quot;x" in page
    assert "126 &amp; 126 &lt;4&gt;" in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_page_needs_nothing_else(page):
    parser = Balanced()
    parser.feed(page)
    assert len(parser.ids) == len(set(parser.ids))  # else a figure would be clipped by another one's path
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in parser.references)
    assert {ref[1:] for ref in parser.references if ref.startswith("#")} <= set(parser.ids)
    assert set(re.findall(r"https?://[^\s\"<)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.isascii()


def test_page_says_what_the_numbers_mean(page):
    assert "The 2:4 products ran as dense products on masked weights" in page
    assert "not complete, at step 230 of 400" in page
    assert "sparse-pretrain train recipe=fst" in page
    assert "f6ab6f3ceb31" in page


def test_gpu_page_makes_no_excuse(make_run, tmp_path):
    folders = [make_run("dense", device="NVIDIA H100"), make_run("ste", device="NVIDIA H100")]
    report.make_report(folders, tmp_path / "report.html")
    assert "ran as dense products" not in (tmp_path / "report.html").read_text()


def test_same_runs_give_the_same_bytes(make_run, tmp_path):
    folders = [make_run("dense"), make_run("fst")]
    texts = [report.make_report(folders, tmp_path / name) for name in ("a.html", "b.html")]
    assert texts[0] == texts[1]
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*.html*")) == ["a.html", "b.html"]


@pytest.mark.parametrize(("recipe", "until"), [("dense", 10), ("fst", 10), ("ste", 60)])
def test_page_of_a_run_just_begun(make_run, tmp_path, recipe, until):
    folder = make_run(recipe, until=until)
    assert f"at step {until} of 400" in report.make_report([folder], tmp_path / "report.html")


def test_colours_tell_runs_apart_and_hold_over_figures(make_run):
    found = [read_run(make_run("dense"))] + [read_run(make_run("ste", seed=seed)) for seed in range(1, 9)]
    styles = figures.run_styles(found, labels(found))
    assert styles[0].colour == "#000000"
    assert len({(style.colour, style.line) for style in styles}) == len(styles)
    loss, sparsity = figures.loss_figure(found, styles), figures.sparsity_figure(found, styles)
    assert all(style.colour.lower() in loss and style.colour.lower() in sparsity for style in styles)


def test_initial_drop_is_not_shown(make_run):
    low, high = figures._loss_range([read_run(make_run("dense", 4.0))])
    assert 3.8 < low < 4.0
    assert 5.5 < high < 6.6


def test_command_takes_every_run_of_a_folder(make_run, tmp_path, capsys):
    make_run("dense"), make_run("ste")
    (make_run("fst") / "metrics.csv").unlink()
    report.run(ReportConfig(runs_dir=str(tmp_path / "runs")))
    printed = capsys.readouterr()
    assert "ste" in printed.out
    assert f"Report: {tmp_path / 'runs' / 'report.html'}" in printed.out
    assert "left out gpt_nano-fst-00000001" in printed.err
    assert (tmp_path / "runs" / "report.html").is_file()


def test_command_with_one_run_writes_into_its_folder(make_run, tmp_path, capsys):
    folder = make_run("dense")
    report.run(ReportConfig(runs=[str(folder), str(folder)]))
    assert (folder / "report.html").is_file()
    report.run(ReportConfig(runs=[str(folder)], out=str(tmp_path / "new" / "page.html")))
    assert (tmp_path / "new" / "page.html").is_file()


def test_bad_input_is_one_sentence(make_run, tmp_path):
    with pytest.raises(UserError, match="holds no run with metrics"):
        report.run(ReportConfig(runs_dir=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="a run folder"):
        report.run(ReportConfig(runs=[str(tmp_path)]))
    with pytest.raises(UserError, match="cannot be written"):
        report.run(ReportConfig(runs=[str(make_run("dense"))], out=str(tmp_path)))
