"""`sparse-pretrain generate`: prompts continued by a language model, or what an encoder-decoder makes of them."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from sparse_pretrain.config import GenerateConfig
from sparse_pretrain.config_data import PairsConfig
from sparse_pretrain.data.corpus import END_OF_TEXT
from sparse_pretrain.data.rows import lines
from sparse_pretrain.data.sources import find_files
from sparse_pretrain.data.special_tokens import end_of_text_id, frame_of, special_tokens
from sparse_pretrain.data.tokenizer import load_tokenizer
from sparse_pretrain.data.tokenizer_files import checkpoint_tokenizer
from sparse_pretrain.errors import UserError
from sparse_pretrain.hardware import pick_device, precision_dtype
from sparse_pretrain.models.generation import Step, beam_search, sample
from sparse_pretrain.models.gpt import GPT
from sparse_pretrain.models.huggingface import is_hugging_face
from sparse_pretrain.models.huggingface.folder import read_config_file
from sparse_pretrain.models.seq2seq import Seq2Seq
from sparse_pretrain.paths import cache_dir
from sparse_pretrain.sparsity.packed import choose_backends
from sparse_pretrain.sparsity.represent import represent, round_weights, weight_bytes
from sparse_pretrain.tasks.causal_lm import CausalLM
from sparse_pretrain.tasks.products import MEASUREMENTS
from sparse_pretrain.tasks.text_to_text import ConditionalLM, EncoderDecoder
from sparse_pretrain.tasks.trained import Trained, load_trained

TEMPERATURE = 0.8  # of a text's continuation, if none is given


def run(cfg: GenerateConfig) -> None:
    """Prints each prompt and its continuation, or what a model of pairs of texts makes of it, up to the end of the text
    or `max_new_tokens`; then, to stderr, how its weights are held and how fast it was.

    Raises:
        UserError: no such checkpoint, or one that writes no texts; no such prompts; `weights` that the checkpoint does
            not have; a backend that cannot serve them; or options that exclude each other.
    """
    device = pick_device(cfg.accelerator, "accelerator")
    dtype = precision_dtype(cfg.precision, device, "precision")
    if cfg.backend != "auto" and cfg.weights != "packed":
        raise UserError("backend", f"{cfg.backend} with weights={cfg.weights}", "weights=packed")
    if cfg.beams > 1 and cfg.temperature:
        raise UserError("temperature", f"{cfg.temperature} with beams={cfg.beams}", "0 or null: a search draws nothing")
    texts = [cfg.prompt] if cfg.prompts is None else read_prompts(cfg.prompts)
    trained = load_trained(cfg.checkpoint, device)
    form, model = Form.of(trained), trained.model
    del trained  # and with it the master weights, if they are packed
    backends: dict[str, str] = {}
    if cfg.weights == "packed":
        rows = min(cfg.batch_size, len(texts)) * cfg.beams
        cache = cache_dir() / MEASUREMENTS
        backends, measured = choose_backends(model, rows, dtype, device, cfg.backend, cache)
        if measured:
            print(measured, file=sys.stderr)
    held = represent(model, cfg.weights, dtype, backends)
    round_weights(model, dtype)
    clock = Clock(device)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with torch.no_grad(), autocast:
        written = write(model, form, [form.encode(text) for text in texts], cfg, device, clock)
    for i, (text, tokens) in enumerate(zip(texts, written, strict=True)):
        if i and form.continues:
            print(END_OF_TEXT)
        print(form.decode(text, tokens))
    bytes_held, bytes_dense = weight_bytes(model)
    beside = f" (dense: {bytes_dense / 1e6:,.2f} MB)" if cfg.weights == "packed" else ""
    print(f"weights  {held}; {bytes_held / 1e6:,.2f} MB{beside}", file=sys.stderr)
    print(clock.report(), file=sys.stderr)


def read_prompts(path: str) -> list[str]:
    """The lines of a file.

    Raises:
        UserError: naming `prompts`: it is not there, not UTF-8, or empty.
    """
    (file, *others) = find_files([path], "prompts")
    if others:
        raise UserError("prompts", f"{path}, which is {1 + len(others)} files", "one file, with a prompt a line")
    found = [line.rstrip("\r\n") for line in lines(file, "prompts")]
    if not found:
        raise UserError("prompts", f"{path}, which is empty", "a file with a prompt a line")
    return found


@dataclass(frozen=True)
class Form:
    """How the texts of a checkpoint are framed by special tokens.

    before, after: a prompt. start: a target, where there is an encoder. end: a text. fill: where there is no token.
    longest: tokens of a prompt that are used, without its frame; None = all.
    continues: whether the prompt and what is written are one text.
    encodes: whether the prompt is for an encoder.
    """

    tokenizer: Tokenizer
    before: list[int]
    after: list[int]
    start: int
    end: int
    fill: int
    longest: int | None
    continues: bool
    encodes: bool

    @classmethod
    def of(cls, trained: Trained) -> Form:
        """As in the checkpoint's training.

        Raises:
            UserError: it writes no texts.
        """
        if not isinstance(trained.task, CausalLM | ConditionalLM | EncoderDecoder):
            found = f"{trained.checkpoint}, a model of {trained.cfg.data.task} that writes no texts"
            raise UserError("checkpoint", found, "a language model, or one of data.task=text_to_text")
        tokenizer = load_tokenizer(
            checkpoint_tokenizer(trained.tokenizer_path, trained.checkpoint), str(trained.tokenizer_path)
        )
        special, end = special_tokens(tokenizer), end_of_text_id(tokenizer)
        before, after = frame_of(tokenizer)
        data, published = trained.cfg.data, is_hugging_face(trained.checkpoint)
        if not isinstance(data, PairsConfig):
            # In training a document begins after the end of the one before it. A published model knows its own frame,
            # and an empty prompt needs some token.
            return cls(tokenizer, before if published else [end], [], end, end, end, None, True, False)
        start = special.fill if special.start is None else special.start
        if not isinstance(trained.task, EncoderDecoder):
            return cls(tokenizer, [], [start], start, end, end, data.max_source_len - 1, False, False)
        if published:
            given = read_config_file(trained.checkpoint, "checkpoint").values.get("decoder_start_token_id")
            start = start if given is None else given
        longest = data.max_source_len - len(before) - len(after)
        return cls(tokenizer, before, after, start, end, special.fill, longest, False, True)

    def encode(self, prompt: str) -> list[int]:
        tokens = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        return [*self.before, *tokens[: self.longest], *self.after] or [self.end]

    def decode(self, prompt: str, written: list[int]) -> str:
        """The text to show; one line where the prompt was a line and this is another text."""
        if self.continues:
            return self.tokenizer.decode([*self.tokenizer.encode(prompt, add_special_tokens=False).ids, *written])
        return " ".join(self.tokenizer.decode(written).split())


class Clock:
    """Times the prefill, which ends with the first token of each text, and the decoding of those after it.

    Args:
        device: which is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.prefill_tokens = self.decode_tokens = 0
        self.prefill_s = self.decode_s = 0.0
        self._begin = 0.0

    def start(self) -> None:
        self._begin = self._now()

    def prefilled(self, tokens: int) -> None:
        now = self._now()
        self.prefill_tokens += tokens
        self.prefill_s += now - self._begin
        self._begin = now

    def decoded(self, tokens: int) -> None:
        self.decode_tokens += tokens
        self.decode_s += self._now() - self._begin

    def report(self) -> str:
        lines = []
        for name, tokens, seconds in (
            ("prefill", self.prefill_tokens, self.prefill_s),
            ("decode", self.decode_tokens, self.decode_s),
        ):
            rate = f": {tokens / seconds:,.0f} tokens/s" if tokens else ""
            lines.append(f"{name:8} {tokens:,} tokens in {seconds:.3f} s{rate}")
        return "\n".join(lines)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def write(
    model: nn.Module,
    form: Form,
    prompts: Sequence[list[int]],
    cfg: GenerateConfig,
    device: torch.device,
    clock: Clock,
) -> list[list[int]]:
    """The new tokens of each prompt, without the end token, at most `max_new_tokens`."""
    generator = torch.Generator(device).manual_seed(cfg.seed)
    written: list[list[int]] = [[] for _ in prompts]
    same_length = cfg.beams > 1 and not form.encodes  # the search knows no padding
    for rows in batches([len(prompt) for prompt in prompts], cfg.batch_size, same_length):
        tokens, lengths = padded([prompts[row] for row in rows], form.fill, device)
        clock.start()
        if form.encodes:
            mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
            new_tokens = min(cfg.max_new_tokens, _positions(model) or cfg.max_new_tokens)
            step = _timed(_decoder_step(model, tokens, mask, new_tokens, cfg.beams), tokens.numel(), clock)
            tokens = torch.full_like(tokens[:, :1], form.start)
            lengths = torch.ones_like(lengths)
        else:
            new_tokens = cfg.max_new_tokens
            prefilled = len(rows) * int(lengths.min())
            step = _timed(_step(model, tokens.shape[1] + new_tokens), prefilled, clock)
        if cfg.beams > 1:
            found = beam_search(step, tokens, cfg.beams, new_tokens, form.end, cfg.length_penalty)
        else:
            temperature = (TEMPERATURE if form.continues else 0.0) if cfg.temperature is None else cfg.temperature
            found = sample(step, tokens, new_tokens, temperature, cfg.top_k, generator, form.end, lengths)
        for row, length, result in zip(rows, lengths.tolist(), found.tolist(), strict=True):
            written[row] = list(itertools.takewhile(lambda token: token != form.end, result[length:][:new_tokens]))
        ended = sum(len(written[row]) < new_tokens for row in rows)  # by an end token, which was written too
        clock.decoded(sum(len(written[row]) for row in rows) + ended - len(rows))
    return written


