"""Rows of an example store to the batch of a task: tensors of fixed shapes, examples first, -100 = nothing to learn."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparse_pretrain.data.corpus import Split
from sparse_pretrain.data.example_store import Columns, ExampleStore, Ragged
from sparse_pretrain.data.masking import NO_TARGET
from sparse_pretrain.data.random_numbers import uniform

Batch = dict[str, Tensor]
FLIP, CROP = 16, 17  # purposes of random numbers, beside those of masking


class Collate(Protocol):
    """Makes the batch of some rows of a split. `step` is None in validation: then nothing is random."""

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch: ...


def padded(column: Ragged, rows: np.ndarray, length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries of a column, cut or filled up to `length`: (rows, length, …) int64, and how long each is: (rows,)."""
    lengths = np.minimum(column.offsets[rows + 1] - column.offsets[rows], length)
    values = np.full((len(rows), length, *column.values.shape[1:]), fill, np.int64)
    for i, row in enumerate(rows):
        values[i, : lengths[i]] = column[row][: lengths[i]]
    return values, lengths


def tensors(**arrays: np.ndarray) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class SentenceBatches:
    """tokens (B, L), mask (B, L) bool, token_types (B, L), labels (B,): int64, or float32 scores."""

    def __init__(self, store: ExampleStore, split: Split, seq_len: int) -> None:
        self.columns, self.seq_len, self.fill = Columns(store, split), seq_len, store.manifest["fill"]

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch:
        tokens, lengths = padded(self.columns["tokens"], rows, self.seq_len, self.fill)
        types, _ = padded(self.columns["token_types"], rows, self.seq_len, 0)
        mask = np.arange(self.seq_len) < lengths[:, None]
        labels = self.columns["label"][rows]
        labels = labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)
        return tensors(tokens=tokens, mask=mask, token_types=types, labels=labels)


class QuestionBatches:
    """tokens (B, L), mask (B, L) bool, token_types (B, L), start (B,), end (B,): the tokens between which the answer
    is, 0 where it is not in this window; index (B,): which window of the split each row is."""

    def __init__(self, store: ExampleStore, split: Split, seq_len: int) -> None:
        self.columns, self.seq_len, self.fill = Columns(store, split), seq_len, store.manifest["fill"]

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch:
        tokens, lengths = padded(self.columns["tokens"], rows, self.seq_len, self.fill)
        types, _ = padded(self.columns["token_types"], rows, self.seq_len, 0)
        mask = np.arange(self.seq_len) < lengths[:, None]
        start, end = (self.columns[name][rows].astype(np.int64) for name in ("start", "end"))
        return tensors(tokens=tokens, mask=mask, token_types=types, start=start, end=end, index=rows.astype(np.int64))


class Seq2SeqBatches:
    """For an encoder-decoder: source (B, S), source_mask (B, S) bool, target (B, T + 1): start id, text, end id, fill;
    labels (B, T): what follows each token of the target, -100 on the fill."""

    def __init__(self, store: ExampleStore, split: Split, max_source_len: int, max_target_len: int) -> None:
        self.columns, self.source_len, self.target_len = Columns(store, split), max_source_len, max_target_len
        facts = store.manifest
        self.before, self.after, self.fill = facts["source_before"], facts["source_after"], facts["fill"]
        self.start, self.end = facts["target_start"], facts["target_end"]

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch:
        count, (before, after) = np.arange(len(rows)), (len(self.before), len(self.after))
        source = np.full((len(rows), self.source_len), self.fill)
        ids, lengths = padded(self.columns["source"], rows, self.source_len - before - after, self.fill)
        source[:, :before] = self.before
        source[:, before : self.source_len - after] = ids
        for i, token in enumerate(self.after):
            source[count, before + lengths + i] = token
        source_mask = np.arange(self.source_len) < (before + lengths + after)[:, None]
        target = np.full((len(rows), self.target_len + 1), self.fill)
        target[:, 0] = self.start
        target[:, 1:-1], lengths = padded(self.columns["target"], rows, self.target_len - 1, self.fill)
        target[count, lengths + 1] = self.end
        labels = np.where(np.arange(self.target_len) < (lengths + 1)[:, None], target[:, 1:], NO_TARGET)
        return tensors(source=source, source_mask=source_mask, target=target, labels=labels)


class ContinuationBatches:
    """For a decoder: tokens (B, L + 1): source, start id, target, end id, fill; labels (B, L): what follows each
    token, -100 on the source and on the fill. L = max_source_len + max_target_len - 1."""

    def __init__(self, store: ExampleStore, split: Split, max_source_len: int, max_target_len: int) -> None:
        self.columns, self.source_len, self.target_len = Columns(store, split), max_source_len, max_target_len
        facts = store.manifest
        self.start, self.end, self.fill = facts["target_start"], facts["target_end"], facts["fill"]

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch:
        length = self.source_len + self.target_len
        tokens = np.full((len(rows), length), self.fill)
        labels = np.full((len(rows), length - 1), NO_TARGET)
        for i, row in enumerate(rows):
            source = self.columns["source"][row][: self.source_len - 1]
            target = self.columns["target"][row][: self.target_len - 1]
            text = np.concatenate([source, [self.start], target, [self.end]])
            tokens[i, : len(text)] = text
            labels[i, len(source) : len(text) - 1] = text[len(source) + 1 :]
        return tensors(tokens=tokens, labels=labels)


class ImageBatches:
    """images (B, C, H, W) float32 with mean 0 and deviation 1 over the train split, labels (B,) int64.

    In training, by (seed, step, example): half of the images left to right if `flip`, and a window of the image's size
    anywhere in it with `crop_padding` black pixels around (as He et al. 2016, §4.2).
    """

    def __init__(self, store: ExampleStore, split: Split, seed: int, flip: bool, crop_padding: int) -> None:
        self.columns, self.seed, self.flip, self.padding = Columns(store, split), seed, flip, crop_padding
        mean, std = (np.array(store.manifest[name], np.float32)[:, None, None] for name in ("mean", "std"))
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, rows: np.ndarray, step: int | None) -> Batch:
        images = self.columns["image"][rows]
        if step is not None:
            images = self._augmented(images, rows, step)
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)
        pixels *= self.scale
        pixels += self.shift
        return tensors(images=pixels, labels=self.columns["label"][rows].astype(np.int64))

    def _augmented(self, images: np.ndarray, rows: np.ndarray, step: int) -> np.ndarray:
        count, height, width, _ = images.shape
        pad = self.padding
        down, right = np.zeros((count, 1), np.int64), np.zeros((count, 1), np.int64)
        if pad:
            images = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            offsets = (uniform(self.seed, step, rows, 2, CROP) * (2 * pad + 1)).astype(np.int64)
            down, right = offsets[:, :1], offsets[:, 1:]
        ys, xs = down + np.arange(height), right + np.arange(width)
        if self.flip:
            xs = np.where(uniform(self.seed, step, rows, 1, FLIP) < 0.5, xs[:, ::-1], xs)
        return images[np.arange(count)[:, None, None], ys[:, :, None], xs[:, None, :]]
