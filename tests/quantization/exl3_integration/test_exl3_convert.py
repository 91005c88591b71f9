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
"""The command that converts a model: what it writes, what a kill leaves of it, what it refuses."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from parameterized import parameterized
from safetensors import SafetensorError
from safetensors.torch import save_file

from transformers import Exl3Config, LlamaConfig, LlamaForCausalLM, logging
from transformers.integrations.exl3 import __main__ as command
from transformers.integrations.exl3 import calibration, conversion, encoding
from transformers.integrations.exl3 import convert as converting
from transformers.integrations.exl3.convert import convert
from transformers.integrations.exl3.scratch import scratch
from transformers.testing_utils import require_accelerate, require_torch, slow

from .processes import forked, in_a_process, kill_at
from .synthetic import read_tensors, save_quantized
from .test_exl3_calibration import word_tokenizer
from .tiny_models import tiny_model


TEXT = " ".join(f"w{number}" for number in range(3, 67))
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj"]  # of `small_model` that are quantized here


def small_config(**arguments) -> Exl3Config:
    return Exl3Config(**{"bits": 1, "effort": "fast", "modules_to_not_convert": ["mlp"], **arguments})


def digests(folder) -> dict[str, str]:
    """By path in it, what all files in `folder` hold."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def small_model(folder, **config):
    """Save a model of which few layers are quantized, and what belongs to a model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, **config)).save_pretrained(folder)
    for name, text in {
        "tokenizer.json": "{}",
        "processor_config.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "additional_chat_templates/tools.jinja": "{{ y }}",
        "modules.json": json.dumps([{"path": ""}, {"path": "1_Dense"}]),
        "1_Dense/config.json": "{}",
        "1_Dense/model.safetensors": "weights",
        "onnx/model.onnx": "weights",
        "onnx/config.json": "{}",
        "pytorch_model.bin": "weights",
        ".gitattributes": "",
        "README.md": "---\nlicense: mit\ntags: [text]\nmodel-index: []\n---\n# About it\n",
    }.items():
        os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
        Path(folder, name).write_text(text, encoding="utf-8")


BESIDE = {
    "tokenizer.json",
    "processor_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
    "modules.json",
    "1_Dense/config.json",
    "1_Dense/model.safetensors",
}
MEASURED = """---
model-index:
- name: small
  results:
  - task: {type: text-generation}
    dataset: {name: text, type: text}
    metrics: [{type: perplexity, value: 5}]