def batches(lengths: list[int], size: int, same_length: bool) -> Iterator[list[int]]:
    """Indices of prompts that go together, at most `size`: short ones first, so that there is little padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups = itertools.groupby(order, key=lambda i: lengths[i] if same_length else 0)
    for _, group in groups:
        while batch := list(itertools.islice(group, size)):
            yield batch


def padded(prompts: list[list[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(prompts, longest) int64, filled up on the right, and how long each is, (prompts,) int64."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    tokens = torch.full((len(prompts), int(lengths.max())), fill, device=device)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt, device=device)
    return tokens, lengths


def _step(model: nn.Module, max_tokens: int) -> Step:
    """Of a decoder. Models of other libraries are given all tokens anew for each."""
    if isinstance(model, GPT):
        return model.step(max_tokens)
    return lambda tokens, _: model(tokens[:, -(_positions(model) or tokens.shape[1]) :])[:, -1]


def _decoder_step(model: nn.Module, source: Tensor, mask: Tensor, max_tokens: int, beams: int) -> Step:
    """Of an encoder-decoder; the same."""
    if isinstance(model, Seq2Seq):
        return model.step(source, mask, max_tokens, beams)
    source, mask = (tensor.repeat_interleave(beams, dim=0) for tensor in (source, mask))
    return lambda tokens, _: model(source, tokens, mask)[:, -1]


def _positions(model: nn.Module) -> int | None:
    """The most tokens that a model takes; null = any number."""
    positions: int | None = model.cfg.max_seq_len if isinstance(model, Seq2Seq) else getattr(model, "positions", None)
    return positions


def _timed(step: Step, tokens: int, clock: Clock) -> Step:
    """`step`, the first call of which ends a prefill of so many tokens."""
    first = True

    def timed(prompt: Tensor, rows: Tensor | None) -> Tensor:
        nonlocal first
        logits = step(prompt, rows)
        if first:
            first = False
            clock.prefilled(tokens)
        return logits

    return timed
