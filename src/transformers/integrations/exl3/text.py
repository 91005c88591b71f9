# Copyright 2026 The HuggingFace Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The tokens that a model is calibrated with: of texts, as they are given, or of text that the model writes itself."""

from collections.abc import Callable

import torch
from torch import nn

from ...generation import BaseStreamer, GenerationConfig
from ...utils import logging


def windows_of(model: nn.Module, config) -> torch.Tensor:
    """
    The data that `config` tells, in windows of one length.

    Args:
        model (`PreTrainedModel`): With float weights.
        config (`Exl3Config`): Tells `dataset`, `tokenizer`, `calibration_rows`, `calibration_length` and `calibration_seed`.

    Returns:
        `torch.Tensor`: int64 `[windows, length]` on the CPU. At most as many and as long as asked for, and as the model can read.

    Raises:
        `ValueError`: Where the model reads no text, `dataset` is too short or not of its vocabulary, or the model cannot write.
    """
    if model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} takes `{model.main_input_name}`, not text: quantize it without `dataset`."
        )
    text = model.config.get_text_config()
    length = min(config.calibration_length, _longest(model) or config.calibration_length)
    if config.dataset == "self":
        return _written(model, config.calibration_rows, length, config.calibration_seed)
    if isinstance(config.dataset[0], str):
        before, ids, after = tokenized(config.tokenizer or model.config.name_or_path, config.dataset)
        step = min(length - len(before) - len(after), len(ids))
        rows = [[*before, *piece, *after] for piece in _pieces(ids, step)]
    else:
        step = min(length, max(map(len, config.dataset)))
        rows = [piece for ids in config.dataset for piece in _pieces(ids, step)]
        rows += _pieces([token for ids in config.dataset if len(ids) < step for token in ids], step)
    if not rows:
        raise ValueError(
            "`dataset` of Exl3Config has no tokens, or `calibration_length` no room for them: pass more of either."
        )
    windows = torch.tensor(rows[: config.calibration_rows])
    if windows.min() < 0 or windows.max() >= text.vocab_size:
        raise ValueError(
            f"`dataset` of Exl3Config has tokens from {windows.min()} to {windows.max()}, and {type(model).__name__} has "
            f"{text.vocab_size}: pass the `tokenizer` of this model."
        )
    return windows


def _longest(model: nn.Module) -> int | None:
    """How many tokens `model` can read at once, None where that has no end."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Where positions are counted from the padding token's id on (RoBERTa), the table has fewer than it has rows.
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    first = [m.padding_idx + 1 for m in tables if m.num_embeddings == limit and m.padding_idx is not None]
    return limit - max(first, default=0) if limit and limit > 0 else None  # XLNet has -1


def _pieces(ids: list[int], length: int) -> list[list[int]]:
    """`ids` cut into pieces of `length`, without what is left over."""
    return [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)] if length > 0 else []


def load_tokenizer(tokenizer) -> Callable:
    """`tokenizer` itself, or the one of that name or folder."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not isinstance(tokenizer, str):
        if not callable(tokenizer):
            raise TypeError(f"`tokenizer` of Exl3Config has to be a tokenizer, or the name of one, got {tokenizer!r}")
        return tokenizer
    from ...models.auto import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:
        raise ValueError(
            f"`dataset` of Exl3Config is text, and there is no tokenizer at {tokenizer!r}: pass one as `tokenizer`, or token ids as `dataset`."
        ) from error


def tokenized(tokenizer, texts: list[str]) -> tuple[list[int], list[int], list[int]]:
    """What a window begins with, the tokens of all texts in a row, and what a window ends with. A tokenizer may be given by name."""
    encoded = load_tokenizer(tokenizer)(texts, return_special_tokens_mask=True)
    before, tokens, after = [], [], []
    for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"]):
        start = next((place for place, is_special in enumerate(mask) if not is_special), len(mask))
        stop = next((place for place in range(len(mask), start, -1) if not mask[place - 1]), start)
        if start < stop:
            before, after = ids[:start], ids[stop:]
        tokens += ids[start:stop]
    return before, tokens, after


class _Bar(BaseStreamer):
    """Shows how far the text is."""

    def __init__(self, rows: int, length: int):
        self._bar = logging.tqdm(
            total=rows * length, desc="Writing text to calibrate with", unit=" tokens", unit_scale=True
        )

    def put(self, value):
        self._bar.update(value.numel())

    def end(self):
        self._bar.close()


@torch.no_grad()
def _written(model: nn.Module, rows: int, length: int, seed: int) -> torch.Tensor:
    """Text that `model` samples from the beginning-of-text token on, at temperature 1 out of all of its vocabulary."""
    config = model.config.get_text_config()
    defaults = getattr(model, "generation_config", None)
    start = next(
        (
            token
            for name in ("bos_token_id", "eos_token_id")
            for holder in (defaults, config)
            if isinstance(token := getattr(holder, name, None), int)
        ),
        None,
    )
    if not model.can_generate() or model.config.is_encoder_decoder or start is None:
        raise ValueError(
            f"{type(model).__name__} cannot write text to be calibrated with, or has no beginning-of-text token: pass texts as `dataset`."
        )
    # What is no text: the end, padding, and the places of images and sounds.
    special = {
        token
        for part in (model.config.to_dict(), config.to_dict(), defaults.to_dict())
        for name, value in part.items()
        if name.endswith(("token_id", "token_index"))
        for token in (value if isinstance(value, list) else [value])
        if isinstance(token, int)
    }
    sampling = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=length - 1,
        max_new_tokens=length - 1,
        suppress_tokens=sorted(special),
        use_cache=True,
    )
    device = model.device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        first = torch.full((rows, 1), start, device=device)
        bar = _Bar(rows, length)
        model.generation_config = GenerationConfig()  # `generate` takes from it what `sampling` leaves unset
        try:
            return model.generate(
                first, attention_mask=torch.ones_like(first), generation_config=sampling, streamer=bar
            ).cpu()
        finally:
            model.generation_config = defaults
