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
"""What goes wrong around a model: saves that are killed or run out of disk, interrupts, little memory, several processes."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

from parameterized import parameterized

from transformers import AutoModelForCausalLM, Exl3Config, LlamaConfig, LlamaForCausalLM
from transformers.testing_utils import require_accelerate, require_torch, slow
from transformers.utils import is_torch_available


if is_torch_available():
    import torch

    from transformers.integrations.exl3 import encoding

    from .processes import forked, in_a_process, kill_at
    from .synthetic import SyntheticCheckpoint, read_tensors, save_quantized
    from .tiny_models import tiny_inputs, tiny_model


SHARD = 60_000  # bytes, of which a checkpoint here has several times as many
SHARDS = 4  # into which it is divided then


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs)


@torch.no_grad()
def outputs(model):
    return model(**tiny_inputs("llama")).logits


def checkpoint_of(bits):
    """A checkpoint of the same model as all others here, quantized at `bits`."""
    checkpoint = SyntheticCheckpoint(tiny_model("llama")[0])
    checkpoint.quantize_all(bits=bits)
    return checkpoint


def write_old(kind, folder):
    """
    What stands in the folder that is saved to: returns what it loads as, None for nothing.

    Args:
        kind (`str` or `int`): `"float"`, `"nothing"`, or the number of files of an EXL3 checkpoint's weights.
    """
    if kind == "float":
        tiny_model("llama")[0].save_pretrained(folder)
    elif kind != "nothing":
        checkpoint = checkpoint_of(2)
        checkpoint.save(folder, checkpoint.tensors, shards=kind)
    return outputs(load(folder)) if kind != "nothing" else None


def save_and_be_killed(cases):
    """
    Save over a checkpoint, killed at every moment in turn: the old one loads, or the new one, and none only where none was or
    where it was of floats.

    Args:
        cases (`list[tuple]`): What stands there, and the size of the shards that are saved.
    """
    with tempfile.TemporaryDirectory() as source:
        checkpoint = checkpoint_of(3)
        checkpoint.save(source, checkpoint.tensors)
        model = load(source)
        for kind, shard_size in cases:
            left, moments = left_by_kills(model, kind, shard_size)
            print(f"\n{kind} to {shard_size}: killed at {moments} moments, which leaves {', '.join(sorted(left))}")
            # A new config has float weights beside it for a moment.
            expected = {"nothing": {"none", "new"}, "float": {"old", "none", "new"}}.get(kind, {"old", "new"})
            assert left == expected, left


def have_no_links():
    """As on a file system without them, from here on."""

    def link(*_):
        raise OSError("no links")

    os.link = link


def left_by_kills(model, kind, shard_size):
    """What loads after each kill, as a set of `old`, `new` and `none`, and the number of kills."""
    after, left, known = outputs(model), set(), {}

    def loads_as(folder):
        """`old`, `new` or `none`. What has the same files is loaded once."""
        files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        content = tuple((str(path.relative_to(folder)), path.read_bytes()) for path in files)
        if content not in known:
            try:
                found = outputs(load(folder))
                known[content] = "new" if torch.equal(found, after) else "old"
                assert known[content] == "new" or torch.equal(found, before), "a mixture"
            except (OSError, ValueError):
                known[content] = "none"
        return known[content]

    with tempfile.TemporaryDirectory() as old:
        before = write_old(kind, old)
        for moment in range(1000):
            with tempfile.TemporaryDirectory() as parent:
                folder = os.path.join(parent, "model")
                shutil.copytree(old, folder)

                def save():
                    kill_at(moment, folder)
                    model.save_pretrained(folder, max_shard_size=shard_size)

                codes = []
                for _ in range(2):  # the second save finds what the first one left
                    codes.append(forked(save))
                    assert codes[-1] in (0, 9), codes
                    left.add(loads_as(folder))
                model.save_pretrained(folder, max_shard_size=shard_size)  # what was begun before is not in the way
                assert loads_as(folder) == "new"
                assert not [name for name in os.listdir(folder) if name.startswith(".") or "replaced" in name]
                if codes[0] == 0:
                    return left, moment
    raise AssertionError("never done")


def save_with_a_full_disk():
    """Files may not grow beyond a size: an error, or where that cannot be caught the end, and the old checkpoint is whole."""
    with tempfile.TemporaryDirectory() as folder:
        before = write_old(1, folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        model = load(folder)
        for size in (1000, 100_000):

            def save(action):
                signal.signal(signal.SIGXFSZ, action)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
                try:
                    model.save_pretrained(folder)
                except Exception as error:
                    assert "too large" in str(error), error
                    assert not os.path.exists(os.path.join(folder, ".unfinished"))
                else:
                    raise AssertionError(f"everything fits into {size} bytes")

            assert forked(lambda: save(signal.SIG_IGN)) == 0, size
            assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == files
            assert forked(lambda: save(signal.SIG_DFL)) == -signal.SIGXFSZ
            torch.testing.assert_close(outputs(load(folder)), before, rtol=0, atol=0)


def load_with_little_memory(folder):
    """Limits of memory from none left to enough: an error, and the same process loads the model when there is more."""
    for kwargs in ({}, {"quantization_config": Exl3Config(dequantize=True)}):
        load(folder, **kwargs)  # what is loaded once, like libraries
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        failed = 0
        for megabytes in (0, 8, 16, 32, 64, 1024):

            def load_within():
                resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, resource.RLIM_INFINITY))
                try:
                    load(folder, **kwargs)
                except Exception as error:
                    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                    assert isinstance(error, MemoryError) or re.search("memory|new thread", str(error)), repr(error)
                    load(folder, **kwargs)
                    os._exit(7)

            code = forked(load_within)
            assert code in (0, 7), (megabytes, code)
            failed += code == 7
        print(f"\nloading{' dequantized' if kwargs else ''}: out of memory at {failed} of 6 limits")
        assert 0 < failed < 6, failed


def quantize(source, target, compiles):
    """Import, compile and quantize, as a user's process does."""
    model = load(source, quantization_config=Exl3Config(bits=2))
    ids = tiny_inputs("llama")["input_ids"]
    if compiles:
        expected = model(ids).logits
        logits = torch.compile(model.forward, fullgraph=True)(ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(target)


@require_torch
@require_accelerate
@unittest.skipUnless(sys.platform == "linux", "forks, and limits files and memory")
class Exl3FaultsTest(unittest.TestCase):
    def test_a_save_that_is_killed_or_has_no_room_leaves_what_was_there(self):
        in_a_process(self, (save_and_be_killed, [(1, "1GB")]), (save_with_a_full_disk,))

    def test_a_save_of_several_files_that_is_killed_leaves_what_was_there(self):
        cases = [(1, SHARD), (5, "1GB"), (5, SHARD), (SHARDS, SHARD)]
        in_a_process(self, (save_and_be_killed, cases), (have_no_links,), (save_and_be_killed, cases[-1:]))

    @slow
    def test_a_save_over_another_kind_of_model_that_is_killed_leaves_no_mixture(self):
        cases = [("float", "1GB"), ("float", SHARD), ("nothing", "1GB"), ("nothing", SHARD)]
        in_a_process(self, (save_and_be_killed, cases))

    def test_a_save_replaces_the_weights_of_any_form(self):
        checkpoint = checkpoint_of(2)
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as source:
            checkpoint.save(source, checkpoint.tensors)
            Path(folder, "tokenizer.json").write_text("{}", encoding="utf-8")
            model = load(source)
            for size in ("1GB", SHARD, SHARD, 2 * SHARD, "1GB", SHARD):
                model.save_pretrained(folder, max_shard_size=size)
                self.assertEqual(read_tensors(folder).keys(), checkpoint.tensors.keys())
                names = set(os.listdir(folder))
                weights = {name for name in names if "safetensors" in name}
                self.assertEqual(weights == {"model.safetensors"}, size == "1GB")
                self.assertEqual("model.safetensors.index.json" in weights, size != "1GB")
                self.assertEqual(len(weights) == 1 + SHARDS, size == SHARD)
                others = {"config.json", "generation_config.json", "quantization_config.json", "tokenizer.json"}
                self.assertEqual(names - weights, others)
                torch.testing.assert_close(outputs(load(folder)), outputs(model), rtol=0, atol=0)

    def test_a_model_is_saved_over_the_files_that_it_was_loaded_from(self):
        checkpoint = checkpoint_of(2)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors, shards=3)
            model = load(folder)
            expected = outputs(model)
            for size in ("1GB", SHARD, "1GB"):
                model.save_pretrained(folder, max_shard_size=size)
                torch.testing.assert_close(outputs(model), expected, rtol=0, atol=0)
                torch.testing.assert_close(outputs(load(folder)), expected, rtol=0, atol=0)

    def test_an_interrupt_while_saving_leaves_what_was_there(self):
        checkpoint = checkpoint_of(2)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors)
            model = load(folder)
            names = os.listdir(folder)
            with patch("transformers.modeling_utils.safe_save_file", side_effect=KeyboardInterrupt):
                self.assertRaises(KeyboardInterrupt, model.save_pretrained, folder)
            self.assertEqual(sorted(os.listdir(folder)), sorted(names))

    def test_interrupted_quantizing_is_begun_again(self):
        calls, encode = 0, encoding.encode

        def encode_until_interrupted(*args):
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            return encode(*args)

        with tempfile.TemporaryDirectory() as folder:
            tiny_model("llama")[0].save_pretrained(folder)
            config = Exl3Config(bits=1, effort="fast", modules_to_not_convert=["mlp", "lm_head"])
            expected = load(folder, quantization_config=config).state_dict()
            with patch.object(encoding, "encode", encode_until_interrupted):
                self.assertRaises(KeyboardInterrupt, load, folder, quantization_config=config)
            self.assertEqual(calls, 5)
            found = load(folder, quantization_config=config).state_dict()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

    @parameterized.expand(["dangling", "folder"])
    def test_a_shard_that_cannot_be_read(self, what):
        checkpoint = checkpoint_of(2)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(folder, checkpoint.tensors, shards=3)
            shard = Path(folder, "model-00002-of-00003.safetensors")
            shard.unlink()
            if what == "dangling":
                shard.symlink_to("nowhere")
            else:
                shard.mkdir()
            self.assertRaisesRegex(ValueError, f"{shard.name}: no whole safetensors file(.|\n)*again", load, folder)

    @slow
    def test_memory_that_runs_out_while_loading(self):
        config = LlamaConfig(
            hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8, vocab_size=512
        )
        with tempfile.TemporaryDirectory() as folder:
            save_quantized(LlamaForCausalLM(config), folder)
            in_a_process(self, (load_with_little_memory, folder))

    @slow
    def test_two_processes_import_compile_and_quantize_at_once(self):
        with tempfile.TemporaryDirectory() as folder:
            tiny_model("llama")[0].save_pretrained(folder)
            caches = {name: os.path.join(folder, name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
            targets = [os.path.join(folder, str(index)) for index in range(3)]
            with patch.dict(os.environ, caches):
                context = multiprocessing.get_context("spawn")
                processes = [context.Process(target=quantize, args=(folder, target, True)) for target in targets[:2]]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join(300)
                    self.assertEqual(process.exitcode, 0)
            quantize(folder, targets[2], False)
            files = {"model.safetensors", "config.json", "generation_config.json", "quantization_config.json"}
            for target in targets:
                self.assertEqual(set(os.listdir(target)), files)
                for file in files:
                    self.assertEqual(Path(target, file).read_bytes(), Path(targets[2], file).read_bytes())


if __name__ == "__main__":
    unittest.main()