---
# Text
"""
SAVED = {"config.json", "generation_config.json", "model.safetensors", "quantization_config.json"}


@contextlib.contextmanager
def counted():
    """Yields a list that grows by an item with each layer that is quantized."""
    done, encode = [], encoding.encode
    with patch.object(encoding, "encode", lambda *args: (done.append(0), encode(*args))[1]):
        yield done


@contextlib.contextmanager
def stopping_after(layers: int):
    """Have the layer after the first `layers` interrupt what goes on."""
    left, encode = layers, encoding.encode

    def encode_or_stop(*args):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return encode(*args)

    with patch.object(encoding, "encode", encode_or_stop):
        yield


def convert_until(moment, source, output, log):
    """Convert, writing a byte to `log` for each layer that is quantized, and be killed at change number `moment` of a file."""
    descriptor, encode = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), encoding.encode

    def encode_and_tell(*args):
        result = encode(*args)
        os.write(descriptor, b".")
        return result

    if moment is not None:
        kill_at(moment, output)
    with patch.object(encoding, "encode", encode_and_tell):
        convert(source, output, small_config(), resume=True)
    os.close(descriptor)


def kill_at_moments(folder, step):
    source, whole, output, log = (os.path.join(folder, name) for name in ("source", "whole/out", "out", "log"))
    small_model(source)
    convert_until(None, source, whole, log)
    expected, moment, status, kept = digests(whole), 0, 9, set()
    assert os.path.getsize(log) == len(LAYERS)
    while status == 9:
        shutil.rmtree(output, ignore_errors=True)
        os.remove(log)
        status = forked(lambda: convert_until(moment, source, output, log))
        kept.add(os.path.getsize(log))
        is_done = os.path.isdir(output) and "config.json" in os.listdir(output)
        if is_done and conversion.UNFINISHED not in os.listdir(output):
            shutil.rmtree(os.path.join(output, conversion.DONE), ignore_errors=True)
        else:
            convert_until(None, source, output, log)
        assert os.path.getsize(log) <= len(LAYERS) + 1, f"more than a layer was lost at {moment}"
        assert digests(output) == expected, f"killed at {moment}: {digests(output)}, not {expected}"
        moment += step
    assert status == 0, status
    assert len(kept) == len(LAYERS) + 1 or step > 1, kept


@require_torch
@require_accelerate
class Exl3ConvertTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.source, self.output = os.path.join(self.folder, "source"), os.path.join(self.folder, "output")
        logging.disable_progress_bar()
        self.addCleanup(logging.enable_progress_bar)

    def unfinished(self, layers=2, **arguments):
        """Have an unfinished conversion of the small model, with so many finished layers."""
        small_model(self.source)
        with stopping_after(layers):
            self.assertRaises(KeyboardInterrupt, convert, self.source, self.output, small_config(**arguments))

    @parameterized.expand(
        [
            ("llama", {"bits": 1.5, "head_bits": 2}),
            ("llama_tied", {"bits": 1, "embedding_bits": 1}),
            ("qwen3_moe", {"bits": 1}),
            ("gpt_oss", {"bits": 1}),
            ("phi3", {"bits": 1, "overrides": {"*.q_proj": 2, "*.mlp.*": 16}}),
            ("t5", {"bits": 1}),
            ("bert_classifier", {"bits": 1}),
            ("qwen2_5_vl", {"bits": 1, "modules_to_not_convert": ["visual"]}),
        ]
    )
    def test_the_files_are_those_of_loading_and_saving(self, name, arguments):
        model, auto_class = tiny_model(name)
        model.save_pretrained(self.source, max_shard_size=100_000)
        expected = os.path.join(self.folder, "expected")
        config, shards = Exl3Config(**arguments, effort="fast"), {"max_shard_size": 50_000}
        model = auto_class.from_pretrained(self.source, dtype="auto", quantization_config=config)
        model.save_pretrained(expected, **shards)
        convert(self.source, self.output, Exl3Config(**arguments, effort="fast"), **shards)
        found = digests(self.output)
        self.assertIsNotNone(found.pop("README.md"))
        self.assertEqual(found, digests(expected))
        auto_class.from_pretrained(self.output)

    def test_a_kill_loses_at_most_a_layer_and_the_result_is_the_same(self):
        in_a_process(self, (kill_at_moments, self.folder, 9))

    @slow
    def test_a_kill_at_any_moment_loses_at_most_a_layer_and_the_result_is_the_same(self):
        in_a_process(self, (kill_at_moments, self.folder, 1))

    @parameterized.expand([("self", "self"), ("texts", [TEXT]), ("mixture", [[*range(3, 67)]])])
    def test_with_data_the_result_is_the_same_after_a_stop(self, name, dataset):
        model, auto_class = tiny_model("qwen3_moe" if name == "mixture" else "llama_tied")
        model.save_pretrained(self.source)
        arguments = {"bits": 2, "effort": "fast", "dataset": dataset, "calibration_rows": 2, "calibration_length": 32}
        tokenizer, asked = word_tokenizer(), []
        if name == "texts":
            arguments["tokenizer"] = lambda *args, **kwargs: asked.append(args) or tokenizer(*args, **kwargs)
        expected = os.path.join(self.folder, "expected")
        with counted() as done:
            model = auto_class.from_pretrained(self.source, dtype="auto", quantization_config=Exl3Config(**arguments))
        model.save_pretrained(expected)
        for stops in (3, 2):
            with stopping_after(stops):
                self.assertRaises(KeyboardInterrupt, convert, self.source, self.output, Exl3Config(**arguments), True)
        other = Exl3Config(**{**arguments, "dataset": ["w3"] if name == "texts" else [[1, 2, 3]]})
        self.assertRaisesRegex(ValueError, "dataset was .* and is now", convert, self.source, self.output, other, True)
        with counted() as rest, patch.object(calibration, "sensitivities") as measure:
            convert(self.source, self.output, Exl3Config(**arguments), resume=True)
        self.assertEqual((len(rest), measure.call_count), (len(done) - 5, 0))
        self.assertEqual(len(asked), 5 if name == "texts" else 0)  # once each time
        found = digests(self.output)
        self.assertIsNotNone(found.pop("README.md"))
        self.assertEqual(found, digests(expected))

    def test_a_tokenizer_is_known_by_what_it_makes_of_the_texts(self):
        """In one folder, and an object: its name tells nothing."""
        texts, found = ["w3 w4", "w5"], []
        for name, begins in ((self.source, "[BOS]"), (self.source, None), (None, None)):
            tokenizer = word_tokenizer(begins)
            if name is not None:
                tokenizer.save_pretrained(name)
            found.append(converting._settings(small_config(dataset=texts, tokenizer=name or tokenizer))["tokenizer"])
        self.assertNotEqual(found[0], found[1])
        self.assertEqual(found[1], found[2])

    def test_only_what_is_missing_is_quantized(self):
        self.unfinished(layers=3)
        with counted() as done:
            convert(self.source, self.output, small_config(), resume=True)
        self.assertEqual(len(done), 1)

    def test_finished_experts_are_kept_one_by_one_and_then_together(self):
        tiny_model("qwen3_moe")[0].save_pretrained(self.source)
        config = {"bits": 1, "effort": "fast", "modules_to_not_convert": ["self_attn"]}
        for layers, files in ((3, 3), (7, 1 + 6)):
            with stopping_after(layers):
                self.assertRaises(KeyboardInterrupt, convert, self.source, self.output, Exl3Config(**config), True)
            kept = [file.name for file in Path(self.output, conversion.UNFINISHED, "work", "layers").iterdir()]
            self.assertEqual(len(kept), files, kept)
        with counted() as done:
            convert(self.source, self.output, Exl3Config(**config), resume=True)
        self.assertEqual(len(done), 2)

    def test_what_is_not_to_be_resumed_is_left_as_it_is(self):
        self.unfinished()
        before = digests(self.output)
        shutil.copytree(self.source, other := os.path.join(self.folder, "other"))
        weights = read_tensors(other)
        weights["model.norm.weight"] += 1
        save_file(weights, os.path.join(other, "model.safetensors"), metadata={"format": "pt"})
        for source, config, resume, message in (
            (self.source, small_config(), False, "unfinished conversion in it: go on with it by --resume"),
            (self.source, small_config(bits=2.5), True, "bits was 1 and is now 2.5"),
            (self.source, small_config(effort="default"), True, 'effort was "fast" and is now "default"'),
            (self.source, small_config(head_bits=6), True, "head_bits was not set and is now 6"),
            (self.source, small_config(dataset="self"), True, 'dataset was not set and is now "self"'),
            (other, small_config(), True, r'model.safetensors was "\d+ bytes \w+" and is now "\d+ bytes \w+"'),
        ):
            with self.assertRaisesRegex((ValueError, FileExistsError), message):
                convert(source, self.output, config, resume)
            self.assertEqual(digests(self.output), before)
        with patch.object(conversion, "__version__", "6.0.0"), self.assertRaisesRegex(ValueError, 'now "6.0.0"'):
            convert(self.source, self.output, small_config(), resume=True)
        with FileLock(lock := Path(self.output, conversion.UNFINISHED, "lock")):
            message = f"Another process .*If there is none, remove {lock}"
            self.assertRaisesRegex(RuntimeError, message, convert, self.source, self.output, small_config(), True)
        self.assertEqual(digests(self.output), before)

    def test_what_comes_along_is_that_of_the_beginning(self):
        self.unfinished()
        before = digests(self.output)
        for name in ("generation_config.json", *BESIDE):
            file = Path(self.source, name)
            content = file.read_bytes()
            file.write_bytes(content + b" ")
            with self.assertRaisesRegex(ValueError, rf'{name} was "\d+ bytes \w+" and is now'):
                convert(self.source, self.output, small_config(), resume=True)
            file.write_bytes(content)
        self.assertEqual(digests(self.output), before)

    def test_a_size_of_files_that_is_none_is_an_error_at_once(self):
        small_model(self.source)
        for size, reason in (("5XB", "Unit 'XB'"), ("0GB", "give one"), ("-5GB", "give one"), (0, "give one")):
            with counted() as done, self.assertRaisesRegex(ValueError, f"{size!r} is no size of a file: {reason}"):
                convert(self.source, self.output, small_config(), max_shard_size=size)
            self.assertEqual(done, [])
        self.assertFalse(os.path.exists(self.output))

    def test_another_process_may_remove_what_is_left_of_a_conversion(self):
        def replace_and_remove(source, target):
            replace(source, target)
            shutil.rmtree(target)

        replace, output = os.replace, Path(self.output)
        with conversion.Conversion(output, {}).running(resume=False):
            patcher = patch.object(conversion.os, "replace", replace_and_remove)
            patcher.start()
            self.addCleanup(patcher.stop)
        self.assertEqual([*output.iterdir()], [])

    def test_a_folder_that_another_process_has_just_filled_is_left_as_it_is(self):
        """What is in it is looked at when nobody else writes to it, and not before."""
        output = Path(self.output)

        @contextlib.contextmanager
        def scratch_when_another_is_done(folder, when_taken):
            (output / "config.json").write_text("{}", encoding="utf-8")
            with scratch(folder, when_taken):
                yield

        output.mkdir()
        with patch.object(conversion, "scratch", scratch_when_another_is_done):
            with self.assertRaisesRegex(FileExistsError, "is not empty"):
                with conversion.Conversion(output, {}).running(resume=False):
                    self.fail("it began")
        self.assertEqual(os.listdir(output), ["config.json"])

    def test_a_file_is_no_output(self):
        Path(self.output).write_text("notes", encoding="utf-8")
        with self.assertRaisesRegex(FileExistsError, "is no folder"):
            with conversion.Conversion(Path(self.output), {}).running(resume=False):
                self.fail("it began")
        self.assertEqual(Path(self.output).read_text(encoding="utf-8"), "notes")

    def test_a_config_is_needed(self):
        for config in (None, {"bits": 4}, 4):
            with self.assertRaisesRegex(TypeError, "has to be an Exl3Config"):
                convert(self.source, self.output, config)

    def test_a_device_is_not_for_quantizing_with_data(self):
        small_model(self.source)
        with self.assertRaisesRegex(ValueError, "leave 'meta' out"):
            convert(self.source, self.output, small_config(dataset="self"), device="meta")
        self.assertFalse(os.path.exists(self.output))

    def test_the_order_of_overrides_is_a_setting(self):
        rates = {"*.q_proj": 2, "*.self_attn.*": 1.5}
        self.unfinished(overrides=rates)
        with self.assertRaisesRegex(ValueError, "overrides was .* and is now"):
            convert(self.source, self.output, small_config(overrides=dict(reversed(rates.items()))), resume=True)

    @parameterized.expand([(False,), (True,)])
    def test_a_folder_with_other_files_is_left_as_it_is(self, resume):
        small_model(self.source)
        before = digests(self.source)
        with self.assertRaisesRegex(FileExistsError, "is not empty"):
            convert(self.source, self.source, small_config(), resume)
        self.assertEqual(digests(self.source), before)

    def test_what_a_kill_at_the_very_end_leaves_is_removed(self):
        small_model(self.source)
        os.makedirs(os.path.join(self.output, conversion.DONE, "work"))
        convert(self.source, self.output, small_config())
        self.assertEqual(digests(self.output).keys(), {*BESIDE, *SAVED, "README.md"})
        self.assertNotIn(conversion.DONE, os.listdir(self.output))

    def test_a_file_of_weights_is_known_by_pieces_of_all_of_it(self):
        file, found = Path(self.folder, "weights"), []
        for place in (None, 0, 5 << 20, (8 << 20) - 1):
            with open(file, "wb") as stream:
                stream.truncate(8 << 20)
                if place is not None:
                    stream.seek(place)
                    stream.write(b".")
            found.append(conversion.fingerprints([file], Path(self.folder))["weights"])
        self.assertEqual(len({*found}), 4)

    def test_a_damaged_layer_is_named(self):
        self.unfinished()
        file = next(Path(self.output, conversion.UNFINISHED, "work", "layers").iterdir())
        os.truncate(file, os.path.getsize(file) - 1)
        with self.assertRaisesRegex(ValueError, f"{file.name} is damaged .* Remove it"):
            convert(self.source, self.output, small_config(), resume=True)
        file.unlink()
        convert(self.source, self.output, small_config(), resume=True)

    def test_a_disk_that_is_too_small_is_an_error_at_once(self):
        tiny_model("llama")[0].save_pretrained(self.source)
        free = shutil.disk_usage(self.folder)
        with (
            patch.object(conversion.shutil, "disk_usage", return_value=free._replace(free=100_000)),
            self.assertRaisesRegex(OSError, "0.1 MB free, and about 0.3 MB are needed: 0.2 MB"),
            counted() as done,
        ):
            convert(self.source, self.output, Exl3Config(bits=4))
        self.assertEqual(done, [])
        self.assertFalse(os.path.exists(self.output))

    def test_a_layer_is_a_file_when_all_of_it_is_on_the_disk(self):
        layers, tensors, done = conversion.LayerFiles(Path(self.folder)), {"suh": torch.ones(128)}, []

        def write_half(tensors, path):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

        with patch.object(conversion, "save_file", write_half), self.assertRaises(KeyboardInterrupt):
            layers.keep("layer", tensors)
        self.assertIsNone(layers.find("layer"))
        sync, replace = os.fsync, os.replace
        with (
            patch.object(conversion.os, "fsync", lambda file: (done.append("fsync"), sync(file))),
            patch.object(conversion.os, "replace", lambda *paths: (done.append("replace"), replace(*paths))),
        ):
            layers.keep("layer", tensors)
        self.assertEqual(done, ["fsync", "replace"])
        torch.testing.assert_close(layers.find("layer"), tensors, rtol=0, atol=0)

    def test_a_layer_may_have_any_name(self):
        layers = conversion.LayerFiles(Path(self.folder))
        for name in ("layers.en/us", "layers.en%2Fus"):
            self.assertIsNone(layers.find(name))
            layers.keep(name, {"suh": torch.ones(128)})
            self.assertIsNotNone(layers.find(name))

    def test_the_room_that_is_needed_is_less_by_what_is_finished(self):
        layers, free = conversion.LayerFiles(Path(self.folder)), shutil.disk_usage(self.folder)
        Path(self.folder, "a.safetensors").write_bytes(bytes(60))
        for name in (
            f"b.safetensors{conversion.PART}",
            ".tmpU0xK2p",
        ):  # a kill left these, the last one of safetensors
            Path(self.folder, name).write_bytes(bytes(30))
        with patch.object(conversion, "_bytes_to_write", return_value=(100, 50)):
            for left, is_enough in ((90, True), (89, False)):
                with patch.object(conversion.shutil, "disk_usage", return_value=free._replace(free=left)):
                    layers.begin(None) if is_enough else self.assertRaises(OSError, layers.begin, None)
        self.assertEqual(os.listdir(self.folder), ["a.safetensors"])

    def test_a_mistake_that_is_noticed_before_a_layer_is_finished_leaves_nothing(self):
        small_model(self.source)
        with self.assertRaisesRegex(ValueError, "matches no layer"):
            convert(self.source, self.output, small_config(overrides={"q_prj": 2}))
        with stopping_after(0):
            self.assertRaises(KeyboardInterrupt, convert, self.source, self.output, small_config(bits=2))
        self.assertFalse(os.path.exists(self.output))
        os.makedirs(os.path.join(self.output, conversion.UNFINISHED))  # of one that was killed then
        with self.assertRaisesRegex(ValueError, "matches no layer"):
            convert(self.source, self.output, small_config(overrides={"q_prj": 2}))
        self.assertEqual(os.listdir(self.output), [])  # not the folder that was there
        convert(self.source, self.output, small_config())

    def test_the_room_on_the_disk_is_what_is_written(self):
        for name in ("llama_tied", "qwen3_moe", "phi3"):
            with self.subTest(name), tempfile.TemporaryDirectory() as folder:
                source, output = os.path.join(folder, "source"), os.path.join(folder, "output")
                tiny_model(name)[0].save_pretrained(source)
                config = Exl3Config(bits=1, effort="fast", embedding_bits=2)
                find, sizes = conversion._bytes_to_write, []
                with patch.object(conversion, "_bytes_to_write", lambda model: sizes.append(find(model)) or sizes[0]):
                    convert(source, output, config)
                written = sum(tensor.nbytes for tensor in read_tensors(output).values())
                self.assertAlmostEqual(sizes[0][1], written, delta=1024)

    def test_a_model_of_files_is_not_held_in_memory(self):
        tiny_model("qwen3_moe")[0].save_pretrained(self.source)
        held, tabulate = {}, converting._table

        def look(model):
            with open("/proc/self/maps", encoding="utf-8") as file:
                lines = [line.split() for line in file if ".safetensors" in line]
            ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
            for name, tensor in model.state_dict().items():
                if not any(start <= tensor.data_ptr() < stop for start, stop in ranges):
                    held[name] = tensor.nbytes
            return tabulate(model)

        with patch.object(converting, "_table", look):
            convert(self.source, self.output, Exl3Config(bits=1, effort="fast", head_bits=1))
        self.assertEqual(held, {})

    def test_what_belongs_to_a_model_comes_along(self):
        small_model(self.source)
        convert(self.source, self.output, small_config(head_bits=2), base_model="someone/small")
        self.assertEqual(digests(self.output).keys(), {*BESIDE, *SAVED, "README.md"})
        for name in BESIDE:
            self.assertEqual(Path(self.output, name).read_bytes(), Path(self.source, name).read_bytes())
        card = ModelCard.load(Path(self.output, "README.md"))
        expected = {"base_model": "someone/small", "base_model_relation": "quantized", "license": "mit", "bits": 1}
        expected |= {"library_name": "transformers", "tags": ["text", "exl3"]}
        self.assertEqual(card.data.to_dict(), expected)
        for text in ("# output", "(https://huggingface.co/someone/small)", "| head | 2 |", "# About it"):
            self.assertIn(text, card.text)

    @parameterized.expand(
        [
            ("none", None),
            ("without_metadata", "# Text"),
            ("malformed", "---\nlicense: [\n---\n# Text"),
            ("that_of_a_derived_model", "---\nbase_model: another/model\n---\n# Text"),
            ("that_of_a_measured_model", MEASURED),
        ]
    )
    def test_a_model_card_is_made_of(self, _, text):
        small_model(self.source)
        card = Path(self.source, "README.md")
        card.unlink()
        if text is not None:
            card.write_text(text, encoding="utf-8")
        convert(self.source, self.output, small_config())
        about = ModelCard.load(Path(self.output, "README.md")).data.to_dict()
        self.assertEqual(about, {"library_name": "transformers", "tags": ["exl3"], "bits": 1})

    def test_a_repo_is_downloaded_and_named(self):
        small_model(self.source)
        with patch.object(converting, "snapshot_download", return_value=self.source) as download:
            convert("someone/small", self.output, small_config(), revision="v1")
        self.assertEqual(download.call_args.args, ("someone/small",))
        self.assertEqual(download.call_args.kwargs["revision"], "v1")
        self.assertEqual(ModelCard.load(Path(self.output, "README.md")).data.base_model, "someone/small")

    def test_a_gguf_file_is_unpacked_once(self):
        """What unpacks it is upstream's; `test_exl3_real` has a real file."""
        small_model(self.source)
        file = Path(self.folder, "model.gguf")
        file.write_bytes(b"GGUF")
        unpacked = []

        def load(pretrained_model_name_or_path, gguf_file, **kwargs):
            self.assertEqual((pretrained_model_name_or_path, gguf_file), (file.parent, file.name))
            unpacked.append(LlamaForCausalLM.from_pretrained(self.source))
            return unpacked[-1]

        with (
            patch("transformers.models.auto.AutoModelForCausalLM.from_pretrained", load),
            patch("transformers.models.auto.AutoTokenizer.from_pretrained"),
        ):
            with stopping_after(2):
                self.assertRaises(KeyboardInterrupt, convert, file, self.output, small_config())
            work = os.path.join(self.output, conversion.UNFINISHED, "work")
            self.assertEqual({*os.listdir(work)}, {"float", "layers"})  # and no second copy
            code, out, errors = self.run_command(
                *f"-i {file} -o {self.output} -b 1 --effort fast --skip mlp -r".split()
            )
        self.assertEqual((code, errors), (0, ""))
        self.assertEqual(len(unpacked), 1)
        self.assertIn("0.0 MB became 0.3 MB", out)
        self.assertEqual(digests(self.output).keys(), {*SAVED, "README.md"})

    def test_a_class_is_found_as_files_spell_it(self):
        for name in ("Llama_ForCausalLM", "AlpacaForCausalLM"):
            LlamaConfig(architectures=[name]).save_pretrained(self.source)
            self.assertIs(converting._model_class(Path(self.source)), LlamaForCausalLM)
        LlamaConfig(architectures=["AlpacaForTokenClassification"]).save_pretrained(self.source)
        with self.assertRaisesRegex(ValueError, "names AlpacaForTokenClassification under `architectures`"):
            converting._model_class(Path(self.source))

    def test_sources_that_are_refused(self):
        plain, quantized = os.path.join(self.folder, "plain"), os.path.join(self.folder, "quantized")
        model = tiny_model("llama")[0]
        model.save_pretrained(plain)
        os.mkdir(quantized)
        save_quantized(model, quantized)
        unknown, bare, binary = (os.path.join(self.folder, name) for name in ("unknown", "bare", "binary"))
        for folder, content in ((unknown, ["NoSuchModel"]), (bare, None)):
            shutil.copytree(plain, folder)
            config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
            config["architectures"] = content
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        os.mkdir(binary)
        shutil.copy(os.path.join(plain, "config.json"), binary)
        for source, message in (
            (quantized, r"is quantized already \(exl3\)"),
            (unknown, "names NoSuchModel under `architectures`"),
            (bare, "names nothing under `architectures`"),
            (binary, "has no model.safetensors"),
            (os.path.join(self.folder, "model.gguf"), "is neither a folder, nor a .gguf file, nor a repo"),
        ):
            with self.assertRaisesRegex((ValueError, FileNotFoundError), message):
                convert(source, self.output, small_config())
            self.assertFalse(os.path.exists(self.output))
        with patch.object(converting, "snapshot_download", side_effect=LocalEntryNotFoundError("no network")):
            code, _, errors = self.run_command("-i", "someone/none", "-o", self.output)
        self.assertEqual(code, 1)
        self.assertRegex(errors, "^error: someone/none is neither .*: no network\n$")

    def run_command(self, *arguments):
        """What the command exits with, and what it writes to its two streams."""
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                code = command.main([*arguments])
            except SystemExit as error:
                code = error.code
        return code, out.getvalue(), errors.getvalue()

    def test_the_command_passes_on_what_it_is_told(self):
        with patch.object(command, "convert", return_value="a table") as call:
            words = "-i in -o out -b 3.5 -hb 6 -eb 5 --override *.down_proj=4 --override *.0.*=16 --skip visual --skip audio"
            words += " --codebook mul1 --effort fast -r --device cuda --shard-size 5GB --revision v1 --base-model a/b"
            self.assertEqual(self.run_command(*words.split())[:2], (0, "a table\n"))
        config = Exl3Config(
            bits=3.5,
            head_bits=6,
            embedding_bits=5,
            overrides={"*.down_proj": 4, "*.0.*": 16},
            modules_to_not_convert=["visual", "audio"],
            effort="fast",
        )
        self.assertEqual(call.call_args.args, ("in", "out", config, True))
        options = {"device": "cuda", "max_shard_size": "5GB", "revision": "v1", "base_model": "a/b"}
        self.assertEqual(call.call_args.kwargs, options)
        with patch.object(command, "convert", return_value="") as call:
            self.run_command("-i", "in", "-o", "out")
            self.assertEqual(call.call_args.args, ("in", "out", Exl3Config(), False))
            self.assertIs(type(call.call_args.args[2].to_dict()["bits"]), int)
            texts = [os.path.join(self.folder, name) for name in ("a.txt", "b.txt")]
            for file in texts:
                Path(file).write_text(f"The text ق of {file}", encoding="utf-8")
            words = ["--data", texts[0], "--data", texts[1], "--calibration-rows", "3", "--calibration-length", "9"]
            self.run_command("-i", "in", "-o", "out", *words)
            config = Exl3Config(
                dataset=[f"The text ق of {file}" for file in texts], calibration_rows=3, calibration_length=9
            )
            self.assertEqual(call.call_args.args[2], config)
            self.run_command("-i", "in", "-o", "out", "--self", "--calibration-seed", "7")
            self.assertEqual(call.call_args.args[2], Exl3Config(dataset="self", calibration_seed=7))

    @parameterized.expand(
        [
            ("bits", "-b 9", "`bits` of Exl3Config has to be from 1 to 8, got 9"),
            ("no_number", "-b four", "invalid number value: 'four'"),
            ("infinite", "-b inf", "`bits` of Exl3Config has to be from 1 to 8, got inf"),
            ("head", "-hb 3.3", "`head_bits` of Exl3Config has to be one of"),
            ("override", "--override 4", "'4' is not like '\\*.down_proj=4'"),
            ("effort", "--effort most", "`effort` of Exl3Config has to be `default` or `fast`, got 'most'"),
            ("both", "--self --data x", "--data: not allowed with argument --self"),
            ("no_text", "--data nowhere.txt", "No such file or directory: 'nowhere.txt'"),
            ("unknown", "--bpw 3", "unrecognized arguments: --bpw 3"),
        ]
    )
    def test_arguments_that_are_refused(self, _, words, message):
        code, _, errors = self.run_command("-i", "in", "-o", "out", *words.split())
        self.assertEqual(code, 2)
        self.assertRegex(errors, message)

    def test_data_that_is_no_text_is_named(self):
        file = Path(self.folder, "text.gz")
        file.write_bytes(b"\x1f\x8b")
        code, _, errors = self.run_command("-i", "in", "-o", "out", "--data", str(file))
        self.assertEqual(code, 2)
        self.assertIn(f"{file} is no text in UTF-8", errors)

    def test_the_command_tells_of_errors_and_interrupts_in_a_line(self):
        with patch.object(command, "convert", side_effect=SafetensorError("No space left on device")):
            code, _, errors = self.run_command("-i", "in", "-o", "out")
        self.assertEqual((code, errors), (1, "error: No space left on device\n"))
        small_model(self.source)
        words = ("-i", self.source, "-o", self.output, "-b", "1", "--effort", "fast")
        code, _, errors = self.run_command(*words, "--device", "cuda:77")
        self.assertEqual(code, 1)
        self.assertRegex(errors, "^error: there is no device 'cuda:77' to quantize on")
        with stopping_after(2):
            code, _, errors = self.run_command(*words)
        self.assertEqual((code, errors.splitlines()[-1]), (130, "stopped; the same command with --resume goes on"))
        code, _, errors = self.run_command(*words)
        self.assertEqual(code, 1)
        self.assertIn("--resume", errors)
        code, out, _ = self.run_command(*words, "--resume")
        self.assertEqual(code, 0)
        self.assertIn("all quantized layers", out)

    def test_a_table_tells_what_was_made(self):
        tiny_model("qwen3_moe")[0].save_pretrained(self.source)
        config = Exl3Config(bits=1, effort="fast", head_bits=2, overrides={"*.mlp.*": 1.5}, embedding_bits=1)
        title, *lines, end = convert(self.source, self.output, config).splitlines()
        self.assertEqual(title.split(), ["layers", "number", "bits", "weights", "MB", "bits", "per", "weight"])
        rows = {}
        for line in lines:
            name, number, *bits, weights, _, rate = re.fullmatch(
                r"(.+?) +(\d+) +(?:([\d.]+) +)?([\d,]+) +([\d.]+) +([\d.]+)", line
            ).groups()
            bits = [float(each) for each in bits if each]
            rows[name] = (int(number), *bits, int(weights.replace(",", "")), float(rate))
        tensors = read_tensors(self.output)
        experts = [name for name in tensors if "experts" in name and "gate_proj" in name]
        size = sum(tensors[name].nbytes for name in experts)
        self.assertEqual(
            rows["model.layers.*.mlp.experts.*.gate"], (4, 1.5, 4 * 64 * 128, round(8 * size / (4 * 64 * 128), 3))
        )
        self.assertEqual(rows["model.embed_tokens"][:3], (1, 1, 100 * 128))
        self.assertEqual(rows["lm_head"][:3], (1, 2, 100 * 128))
        quantized, plain, both = rows["all quantized layers"], rows["not quantized, float32"], rows["all"]
        self.assertEqual(both[:2], (quantized[0] + plain[0], quantized[1] + plain[1]))
        written = sum(tensor.nbytes for tensor in tensors.values())
        self.assertAlmostEqual(both[-1], 8 * written / both[1], delta=0.1)
        self.assertRegex(end, f"^0.7 MB became 0.1 MB, in \\d+ s: {self.output}$")


if __name__ == "__main__":
    unittest.main()
