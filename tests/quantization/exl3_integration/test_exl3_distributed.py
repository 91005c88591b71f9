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
Tensor parallelism and FSDP2: two processes compute, differentiate, generate and save what one does.

This file is also what the processes run: `torchrun --nproc-per-node 2 test_exl3_distributed.py FOLDER...`.
"""

import json
import os
import subprocess
import sys
import tempfile
import unittest
from types import SimpleNamespace

import torch
from parameterized import parameterized
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from transformers import AutoModelForCausalLM, Exl3Config, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.testing_utils import require_accelerate, require_peft, require_torch
from transformers.utils import is_peft_available


if is_peft_available():
    from peft import LoraConfig, get_peft_model

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def results(model):
    """Logits, the gradient in the embeddings, and generated tokens."""
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"logits": logits, "gradient": embeddings.grad, "tokens": tokens}


def load(folder, **kwargs):
    """The checkpoint in `folder`, quantized on the fly where it is a float one."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        if "quantization_config" not in json.load(file):
            kwargs["quantization_config"] = Exl3Config(bits=2, head_bits=3)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


def work(folders):
    """What each process does, for every checkpoint: load its part, write the results and the checkpoint."""
    torch.set_num_threads(1)
    for folder in folders:
        model = load(folder, tp_plan="auto")
        found = results(model)
        held = {name: (getattr(p, "_local_tensor", p)).numel() for name, p in model.named_parameters()}
        out = os.path.join(folder, "out")
        model.save_pretrained(out)
        if torch.distributed.get_rank() == 0:
            torch.save(found | {"held": held}, os.path.join(out, "results.pt"))
        torch.distributed.barrier()
    if is_peft_available():
        torch.save(adapter_gradients(folders[0], shard=True), os.path.join(folders[0], "out", "gradients.pt"))
    torch.distributed.destroy_process_group()


def adapter_gradients(folder, shard):
    """The gradients of adapters on the checkpoint in `folder`; with FSDP2, each process has a part of all and of the batch."""
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(model, config)
    if shard:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}  # FSDP2 takes none
        for module in (*model.base_model.model.model.layers, model):
            fully_shard(module, mesh=mesh, ignored_params=scalars)
        assert all(isinstance(p, DTensor) for p in model.parameters() if p.dim())
        ids = ids.chunk(2)[torch.distributed.get_rank()]
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if shard else g for name, g in gradients.items()}


if __name__ == "__main__":
    work(sys.argv[1:])
    sys.exit()


from transformers.integrations.exl3.modules import Exl3Experts, Exl3Linear  # noqa: E402
from transformers.integrations.exl3.parallel import adapt_plan  # noqa: E402

from .synthetic import SyntheticCheckpoint, random_linear, read_tensors  # noqa: E402
from .tiny_models import tiny_model  # noqa: E402


