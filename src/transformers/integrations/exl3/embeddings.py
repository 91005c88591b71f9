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
"""Quantized embedding tables, whose rows are decoded when they are looked up, and heads that are tied to them."""

import torch
from torch import nn

from . import encoding, format, ops
from .modules import Exl3Module, whole, words


EMBEDDING_STRIP_ELEMENTS = 1 << 16  # of a table that are decoded at a time, all of whose intermediates a cache holds


class Exl3Embedding(Exl3Module):
    """
    A quantized embedding table, whose rows are decoded when they are looked up. It is no `nn.Embedding`: nothing else
    may be tied to its weight.

    An embedding often has a model's first float parameter, whose dtype upstream takes for the model's. Hence `signs` are of the
    model's dtype here, which every dtype has, and rows are as well. In checkpoints they are fp16.

    Args:
        tensors (`dict[str, torch.Tensor]`): `trellis` int16 `[vocab, G(1+16K)]` and `signs` fp16 `[G, 256]`.
        plain (`nn.Embedding`): The table that this one stands for.
    """

    casts = True  # the signs

    def __init__(self, tensors: dict[str, torch.Tensor], plain: nn.Embedding):
        super().__init__()
        self._stand_for(plain)
        self.num_embeddings, self.embedding_dim = plain.num_embeddings, plain.embedding_dim
        self.store(tensors | {"signs": tensors["signs"].to(self.plain_dtype)})
        # The one thing that upstream's subclasses of `nn.Embedding` add: Gemma's scale.
        scale = getattr(plain, "scalar_embed_scale", None)
        self.embed_scale = float(plain.embed_scale) if scale is None and hasattr(plain, "embed_scale") else scale

    def empty_plain(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
        plain = super().empty_plain(dtype, device)
        if "embed_scale" in plain._buffers:  # on the meta device still, as the rest of the table is kept
            scale = torch.tensor(self.embed_scale, device=device or self.device)
            plain._buffers = {**plain._buffers, "embed_scale": scale}
        return plain

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self._rows(ids).to(self.signs.dtype)
        return rows if self.embed_scale is None else rows * torch.tensor(self.embed_scale).to(rows)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name != "weight":
                raise
            raise AttributeError(
                "The embeddings are quantized (Exl3Embedding) and have no `weight` to be read, tied or resized. Make the model plain with "
                "`model.dequantize()` first."
            ) from error

    def to_plain_dtype(self):
        """Have the signs in the model's dtype, as they are to be once they are there."""
        if self.signs.dtype != self.plain_dtype:
            self.signs = nn.Parameter(self.signs.detach().to(self.plain_dtype), requires_grad=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}signs"] = destination[f"{prefix}signs"].half()

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(ids, words(self.trellis), self.signs, self.embedding_dim)

    def encoded(self, weight: torch.Tensor, seed: int, effort: str, progress=None) -> dict[str, torch.Tensor]:
        """What stores `weight` `[num_embeddings, embedding_dim]` here: tensors by name. Arguments as of `encoding.encode_embedding`."""
        bits = format.embedding_bits(self.trellis, self.signs)
        return dict(zip(("trellis", "signs"), encoding.encode_embedding(weight, bits, seed, effort, progress)))

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> "Exl3Embedding":
        """A table of the same sizes that holds `tensors`."""
        return Exl3Embedding(tensors, self.plain)

    def dequantized(self, leaf: str) -> torch.Tensor:
        """`weight`, fp32 `[num_embeddings, embedding_dim]`."""
        return self.decode_into(torch.empty(self.num_embeddings, self.embedding_dim, device=self.device))

    def decode_into(self, weight: torch.Tensor) -> torch.Tensor:
        """Write the whole table to `weight` `[num_embeddings, embedding_dim]`, of any floating dtype, and return that."""
        trellis, signs = whole(self.trellis).view(torch.int16), whole(self.signs)
        rows = max(EMBEDDING_STRIP_ELEMENTS // signs.numel(), 1)
        for start in range(0, self.num_embeddings, rows):
            stop = min(start + rows, self.num_embeddings)
            ids = torch.arange(start, stop, device=self.device)
            weight[start:stop] = ops.embedding(ids, trellis, signs, self.embedding_dim)
        return weight

    def plain_views(self, name, tensor):
        yield "", name, tensor

    def extra_repr(self) -> str:
        bits = format.embedding_bits(self.trellis, self.signs)
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, bits={bits}"


class Exl3TiedHead(Exl3Module, nn.Linear):
    """
    A head that is tied to a quantized embedding table: a plain layer, whose weight is not saved but decoded from the table.

    Args:
        plain (`nn.Linear`): The head, without a bias.
    """

    casts = True  # the weight, like that of other plain layers

    def __init__(self, plain: nn.Linear):
        nn.Module.__init__(self)
        self._stand_for(plain)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.register_parameter("bias", None)
        weight = torch.empty(plain.weight.shape, dtype=self.plain_dtype, device="meta")
        self.register_buffer("weight", weight, persistent=False)

    def decode(self, table: nn.Module):
        """Take the weight from the quantized `table`, once its tensors are there, and when `load_state_dict` gives it others."""
        if not isinstance(table, Exl3Embedding):
            raise ValueError(
                "The head is tied to quantized embeddings, and the checkpoint lacks these: leave `embedding_bits` unset."
            )
        if table.trellis.is_meta:
            raise ValueError(
                "The head is tied to quantized embeddings, which are offloaded to disk: keep them in memory (`device_map`), or "
                "quantize the model with `head_bits`."
            )
        self._decode_again(table)
        table.register_load_state_dict_post_hook(self._decode_again)  # a bound method: copies have one of their own

    def _decode_again(self, table: Exl3Embedding, keys=None):
        table.decode_into(self.weight)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def dequantized(self, leaf: str) -> torch.Tensor:
        """`weight` `[out_features, in_features]`, as it is."""
        return self.weight

    def plain_views(self, name, tensor):
        yield "", name, tensor
