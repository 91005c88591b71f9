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
"""Tensor, expert and data parallelism: two processes compute, differentiate, generate and save what one does."""

import json
import os
import re
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import torch
from parameterized import parameterized
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transformers import (
    AutoModelForCausalLM,
    Exl3Config,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from transformers.integrations.exl3 import separate_experts
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module
from transformers.integrations.exl3.parallel import adapt_expert_plan, adapt_tensor_plan
from transformers.integrations.exl3.quantizing import dequantize_modules
from transformers.quantizers.quantizer_exl3 import Exl3HfQuantizer
from transformers.testing_utils import get_torch_dist_unique_port, require_accelerate, require_peft, require_torch
from transformers.utils import is_peft_available

from .processes import copies
from .synthetic import SyntheticCheckpoint, random_linear, read_tensors, stacked
from .tiny_models import quick_config, tiny_inputs, tiny_model


if is_peft_available():
    from peft import LoraConfig, get_peft_model

DOCS = Path(__file__).resolve().parents[3] / "docs" / "source" / "en" / "quantization" / "exl3.md"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def results(model):
    """Logits, the gradient in the embeddings, and generated tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 6), generator=generator)
    embeddings = torch.randn(2, 6, SIZES["hidden_size"], generator=generator).requires_grad_()
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    return {"logits": logits, "gradient": embeddings.grad, "tokens": tokens}


def load(folder, dequantize=False, **kwargs):
    """The checkpoint in `folder`, quantized on the fly where it is a float one."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        if "quantization_config" not in json.load(file):
            tables = {"embedding_bits": 1} if "tied" in folder else {"head_bits": 2, "embedding_bits": 1}
            kwargs["quantization_config"] = Exl3Config(bits=1, effort="fast", **tables)
    if dequantize:
        kwargs["quantization_config"] = Exl3Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


# How two processes can share a model.
WAYS = {
    "tensor_parallel": {"distributed_config": {"tp_size": 2}},
    "expert_parallel": {"distributed_config": {"tp_size": 2, "ep_size": 2}},
    "fsdp": {"distributed_config": {"fsdp_size": 2}},
    "dequantized_tensor_parallel": {"distributed_config": {"tp_size": 2}, "dequantize": True},
    "dequantized_expert_parallel": {"distributed_config": {"tp_size": 2, "ep_size": 2}, "dequantize": True},
    "dequantized_fsdp": {"distributed_config": {"fsdp_size": 2}, "dequantize": True},
}


REFUSES_ADAPTERS = {
    ("llama", "tensor_parallel"): ["q_proj"],
    ("llama", "fsdp"): ["q_proj"],
    ("qwen3_moe", "tensor_parallel"): ["expert_up"],
    ("qwen3_moe", "expert_parallel"): ["expert_up"],
}


def work(rank, port, folder, tasks):
    """What each process does, for every checkpoint and way: load its part, write the results and the checkpoint."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    ranks |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}  # as torchrun sets them
    os.environ |= {name: str(value) for name, value in ranks.items()}
    torch.set_num_threads(1)
    for name, way in tasks:
        model = load(os.path.join(folder, name), **WAYS[way])
        found = results(model)
        held = {name: (getattr(p, "_local_tensor", p)).numel() for name, p in model.named_parameters()}
        out = os.path.join(folder, name, way)
        model.save_pretrained(out)
        if torch.distributed.get_rank() == 0:
            torch.save(found | {"held": held}, os.path.join(out, "results.pt"))
        if is_peft_available() and (name, way) in REFUSES_ADAPTERS:
            with unittest.TestCase().assertRaisesRegex(RuntimeError, "divided among processes"):
                separate_experts(model)
                model = get_peft_model(model, LoraConfig(target_modules=REFUSES_ADAPTERS[name, way]))
                model(torch.tensor([[3, 4, 5]]))
    source = os.path.join(folder, "llama")
    if is_peft_available():
        for way in ("fsdp", "ddp"):
            torch.save(adapter_gradients(source, way, ranks=2), os.path.join(source, f"{way}.pt"))
        torch.save(trained_adapters(source, ranks=2), os.path.join(source, "trainer.pt"))
    run_example(source)
    torch.distributed.destroy_process_group()


def run_example(folder):
    """The documentation's example for several processes, with the checkpoint in `folder` for the one that it names."""
    if not DOCS.is_file():
        return
    examples = re.findall(r"```py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (load_one,) = [code for code in examples if "distributed_config" in code]
    names = {}
    exec(load_one.replace("path/to/model-exl3", folder), names)
    assert any(isinstance(parameter, DTensor) for parameter in names["model"].parameters())


def adapted(folder, bias):
    """The checkpoint in `folder` with adapters, of the same values in every process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj", "up_proj"], r=4, init_lora_weights=False, bias=bias)
    return get_peft_model(model, config)


# FSDP wants one dtype for all that is trained; biases are float16 here.
TRAINED_BIASES = {"fsdp": "none", "ddp": "all", "trainer": "all"}


def adapter_gradients(folder, way, ranks):
    """The gradients of adapters on the checkpoint in `folder`; of two processes, each computes with a part of the batch."""
    ids = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(2))
    model = adapted(folder, TRAINED_BIASES[way])
    if ranks > 1:
        ids = ids.chunk(ranks)[torch.distributed.get_rank()]
    if ranks > 1 and way == "fsdp":
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for module in (*model.base_model.model.model.layers, model):
            fully_shard(module, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    if ranks > 1 and way == "ddp":
        before = {name: value.clone() for name, value in model.state_dict().items()}
        if torch.distributed.get_rank() == 1:
            for value in model.state_dict().values():
                value.zero_()  # they are the first process's
        replica = DistributedDataParallel(model)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0, msg=name)
        replica(ids, labels=ids).loss.backward()
    else:
        model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def trained_adapters(folder, ranks):
    """What `Trainer` makes of the adapters with one batch of four rows at each step, which the processes share."""
    rows = torch.randint(3, 90, (4, 6), generator=torch.Generator().manual_seed(3))
    model = adapted(folder, TRAINED_BIASES["trainer"])
    with tempfile.TemporaryDirectory() as out:
        arguments = {"max_steps": 3, "per_device_train_batch_size": 4 // ranks, "learning_rate": 0.1, "optim": "sgd"}
        arguments |= {
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_grad_norm": 0,
        }
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model, TrainingArguments(out, **arguments), train_dataset=data)
        trainer.train()
        assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (ranks > 1)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


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
        parts = {f"{layer}.mlp.{name}_proj": 256 for name in ("gate", "up")}
        checkpoint.quantize(f"{layer}.mlp.gate_up_proj", parts)
    checkpoint.quantize_all("layers")
    checkpoint.quantize("lm_head")
    return checkpoint


def llama_float():
    """A float checkpoint, with biases on both sides, and a head tied to the embeddings."""
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, vocab_size=256, attention_bias=True)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    for name in "kvo":
        torch.nn.init.normal_(getattr(model.model.layers[0].self_attn, f"{name}_proj").bias, std=0.1)
    return SyntheticCheckpoint(model)


def llama_tied_float():
    """The same, to be quantized with a head that stays tied to the embeddings."""
    return llama_float()


def qwen3_moe_float():
    """Experts, and a head with other sizes than whole blocks."""
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 64}
    config = Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 1}, **moe, vocab_size=300)
    return SyntheticCheckpoint(Qwen3MoeForCausalLM(config))


def qwen3_moe():
    checkpoint = qwen3_moe_float()
    checkpoint.quantize("model.layers.0.mlp.experts.1.up_proj", codebook="3inst", signs=("su", "sv"), scale=0.05)
    checkpoint.quantize_all("layers", bits=2.5)
    return checkpoint


TASKS = [
    (make, way)
    for make, ways in (
        (llama, ("tensor_parallel", "fsdp", "dequantized_tensor_parallel", "dequantized_fsdp")),
        (phi3, ("tensor_parallel",)),
        (llama_float, ("tensor_parallel", "fsdp")),
        (llama_tied_float, ("tensor_parallel", "fsdp")),
        (qwen3_moe, ("tensor_parallel", "expert_parallel", "fsdp", "dequantized_expert_parallel")),
        (qwen3_moe_float, ("tensor_parallel", "expert_parallel", "fsdp")),
    )
    for way in ways
]
NAMES = [(make.__name__, way) for make, way in TASKS]


@require_torch
@require_accelerate
class Exl3DistributedTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        torch.manual_seed(0)
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder, cls.expected = folder.name, {}
        for make in dict(TASKS):
            checkpoint = make()
            is_float = make.__name__.endswith("float")
            os.mkdir(os.path.join(cls.folder, make.__name__))
            checkpoint.save(
                os.path.join(cls.folder, make.__name__),
                checkpoint.dense if is_float else checkpoint.tensors,
                quantized=not is_float,
            )
        copies()
        arguments = get_torch_dist_unique_port(), cls.folder, NAMES
        ranks = torch.multiprocessing.start_processes(work, arguments, 2, join=False, start_method="forkserver")
        if not any(ranks.join(150) for _ in range(2)):  # the first to end, and the other one
            for process in ranks.processes:
                process.kill()
            raise AssertionError("the processes wait for each other")

    def of_one_process(self, name, dequantize):
        """The results of one process, and the folder of the checkpoint that it writes."""
        key = name, dequantize
        if key not in self.expected:
            model = load(os.path.join(self.folder, name), dequantize)
            folder = os.path.join(self.folder, name, f"dequantized_{dequantize}")
            model.save_pretrained(folder)
            self.expected[key] = results(model), folder, {n: p.numel() for n, p in model.named_parameters()}
        return self.expected[key]

    @parameterized.expand(NAMES)
    def test_two_processes_give_what_one_does(self, name, way):
        found = torch.load(os.path.join(self.folder, name, way, "results.pt"))
        expected, _, sizes = self.of_one_process(name, way.startswith("dequantized"))
        torch.testing.assert_close(found["tokens"], expected["tokens"], rtol=0, atol=0)
        for key in ("logits", "gradient"):
            error = (found[key] - expected[key]).abs().max() / expected[key].abs().max()
            self.assertLess(float(error), 1e-5, key)
        # Norms, routers, and what fused projections were split into are whole in each process.
        # An expert with a rate of its own is a stack of one, which FSDP does not cut.
        self.assertLess(
            sum(found["held"].values()), {"phi3": 0.85, "qwen3_moe": 0.67}.get(name, 0.65) * sum(sizes.values())
        )

    @parameterized.expand(NAMES)
    def test_two_processes_save_what_one_does(self, name, way):
        out = os.path.join(self.folder, name, way)
        _, one, _ = self.of_one_process(name, way.startswith("dequantized"))
        saved, expected = read_tensors(out), read_tensors(one)
        for file in sorted(set(os.listdir(one)) & {"config.json", "quantization_config.json"}):
            contents = []
            for place in (one, out):
                with open(os.path.join(place, file), encoding="utf-8") as stream:
                    contents.append(json.load(stream))
            self.assertEqual(*contents)
        self.assertEqual(set(os.listdir(out)) - {"results.pt"}, set(os.listdir(one)))
        torch.testing.assert_close(saved, expected, rtol=0, atol=0)

    @parameterized.expand(["fsdp", "ddp", "trainer"])
    @require_peft
    def test_adapters_are_trained_as_by_one_process(self, way):
        """By their gradients, and by what the Trainer makes of them."""
        folder = os.path.join(self.folder, "llama")
        found = torch.load(os.path.join(folder, f"{way}.pt"))
        if way == "trainer":
            expected = trained_adapters(folder, ranks=1)
        else:
            expected = adapter_gradients(folder, way, ranks=1)
        self.assertEqual(found.keys(), expected.keys())
        self.assertEqual(any(name.endswith("bias") for name in expected), TRAINED_BIASES[way] == "all")
        for key, value in expected.items():
            error = (found[key] - value).float().abs().max() / value.abs().max()
            self.assertLess(float(error), 4 * torch.finfo(value.dtype).eps + 5e-5, key)


# Those of torch's map `ncclDataType`, which the device that it is for is not needed to know; it has float8, too.
NCCL_TYPES = {torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool}
NCCL_TYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Sent(TorchDispatchMode):
    """Notes the types of all tensors that are given to a backend in this context: sent, gathered and reduced."""

    def __init__(self):
        super().__init__()
        self.types = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            found = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
            self.types.setdefault(func._opname, set()).update(found)
        return func(*args, **(kwargs or {}))


@require_torch
@require_accelerate
class Exl3DataParallelTest(unittest.TestCase):
    """What is replicated, in one process: the backend refuses 16-bit integers there, too."""

    def setUp(self):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.addCleanup(torch.distributed.destroy_process_group)

    @parameterized.expand(
        [
            ("llama", {"head_bits": 2, "embedding_bits": 2}),
            ("llama_tied", {"embedding_bits": 2}),
            ("mixtral", {}),
            ("phi3", {}),
        ]
    )
    def test_all_kinds_of_layers(self, name, options):
        source, auto_class = tiny_model(name)
        with tempfile.TemporaryDirectory() as folder:
            source.save_pretrained(folder)
            model = auto_class.from_pretrained(folder, quantization_config=quick_config(bits=1, **options))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        inputs = tiny_inputs(name)
        expected = model(**inputs).logits
        wrapper = torch.nn.Module()
        wrapper.own, wrapper.forward = torch.nn.ModuleList([model]), lambda **inputs: model(**inputs)
        with Sent() as sent:
            replica = DistributedDataParallel(wrapper)
            logits = replica(**inputs).logits
            logits.sum().backward()
        self.assertIn(torch.uint8, sent.types["broadcast_"])
        self.assertEqual(sent.types["allreduce_"], {torch.float32})
        self.assertLessEqual(set().union(*sent.types.values()), NCCL_TYPES)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        sent_again = [n for n, _ in replica.module.named_buffers() if n not in replica.parameters_to_ignore]
        plain = [n for n, m in wrapper.named_modules() for b in m._buffers if not isinstance(m, Exl3Module)]
        self.assertEqual(len(sent_again), len(plain))

    def test_a_layer_by_itself(self):
        layer = Exl3Linear(128, 128, random_linear(128, 128, bias=torch.ones(128))[0])
        layer.bias.requires_grad_(True)
        replica = DistributedDataParallel(layer)
        self.assertEqual(replica.parameters_to_ignore, {"trellis", "suh", "svh", "mul1"})
        replica(torch.ones(2, 128)).sum().backward()
        self.assertEqual(layer.bias.grad.tolist(), [2] * 128)

    def test_a_type_that_the_backend_here_takes_is_one_that_nccl_has(self):
        """So that what two processes do in these tests, in any way, NCCL is not asked in vain for."""
        taken = set()
        for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
            if dtype.is_complex or str(dtype).startswith("torch.q"):
                continue
            try:
                torch.distributed.broadcast(torch.empty(4, dtype=dtype), 0)
            except (RuntimeError, NotImplementedError):
                continue
            taken.add(dtype)
        self.assertEqual(taken, NCCL_TYPES)

    def test_float_models_are_as_ever(self):
        replica = DistributedDataParallel(torch.nn.Linear(3, 2))
        self.assertEqual(replica.parameters_to_ignore, set())


@require_torch
class Exl3ParallelPlanTest(unittest.TestCase):
    """What cannot be divided is an error, or stays whole where every rank needs all of it."""

    def model(self, plan, **sizes):
        model = torch.nn.Module()
        model.tp_plan, model.ep_plan, model._keys_to_ignore_on_load_unexpected = plan, dict(plan), None
        for name, size in sizes.items():
            setattr(model, name, self.experts(*size) if len(size) == 3 else self.linear(*size))
        return model

    def linear(self, into, out, bias=None):
        return Exl3Linear(into, out, random_linear(out, into, bias=bias)[0])

    def experts(self, hidden, intermediate, count, bias=None):
        experts = [
            {"up": self.linear(hidden, intermediate), "down": self.linear(intermediate, hidden, bias)}
            for _ in range(count)
        ]
        return stacked(experts, torch.nn.Module())

    @parameterized.expand(
        [
            ("colwise", (256, 384), "384 output features are no 2 parts of whole blocks of 128"),
            ("colwise", (256, 100), "100 output features"),
            ("rowwise", (192, 256), "192 input features are no 2 parts"),
            ("rowwise_split_input", (128, 256), "128 input features"),
            ("packed_colwise", (256, 256), "an Exl3Linear cannot be cut in the style `packed_colwise`"),
            ("all_reduce", (256, 256), "an Exl3Linear cannot be cut in the style `all_reduce`"),
            ("moe_tp_experts", (128, 384, 2), "384 output features"),
            ("colwise", (128, 256, 2), "an Exl3Experts cannot be cut in the style `colwise`"),
        ]
    )
    def test_what_cannot_be_cut(self, style, sizes, message):
        message = rf"^up.*: .*{message}(.|\n)*2 ranks.*Use fewer ranks, `ep_size` for experts, or `device_map`"
        model = self.model({"up": style, "down": "rowwise"}, up=sizes, down=(256, 256))
        self.assertRaisesRegex(ValueError, message, adapt_tensor_plan, model, None, 2)
        model = self.model({"down": "rowwise"}, up=sizes, down=(256, 256))
        self.assertRaisesRegex(ValueError, message, adapt_tensor_plan, model, {"up": style}, 2)

    def test_a_part_that_begins_within_a_block_is_not_cut(self):
        model = self.model({"up": "colwise"}, up=(256, 256))
        tensors, _ = random_linear(384, 256)
        model.up = Exl3Linear(256, 256, tensors, skipped=64)
        self.assertRaisesRegex(ValueError, "up: .* are no 2 parts of whole", adapt_tensor_plan, model, None, 2)
        model = self.model({"up": "colwise_rep"}, up=(256, 256))
        model.up = Exl3Linear(256, 256, tensors, skipped=64)
        adapt_tensor_plan(model, None, 2)
        self.assertNotIn("up", model.tp_plan)

    def test_experts_with_biases_are_not_cut(self):
        model = self.model({"experts": "moe_tp_experts"})
        model.experts = self.experts(256, 256, 2, bias=torch.ones(256))
        self.assertRaisesRegex(
            ValueError, "experts: experts with biases are not cut(.|\n)*`ep_size`", adapt_tensor_plan, model, None, 2
        )

    def test_rules_for_single_tensors_are_refused(self):
        model = self.model({"up": "colwise"}, up=(256, 256))
        own = {"up.trellis": "rowwise"}
        self.assertRaisesRegex(
            ValueError, "up.trellis: quantized tensors have no rules", adapt_tensor_plan, model, own, 2
        )

    def test_every_layer_that_cannot_be_cut_is_named(self):
        model = self.model({"up": "colwise", "gate": "colwise"}, up=(128, 128), gate=(128, 128))
        self.assertRaisesRegex(ValueError, r"up: .*\ngate: ", adapt_tensor_plan, model, None, 2)

    def test_a_head_that_cannot_be_cut_stays_whole(self):
        plan = {"head": "colwise_gather_output", "up": "colwise_gather_output", "norm": "sequence_parallel"}
        model = self.model(plan, head=(256, 100), up=(256, 256))
        adapt_tensor_plan(model, None, 2)
        self.assertEqual(model.tp_plan, {"up": "colwise_gather_output", "norm": "sequence_parallel"})

    def test_plans_for_fused_experts_become_plans_for_their_projections(self):
        plan = {"mlp": "moe_tp_experts", "mlp.up_proj": "packed_colwise", "mlp.down_proj": "rowwise"}
        model = self.model(plan, mlp=(256, 256, 2))
        adapt_tensor_plan(model, None, 2)
        parts = {"mlp.stacked_up.*": "exl3_expert_colwise", "mlp.stacked_down.*": "exl3_expert_rowwise"}
        self.assertEqual(model.tp_plan, {"mlp": "moe_tp_experts", **parts})

    @parameterized.expand(
        [
            ("ep_dispatch_experts", (128, 128, 3), "its 3 experts are not divisible by 2"),
            ("grouped_gemm", (128, 128, 2), "an Exl3Experts cannot be divided in the style `grouped_gemm`"),
            ("ep_dispatch_experts", (128, 128), "an Exl3Linear cannot be divided"),
        ]
    )
    def test_what_cannot_be_divided(self, style, sizes, message):
        message = rf"^mlp: {message}(.|\n)*Use another `ep_size`"
        self.assertRaisesRegex(ValueError, message, adapt_expert_plan, self.model({"mlp": style}, mlp=sizes), None, 2)
        self.assertRaisesRegex(ValueError, message, adapt_expert_plan, self.model({}, mlp=sizes), {"mlp": style}, 2)

    def test_divided_models_are_not_dequantized(self):
        model = self.model({}, mlp=(128, 128, 4))
        model.mlp.keep(2, 2)
        self.assertEqual({len(tensor) for tensor in model.mlp.state_dict().values()}, {2})
        with self.assertRaisesRegex(
            ValueError, r"mlp is divided among processes: load.*`Exl3Config\(dequantize=True\)`"
        ):
            dequantize_modules(model)

    @parameterized.expand(
        [
            ({"pp_size": 2}, "cannot be distributed by `pp_size`"),
            ({"fsdp_size": 2, "tp_size": 2}, "by `fsdp_size` or by `tp_plan` and `ep_size`, not by both"),
            ({"fsdp_size": 2, "ep_size": 2}, "by `fsdp_size` or by `tp_plan` and `ep_size`, not by both"),
        ]
    )
    def test_other_ways(self, sizes, message):
        quantizer = Exl3HfQuantizer(Exl3Config(), pre_quantized=True)
        model = self.model({})
        model.config = SimpleNamespace(distributed_config=DistributedConfig(**sizes))
        self.assertRaisesRegex(ValueError, message, quantizer.update_parallel_plan, model, model.tp_plan)
