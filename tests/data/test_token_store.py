"""The packed token store: what is in it, and that nothing that happens while it is built can spoil it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from toy_corpora import REPO, write_corpus

from sparse_pretrain.data import files, token_store
from sparse_pretrain.data.sources import open_corpus
from sparse_pretrain.data.token_store import TokenStore, prepare
from sparse_pretrain.errors import UserError

BUILD = """
import sys, time
from sparse_pretrain.config_data import TextConfig
from sparse_pretrain.data import token_store
token_store.SHARD_CHARACTERS = 4000
encode, pause = token_store._encode, float(sys.argv[2])
def slow(*args):
    time.sleep(pause)
    return encode(*args)
token_store._encode = slow
cfg = TextConfig(name="toy", source="text", train=[sys.argv[1]], vocab_size=400, seq_len=16)
print(token_store.prepare(cfg).digest)
"""


def start_build(corpus_file, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", BUILD, str(corpus_file), str(pause)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def count_encodes(monkeypatch) -> list[int]:
    calls: list[int] = []
    encode = token_store._encode
    monkeypatch.setattr(token_store, "_encode", lambda *args: calls.append(1) or encode(*args))
    return calls


def test_a_store_holds_what_direct_encoding_gives(make_config):
    cfg = make_config()
    store = prepare(cfg)
    tokenizer = token_store.load_tokenizer(store.tokenizer_path.read_bytes(), "test")
    for split in ("train", "validation"):
        documents = list(open_corpus(cfg).documents(split))
        expected = [i for text in documents for i in [*tokenizer.encode(text).ids, store.eot_id]]
        tokens = store.split(split)
        assert isinstance(tokens, np.memmap)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == expected
        assert store.num_tokens(split) == len(expected)
        assert store.num_documents(split) == len(documents)
    assert store.vocab_size == 400
    store.verify()
    assert sorted(contents(store.folder)) == [
        "manifest.json",
        "tokenizer.json",
        "train.bin",
        "validation.bin",
    ]


def test_shards_do_not_show_in_the_result(make_config, monkeypatch, tmp_path):
    whole = contents(prepare(make_config()).folder)
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(token_store, "SHARD_CHARACTERS", 3000)
    calls = count_encodes(monkeypatch)
    assert contents(prepare(make_config()).folder) == whole
    assert len(calls) > 10


def test_a_large_vocabulary_takes_uint32(make_config, tmp_path):
    prepare(make_config())  # trains a tokenizer to enlarge
    (trained,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    enlarged = json.loads(trained.read_text())
    enlarged["model"]["vocab"].update({f"unused{i}": i for i in range(400, 70_000)})
    path = tmp_path / "large.json"
    path.write_text(json.dumps(enlarged))
    store = prepare(make_config(tokenizer=str(path)))
    assert store.dtype == np.uint32
    assert store.vocab_size == 70_000
    assert store.split("train").tolist() == prepare(make_config()).split("train").tolist()


def test_a_second_time_nothing_is_built(make_config, monkeypatch):
    store = prepare(make_config())
    monkeypatch.setattr(token_store, "_build", lambda *args: pytest.fail("built again"))
    assert prepare(make_config(seq_len=32, num_workers=4)) == store


def test_killed_builds_go_on_and_end_in_the_same_bytes(corpus_file, make_config, cache, monkeypatch, tmp_path):
    build = start_build(corpus_file, pause=0.05)
    deadline = time.monotonic() + 60
    while len(finished := list(cache.glob("tokens/*/shards/*.bin"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    assert build.returncode == -signal.SIGKILL
    finished = list(cache.glob("tokens/*/shards/*.bin"))
    assert len(finished) >= 5
    assert not list(cache.glob("tokens/*/manifest.json"))
    inode = finished[0].stat().st_ino, finished[0].stat().st_mtime_ns

    monkeypatch.setattr(token_store, "SHARD_CHARACTERS", 4000)
    calls = count_encodes(monkeypatch)
    joined = token_store._joined
    seen = {}

    def look(shards, digest):
        seen.update({shard: (shard.stat().st_ino, shard.stat().st_mtime_ns) for shard in shards})
        return joined(shards, digest)

    monkeypatch.setattr(token_store, "_joined", look)
    resumed = prepare(make_config())
    assert len(calls) == len(seen) - len(finished)
    assert seen[finished[0]] == inode

    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path / "uninterrupted"))
    assert contents(prepare(make_config()).folder) == contents(resumed.folder)


def test_two_processes_build_once(corpus_file, cache):
    builds = [start_build(corpus_file, pause=0.02) for _ in range(2)]
    outputs = [build.communicate(timeout=60) for build in builds]
    assert [build.returncode for build in builds] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("tokenizing" in errors for _, errors in outputs) == 1
    (folder,) = (path for path in cache.glob("tokens/*") if path.is_dir())
    TokenStore.open(folder).verify()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "train.bin", 10),
        lambda folder: (folder / "validation.bin").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text('{"format": 1}'),
        lambda folder: (folder / "manifest.json").write_text('{"format": 99}'),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    ],
)
def test_a_damaged_store_is_noticed_and_rebuilt(make_config, damage, capsys):
    store = prepare(make_config())
    before = contents(store.folder)
    damage(store.folder)
    with pytest.raises(UserError, match=r"token store .* Delete the folder"):
        TokenStore.open(store.folder)
    rebuilt = prepare(make_config())
    assert contents(rebuilt.folder) == before
    assert capsys.readouterr().err.count("is damaged, building it anew") == 1


def test_verify_finds_a_changed_token(make_config):
    store = prepare(make_config())
    with open(store.folder / "train.bin", "r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    TokenStore.open(store.folder)
    with pytest.raises(UserError, match=r"train\.bin"):
        store.verify()


def test_too_long_sequences(make_config):
    longest = prepare(make_config()).num_tokens("validation") - 1
    prepare(make_config(seq_len=longest))
    with pytest.raises(UserError, match=rf"data\.seq_len.*validation has {longest + 1} tokens.*at most {longest} "):
        prepare(make_config(seq_len=longest + 1))


def test_tiny_and_empty_corpora(make_config, tmp_path):
    tiny = write_corpus(tmp_path / "tiny.txt", range(1), words=1)
    with pytest.raises(UserError, match=r"data\.seq_len"):
        prepare(make_config(train=[str(tiny)], seq_len=1000))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="without documents"):
        prepare(make_config(train=[str(tmp_path / "empty.txt")]))


def test_a_cache_that_cannot_be_written_is_named(make_config, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"SPARSE_PRETRAIN_CACHE.*file/cache.*Not a directory"):
        prepare(make_config())


def test_a_full_disk_is_named_and_leaves_no_half_files(make_config, monkeypatch, cache):
    store = prepare(make_config())
    before = contents(store.folder)
    (store.folder / "manifest.json").unlink()
    real_open = open

    def full(path, mode="r", *args, **options):
        file = real_open(path, mode, *args, **options)
        if str(path).endswith(".tmp"):
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(UserError, match=r"SPARSE_PRETRAIN_CACHE.*No space left on device"):
        prepare(make_config())
    assert not list(cache.rglob("*.tmp"))
    monkeypatch.undo()
    monkeypatch.setenv("SPARSE_PRETRAIN_CACHE", str(cache))
    assert contents(prepare(make_config()).folder) == before
