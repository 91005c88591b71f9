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

import copy
import gc
import inspect
import json
import logging as python_logging
import os
import pickle
import pydoc
import shutil
import tempfile
import threading
import unittest
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
from parameterized import parameterized
from safetensors import safe_open

from transformers import AutoModel, Exl3Config, GraniteSpeechEncoderConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations.exl3 import saving
from transformers.integrations.exl3.modules import Exl3Linear, Exl3Module
from transformers.integrations.exl3.scratch import scratch
from transformers.models.granite_speech.modeling_granite_speech import GraniteSpeechCTCEncoder
from transformers.testing_utils import CaptureLogger, require_accelerate, require_torch
from transformers.utils import logging

from .synthetic import read_tensors, save_quantized
from .tiny_models import tiny_inputs, tiny_model


@require_torch
@require_accelerate
class Exl3SavingTest(unittest.TestCase):
    """What `save_pretrained` of a quantized model is like, beside that it saves."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def load(self, name="llama"):
        """A quantized model, whose vision tower, if it has one, stays plain."""
        model, auto_class = tiny_model(name)
        save_quantized(model, self.folder, match="layers.0")
        return auto_class.from_pretrained(self.folder)

    def test_a_class_is_named_as_files_spell_it(self):
        """exllamav3 knows `Ernie4_5ForCausalLM` by the name that its repo has: `Ernie4_5_ForCausalLM`; or by quite another."""
        model, auto_class = tiny_model("llama")
        for published, saved in (
            ("Llama_ForCausalLM", "Llama_ForCausalLM"),
            ("AlpacaForCausalLM", "AlpacaForCausalLM"),
            ("AlpacaForTokenClassification", "LlamaForCausalLM"),
            ("MistralForCausalLM", "LlamaForCausalLM"),
            ("LlamaModel", "LlamaForCausalLM"),
        ):
            model.save_pretrained(self.folder)
            file = os.path.join(self.folder, "config.json")
            with open(file, encoding="utf-8") as source:
                content = json.load(source) | {"architectures": [published]}
            with open(file, "w", encoding="utf-8") as target:
                json.dump(content, target)
            config = Exl3Config(effort="fast", modules_to_not_convert=["mlp"])
            quantized = auto_class.from_pretrained(self.folder, quantization_config=config)
            with tempfile.TemporaryDirectory() as folder:
                quantized.save_pretrained(folder)
                with open(os.path.join(folder, "config.json"), encoding="utf-8") as source:
                    self.assertEqual(json.load(source)["architectures"], [saved])

    def test_a_model_that_begins_with_a_quantized_layer_has_the_dtype_of_the_others(self):
        """And not that of its scales."""
        config = GraniteSpeechEncoderConfig(input_dim=16, num_layers=1, hidden_dim=128, num_heads=4, dim_head=32)
        config.update({"feedforward_mult": 1, "context_size": 8, "max_pos_emb": 8, "output_dim": 10})
        GraniteSpeechCTCEncoder(config).bfloat16().save_pretrained(self.folder)
        asked = Exl3Config(effort="fast", overrides={"*": 16, "input_linear": 2})
        model = GraniteSpeechCTCEncoder.from_pretrained(self.folder, quantization_config=asked, dtype="auto")
        model.save_pretrained(self.folder)
        again = GraniteSpeechCTCEncoder.from_pretrained(self.folder, dtype="auto")
        self.assertIsInstance(again.input_linear, Exl3Linear)
        self.assertEqual((model.dtype, again.dtype, again.out.weight.dtype), (torch.bfloat16,) * 3)

    def test_a_state_may_be_given(self):
        model = self.load()
        name = "model.norm.weight"
        state = model.state_dict()
        model.save_pretrained(self.folder, state_dict=state | {name: torch.full_like(state[name], 3)})
        self.assertEqual(read_tensors(self.folder)[name].unique().tolist(), [3])
        model.save_pretrained(self.folder)
        self.assertEqual(read_tensors(self.folder)[name].unique().tolist(), [1])

    def test_a_deleted_model_is_gone_at_once(self):
        model = self.load()
        gc.collect()
        gc.disable()
        try:
            alive, weight = weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.trellis)
            del model
            self.assertIsNone(alive())
            self.assertIsNone(weight())
        finally:
            gc.enable()

    def test_a_model_that_is_loaded_only_to_be_saved_is_saved(self):
        with tempfile.TemporaryDirectory() as folder:
            self.load().save_pretrained(folder)
            self.assertEqual(read_tensors(folder).keys(), read_tensors(self.folder).keys())
            self.assertIn("quantization_config.json", os.listdir(folder))

    def test_no_garbage_is_collected_meanwhile_and_torch_takes_one_thread(self):
        """And afterwards as before, whether the model was saved or not."""
        self.addCleanup(gc.enable)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(2)
        model, found = self.load(), []

        def write(*_):
            found.append((gc.isenabled(), torch.get_num_threads()))
            raise RuntimeError("a full disk")

        with tempfile.TemporaryDirectory() as folder:
            for set_before in (gc.disable, gc.enable):
                set_before()
                was_enabled = gc.isenabled()
                with patch.object(saving, "_write_tensor_storage", write):
                    with self.assertRaisesRegex(RuntimeError, "a full disk"):
                        model.save_pretrained(folder)
                self.assertEqual((gc.isenabled(), torch.get_num_threads()), (was_enabled, 2))
            model.save_pretrained(folder)
        self.assertEqual((gc.isenabled(), torch.get_num_threads()), (True, 2))
        self.assertEqual(found, [(False, 1), (False, 1)])

    def test_a_variant_stands_beside_the_weights_that_are_there(self):
        model = self.load()
        with torch.no_grad():
            model.model.norm.weight.fill_(3)
        for size in ("1GB", "100kB", "1GB"):
            model.save_pretrained(self.folder, variant="new", max_shard_size=size)
            for variant, value in (("new", 3), (None, 1)):
                again = LlamaForCausalLM.from_pretrained(self.folder, variant=variant)
                self.assertEqual(float(again.model.norm.weight.detach().mean()), value)
        files = {"config.json", "generation_config.json", "quantization_config.json"}
        self.assertEqual({*os.listdir(self.folder)} - files, {"model.safetensors", "model.new.safetensors"})

    @parameterized.expand([("copy", copy.deepcopy), ("pickle", lambda model: pickle.loads(pickle.dumps(model)))])
    def test_a_copy_saves_itself(self, _, made):
        other = made(self.load())
        with torch.no_grad():
            other.model.norm.weight.fill_(3)
        with tempfile.TemporaryDirectory() as folder:
            other.save_pretrained(folder)
            torch.testing.assert_close(read_tensors(folder)["model.norm.weight"], other.model.norm.weight.detach())

    def test_files_say_that_their_tensors_are_pytorchs(self):
        """Upstream does not load others."""
        out = os.path.join(self.folder, "out")
        self.load().save_pretrained(out, max_shard_size="50KB")
        files = [*Path(out).glob("*.safetensors")]
        self.assertGreater(len(files), 1)
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                self.assertEqual(tensors.metadata(), {"format": "pt"}, file.name)

    def test_it_looks_like_the_method_that_it_stands_for(self):
        found, expected = self.load().save_pretrained, LlamaForCausalLM(tiny_model("llama")[0].config).save_pretrained
        self.assertEqual(inspect.signature(found), inspect.signature(expected))
        self.assertEqual((found.__name__, found.__doc__), (expected.__name__, expected.__doc__))
        self.assertIn("push_to_hub", pydoc.render_doc(found))

    def test_how_a_model_is_distributed_is_told_after_it_is_saved(self):
        model = self.load()
        model.config.distributed_config = asked = DistributedConfig(tp_size=1)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
        self.assertIs(model.config.distributed_config, asked)

    def test_no_folder_for_unfinished_files_is_logged(self):
        model, root = self.load(), python_logging.getLogger("transformers")
        before = logging.get_verbosity()
        logging.set_verbosity_info()
        try:
            with tempfile.TemporaryDirectory() as folder, CaptureLogger(root) as captured:
                model.save_pretrained(folder)
        finally:
            logging.set_verbosity(before)
        self.assertIn(f"{folder}/model.safetensors", captured.out)
        self.assertIn(f"{folder}/config.json", captured.out)
        self.assertNotIn(".unfinished", captured.out)

    @parameterized.expand([("qwen2_5_vl", "model.language_model"), ("llama", "model")])
    def test_a_part_with_quantized_weights_is_not_saved_alone(self, name, path):
        model = self.load(name)
        part = model.get_submodule(path)
        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaisesRegex(ValueError, f"{type(part).__name__} is a part of a quantized model"):
                part.save_pretrained(folder)
            model.dequantize()
            part.save_pretrained(folder)
            self.assertTrue(read_tensors(folder))

    def test_a_part_without_quantized_weights_is_saved(self):
        with tempfile.TemporaryDirectory() as folder:
            self.load("qwen2_5_vl").model.visual.save_pretrained(folder)
            self.assertTrue(read_tensors(folder))

    @parameterized.expand(["llama", "mixtral", "phi3", "llama_tied"])
    def test_what_was_dequantized_module_by_module_is_saved_as_it_is(self, name):
        model, auto_class = tiny_model(name)
        model.save_pretrained(self.folder)
        config = Exl3Config(bits=1, effort="fast", embedding_bits=2 if name == "llama_tied" else None)
        model = auto_class.from_pretrained(self.folder, quantization_config=config)
        expected = model(**tiny_inputs(name)).logits
        while paths := [path for path, module in model.named_modules() if isinstance(module, Exl3Module)]:
            model.set_submodule(paths[0], model.get_submodule(paths[0]).dequantize())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = auto_class.from_pretrained(folder)
        self.assertFalse(hasattr(again.config, "quantization_config"))
        torch.testing.assert_close(again(**tiny_inputs(name)).logits, expected, rtol=1e-4, atol=1e-4)

    def test_a_float_model_in_the_place_of_a_quantized_one_has_no_map_of_its_tensors(self):
        model, (floats, _) = self.load(), tiny_model("llama")
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "quantization_config.json")
            for variant, is_left in (("second", True), (None, False)):
                model.save_pretrained(folder)
                floats.save_pretrained(folder, variant=variant)
                self.assertEqual(os.path.exists(file), is_left)
            model.save_pretrained(folder)
            model.dequantize().save_pretrained(folder)
            self.assertFalse(os.path.exists(file))
            for content in ("", "[1]", '{"quant_method": "other"}'):
                Path(file).write_text(content, encoding="utf-8")
                floats.save_pretrained(folder)
                self.assertEqual(Path(file).read_text(encoding="utf-8"), content)

    def test_a_plain_part_of_a_model_whose_config_it_shares_is_saved_as_a_plain_model(self):
        model, auto_class = tiny_model("llama")
        model.save_pretrained(self.folder)
        config = Exl3Config(bits=1, effort="fast", head_bits=1, modules_to_not_convert=["layers"])
        model = auto_class.from_pretrained(self.folder, quantization_config=config)
        with tempfile.TemporaryDirectory() as folder:
            model.model.save_pretrained(folder)
            part = AutoModel.from_pretrained(folder)
        torch.testing.assert_close(part.state_dict(), model.model.state_dict(), rtol=0, atol=0)
        self.assertEqual(model.config.quantization_config.quant_method, "exl3")

    def test_two_threads_that_save_to_a_folder_do_it_one_after_the_other(self):
        models = [self.load(), self.load()]
        with torch.no_grad():
            for value, model in enumerate(models):
                model.model.norm.weight.fill_(value)
                model.model.embed_tokens.weight.fill_(value)
        with tempfile.TemporaryDirectory() as folder:
            for sizes in (("1GB", "60kB"), ("60kB", "60kB")):
                with ThreadPoolExecutor(2) as pool:
                    calls = [pool.submit(m.save_pretrained, folder, max_shard_size=s) for m, s in zip(models, sizes)]
                    for done in calls:
                        done.result()
                tensors = read_tensors(folder)
                values = [float(tensors[f"model.{name}.weight"].mean()) for name in ("norm", "embed_tokens")]
                self.assertEqual(values[0], values[1])
                self.assertEqual(tensors.keys(), read_tensors(self.folder).keys())
                self.assertNotIn(saving.UNFINISHED, os.listdir(folder))

    def test_a_folder_that_another_process_saves_to_is_waited_for(self):
        model, begun = self.load(), threading.Event()
        with tempfile.TemporaryDirectory() as folder:
            with ThreadPoolExecutor(1) as pool, scratch(Path(folder, saving.UNFINISHED), self.fail):
                with patch.object(saving.logger, "warning", side_effect=lambda *args: begun.set()) as warning:
                    done = pool.submit(model.save_pretrained, folder)
                    self.assertTrue(begun.wait(60))
                    self.assertIn("is saving to", warning.call_args.args[0])
                    self.assertNotIn("config.json", os.listdir(folder))
                shutil.rmtree(os.path.join(folder, saving.UNFINISHED))
            done.result()
            self.assertTrue(read_tensors(folder))
