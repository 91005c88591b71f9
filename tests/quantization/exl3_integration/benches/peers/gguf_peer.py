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
The quantization kinds of GGUF: pure ones, without an importance matrix, made by libgguf and run by llama.cpp, which pip builds for the
processor that it is installed on.
"""

import ctypes
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import gguf
import libgguf
import llama_cpp
import numpy as np
import torch

from transformers import LlamaForCausalLM, PreTrainedConfig


KINDS = ("Q2_K", "Q3_K", "IQ3_S", "Q4_0", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
SEQUENCES = 8  # that the cache has room for


def writer_of(file: Path, architecture: str, config: PreTrainedConfig) -> gguf.GGUFWriter:
    """A writer of `file` that has been told what all architectures have in common; there is no tokenizer."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    return writer


class Opened:
    """
    A GGUF file of a model with this config, in llama.cpp with as many threads as PyTorch. It takes the calls that benchmarks make to a
    model.
    """

    def __init__(self, file: Path, config: PreTrainedConfig, window: int, sequences: int = 1):
        self.config = config
        llama_cpp.llama_log_set(_silent, None)
        self._model = llama_cpp.llama_model_load_from_file(bytes(file), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not open {file}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = window * sequences, sequences
        options.n_batch = options.n_ubatch = window
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {sequences} texts of {window} tokens beside {file}")

    def eval(self):
        return self

    def _decode(self, ids: torch.Tensor, start: int, all_positions: bool) -> torch.Tensor:
        """Logits `[sequences, positions, vocabulary]` of `ids` `[sequences, positions]` at `start` and after."""
        sequences, positions = ids.shape
        batch = llama_cpp.llama_batch_init(ids.numel(), 0, 1)
        batch.n_tokens = ids.numel()
        wanted = []
        for index in range(ids.numel()):
            sequence, position = divmod(index, positions)
            batch.token[index] = int(ids[sequence, position])
            batch.pos[index] = start + position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = all_positions or position == positions - 1
            if batch.logits[index]:
                wanted.append(index)
        code = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode: {code}")
        vocabulary = self.config.vocab_size
        logits = llama_cpp.llama_get_logits(self._context)
        values = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (len(wanted), vocabulary))
        return torch.from_numpy(values.copy()).view(sequences, -1, vocabulary)

    def __call__(self, ids: torch.Tensor, logits_to_keep: int = 0, **_):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        return SimpleNamespace(logits=self._decode(ids, 0, all_positions=logits_to_keep == 0))

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **_) -> torch.Tensor:
        """`max_new_tokens` tokens more for each text of `ids` `[texts, tokens]`, the most likely ones."""
        logits = self(ids, logits_to_keep=1).logits
        for _ in range(max_new_tokens - 1):
            ids = torch.cat([ids, logits.argmax(-1)], 1)
            logits = self._decode(ids[:, -1:], ids.shape[1] - 1, all_positions=False)
        return torch.cat([ids, logits.argmax(-1)], 1)


class LlamaCpp(Opened):
    """A Llama of Transformers, its linear layers `names` rounded to `kind`, in llama.cpp. Rows are of `256 n` weights."""

    def __init__(self, model: LlamaForCausalLM, names: list[str], kind: str, window: int):
        self.config, self.kind = model.config, libgguf.GGMLQuantizationType[kind]
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name, "model.gguf")
        self._write(model, {f"{name}.weight" for name in names})
        start = time.perf_counter()
        super().__init__(self._file, model.config, window, SEQUENCES)
        self.facts = {"load_s": time.perf_counter() - start, "disk_mb": self._file.stat().st_size / 1e6}
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        self.facts["bits"] = 8 * size / weights

    def _names(self):
        return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, self.config.num_hidden_layers)

    def _heads(self, name: str) -> int | None:
        """The number of heads whose rows llama.cpp wants in another order: pairs that rotate together are neighbours there."""
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return heads.get(name.split(".")[-2])

    def _write(self, model, quantized: set[str]):
        config = self.config
        writer = writer_of(self._file, "llama", config)
        writer.add_rope_dimension_count(config.head_dim)
        names = self._names()
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = tensor.float().numpy()
            if heads := self._heads(name):
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            kind = (
                self.kind if name in quantized else libgguf.GGMLQuantizationType["BF16" if values.ndim > 1 else "F32"]
            )
            rows = libgguf.quantize_rows(np.ascontiguousarray(values), kind)
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)),
                rows if values.ndim > 1 else values,
                raw_dtype=gguf.GGMLQuantizationType[kind.name],
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def get_submodule(self, name: str) -> torch.nn.Linear:
        """A linear layer with the weight that the file holds, in bfloat16."""
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(self._file).tensors}
        tensor = found[self._names().get_name(f"{name}.weight", try_suffixes=(".weight",))]
        values = libgguf.dequantize_rows(np.ascontiguousarray(tensor.data), self.kind)
        if heads := self._heads(f"{name}.weight"):
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        layer = torch.nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(torch.from_numpy(np.ascontiguousarray(values)))
        return layer


@llama_cpp.llama_log_callback
def _silent(*_):
    pass