def llama():
    """All layers cut, with biases on both sides, the head too."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=256, attention_bias=True))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.bias, std=0.1)
        torch.nn.init.normal_(layer.self_attn.v_proj.bias, std=0.1)
    checkpoint = SyntheticCheckpoint(model)
    checkpoint.quantize("model.layers.0.self_attn.q_proj", codebook="3inst", signs=("su", "sv"), scale=0.05)
    checkpoint.quantize("model.layers.0.self_attn.o_proj", bits=2.5)
    checkpoint.quantize_all("layers", bits=3)
    checkpoint.quantize("lm_head", bits=6)
    return checkpoint


def phi3():
    """Fused projections stay whole, what follows them is cut; the head of 100 tokens stays whole, too."""
    model = Phi3ForCausalLM(Phi3Config(**SIZES, vocab_size=100))
    checkpoint = SyntheticCheckpoint(model)
    for index in range(2):
        layer = f"model.layers.{index}"
        parts = {f"{layer}.self_attn.{name}_proj": 256 for name in "qkv"}
        checkpoint.quantize(f"{layer}.self_attn.qkv_proj", parts)
        parts = {f"{layer}.mlp.{name}_proj": 512 for name in ("gate", "up")}
        checkpoint.quantize(f"{layer}.mlp.gate_up_proj", parts)
    checkpoint.quantize_all("layers")
    checkpoint.quantize("lm_head")
    return checkpoint


def on_the_fly():
    """A float checkpoint, with biases on both sides."""
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=256, attention_bias=True))
    for name in "kvo":
        torch.nn.init.normal_(getattr(model.model.layers[0].self_attn, f"{name}_proj").bias, std=0.1)
    return SyntheticCheckpoint(model)


@require_torch
@require_accelerate
class Exl3DistributedTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)
        cls.folders = {}
        for make in (llama, phi3, on_the_fly):
            folder = tempfile.TemporaryDirectory()
            cls.addClassCleanup(folder.cleanup)
            checkpoint = make()
            is_float = make is on_the_fly
            checkpoint.save(folder.name, checkpoint.dense if is_float else checkpoint.tensors, quantized=not is_float)
            cls.folders[make.__name__] = folder.name
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        command += ["--rdzv-endpoint=localhost:0", __file__, *cls.folders.values()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise AssertionError(f"{done.stdout}\n{done.stderr}")

    @parameterized.expand(["llama", "phi3", "on_the_fly"])
    def test_two_processes_give_what_one_does(self, name):
        folder = self.folders[name]
        found = torch.load(os.path.join(folder, "out", "results.pt"))
        model = load(folder)
        expected = results(model)
        self.assertTrue(torch.equal(found["tokens"], expected["tokens"]))
        for key in ("logits", "gradient"):
            error = (found[key] - expected[key]).abs().max() / expected[key].abs().max()
            self.assertLess(float(error), 1e-5, key)
        if name != "phi3":  # nothing that is quantized is whole on a rank
            trellises = {key: parameter.numel() for key, parameter in model.named_parameters() if "trellis" in key}
            self.assertEqual({key: 2 * found["held"][key] for key in trellises}, trellises)

    @parameterized.expand(["llama", "phi3", "on_the_fly"])
    def test_two_processes_save_what_one_does(self, name):
        folder = self.folders[name]
        with tempfile.TemporaryDirectory() as one:
            load(folder).save_pretrained(one)
            saved, expected = read_tensors(os.path.join(folder, "out")), read_tensors(one)
            for file in ("config.json", "quantization_config.json"):
                contents = []
                for place in (one, os.path.join(folder, "out")):
                    with open(os.path.join(place, file), encoding="utf-8") as stream:
                        contents.append(json.load(stream))
                self.assertEqual(*contents)
        self.assertEqual(saved.keys(), expected.keys())
        for key, tensor in expected.items():
            self.assertEqual(saved[key].dtype, tensor.dtype, key)
            self.assertTrue(torch.equal(saved[key], tensor), key)

    @require_peft
    def test_adapters_under_fsdp_have_the_gradients_of_one_process(self):
        folder = self.folders["llama"]
        found = torch.load(os.path.join(folder, "out", "gradients.pt"))
        expected = adapter_gradients(folder, shard=False)
        self.assertEqual(found.keys(), expected.keys())
        for key, gradient in expected.items():
            self.assertLess(float((found[key] - gradient).abs().max() / gradient.abs().max()), 1e-5, key)


@require_torch
class Exl3ParallelPlanTest(unittest.TestCase):
    """What cannot be cut is an error, or stays whole where every rank needs all of it."""

    def model(self, **sizes):
        model = torch.nn.Module()
        for name, (into, out) in sizes.items():
            setattr(model, name, Exl3Linear(into, out, random_linear(out, into)[0]))
        return model

    @parameterized.expand(
        [
            ("colwise", (256, 384), "384 output features are no 2 parts of whole blocks of 128"),
            ("colwise", (256, 100), "100 output features"),
            ("rowwise", (192, 256), "192 input features are no 2 parts"),
            ("rowwise_split_input", (128, 256), "128 input features"),
            ("packed_colwise", (256, 256), "an Exl3Linear cannot be cut in the style `packed_colwise`"),
        ]
    )
    def test_sizes_that_cannot_be_cut(self, style, sizes, message):
        with self.assertRaisesRegex(ValueError, rf"up: .*{message}(.|\n)*2 ranks.*Use fewer ranks, or `device_map`"):
            adapt_plan(self.model(up=sizes, down=(256, 256)), {"up": style, "down": "rowwise"}, 2)

    def test_every_layer_that_cannot_be_cut_is_named(self):
        plan = {"up": "colwise", "gate": "colwise"}
        self.assertRaisesRegex(
            ValueError, r"up: .*\ngate: ", adapt_plan, self.model(up=(128, 128), gate=(128, 128)), plan, 2
        )

    def test_a_head_that_cannot_be_cut_stays_whole(self):
        plan = {"head": "colwise_gather_output", "up": "colwise_gather_output", "norm": "sequence_parallel"}
        adapt_plan(self.model(head=(256, 100), up=(256, 256)), plan, 2)
        self.assertEqual(plan, {"up": "exl3_colwise_gather_output", "norm": "sequence_parallel"})

    def test_experts(self):
        model, auto_class = tiny_model("mixtral")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = auto_class.from_pretrained(folder, quantization_config=Exl3Config(bits=1))
        plan = {"model.layers.*.mlp.experts": "moe_tp_experts"}
        with self.assertRaisesRegex(ValueError, "model.layers.0.mlp.experts: an Exl3Experts cannot be cut"):
            adapt_plan(model, plan, 2)
        self.assertEqual(sum(isinstance(module, Exl3Experts) for module in model.modules()), 1)

    @parameterized.expand(
        [
            ({"ep_size": 2}, {}, "cannot be distributed by `ep_size`"),
            ({"dp_size": 2, "tp_size": 2}, {}, "cannot be distributed by `dp_size`"),
            ({"tp_size": 2}, {"dequantize": True}, "`dequantize=True` and tensor parallelism do not go together"),
        ]
    )
    def test_other_ways(self, sizes, how, message):
        from transformers.quantizers.quantizer_exl3 import Exl3HfQuantizer

        config = Exl3Config(dequantize=how.get("dequantize", False))
        quantizer = Exl3HfQuantizer(config, pre_quantized=True)
        model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**sizes)))
        self.assertRaisesRegex(ValueError, message, quantizer.update_parallel_plan, model, {})
