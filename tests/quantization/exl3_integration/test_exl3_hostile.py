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
"""Checkpoints that are damaged or made to do harm: a clear error, or a model with the outputs of the undamaged one."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path

from parameterized import parameterized

from transformers import AutoModelForCausalLM
from transformers.testing_utils import require_accelerate, require_torch, slow
from transformers.utils import is_torch_available


if is_torch_available():
    from .mutants import KINDS, Loader

LLAMA = Path(__file__).parent / "fixtures" / "tiny-llama-exl3"

# A process that ends where one of the events happens: on importing, and on loading, running and saving the checkpoint in argv[1].
WATCHED = """
import os, sys

network = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
forbidden = set(network)

def hook(event, arguments):
    if event in forbidden:
        os.write(2, f"{event} {arguments}".encode())
        os._exit(5)

sys.addaudithook(hook)
from transformers import AutoModelForCausalLM, Exl3Config
from transformers.integrations.exl3 import allocation, checkpoint, encoder, loading, ops, parallel, placement, planning, saving
from transformers.quantizers import quantizer_exl3
import torch

forbidden |= {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model(torch.tensor([[1, 2, 3]]))
model.save_pretrained(sys.argv[2])
AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=Exl3Config(dequantize=True))
"""

# What errors of this repository name, and what they say is to be done.
NAMES = r"/\w+|\w\.\w|lm_head|`\w+`"
REMEDY = r"convert it again|pass their folder|has to be|load it without"
OWN_ERRORS = ("Exl3CheckpointError", "ValueError", "TypeError")


@require_torch
@require_accelerate
@unittest.skipUnless(sys.platform == "linux", "limits the memory of a process")
class Exl3DamagedCheckpointsTest(unittest.TestCase):
    """
    Mutants of checkpoints of several layouts, loaded by a process with little memory.

    Errors that Transformers, safetensors or Python raise before EXL3 is asked are taken as they are, but for those of
    memory that ran out.
    """

    def check(self, seeds):
        outcomes = Counter()
        with Loader() as loader:
            for seed in seeds:
                result = loader.load(seed)
                with self.subTest(seed=seed, kind=result["kind"]):
                    outcomes[result["kind"], self.outcome(result)] += 1
        self.assertEqual({kind for kind, _ in outcomes}, set(KINDS))
        print(f"\n{'mutants':20}{'same outputs':>14}{'own error':>14}{'other error':>14}")
        for kind in sorted(KINDS):
            counts = (outcomes[kind, outcome] for outcome in ("same outputs", "own error", "other error"))
            print(f"{kind:20}" + "".join(f"{count:14}" for count in counts))

    def outcome(self, result):
        self.assertIn(result["outcome"], ("same outputs", "error"), result)
        if result["outcome"] == "same outputs":
            return "same outputs"
        if not result["ours"]:
            self.assertNotIn("MemoryError", result["bases"], result)
            self.assertNotRegex(result["message"], "not enough memory|can't allocate", result)
            return "other error"
        self.assertIn(result["error"], OWN_ERRORS, result)
        self.assertRegex(result["message"], NAMES, result)
        self.assertRegex(result["message"], REMEDY, result)
        return "own error"

    def test_a_few_of_every_kind(self):
        self.check(range(3 * len(KINDS)))

    @slow
    def test_two_thousand(self):
        self.check(range(2000))


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@require_torch
@require_accelerate
class Exl3HarmfulCheckpointsTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.harm = self.folder / "harm"
        for name in ("config.json", "model.safetensors"):
            shutil.copy(LLAMA / name, self.folder)

    def test_a_pickle_does_harm_where_it_is_loaded(self):
        pickle.loads(pickle.dumps(Bomb(self.harm))).close()
        self.assertTrue(self.harm.exists())

    @parameterized.expand(
        ["pytorch_model.bin", "training_args.bin", "model.pt", "quantization_config.json", "model.safetensors"]
    )
    def test_pickles_are_not_loaded(self, name):
        (self.folder / name).write_bytes(pickle.dumps(Bomb(self.harm)))
        if name == "model.safetensors":
            self.assertRaisesRegex(
                ValueError, "no whole safetensors file", AutoModelForCausalLM.from_pretrained, self.folder
            )
        else:
            AutoModelForCausalLM.from_pretrained(self.folder)
        self.assertFalse(self.harm.exists())

    @parameterized.expand([({},), ({"use_safetensors": False},), ({"weights_only": False},)])
    def test_pickles_are_not_loaded_instead(self, kwargs):
        (self.folder / "model.safetensors").unlink()
        (self.folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(self.harm)))
        message = "EXL3 checkpoints are safetensors files, got .*pytorch_model.bin"
        self.assertRaisesRegex(ValueError, message, AutoModelForCausalLM.from_pretrained, self.folder, **kwargs)
        self.assertFalse(self.harm.exists())

    @parameterized.expand(["llama", "evil"])
    def test_code_beside_the_checkpoint_does_not_run(self, model_type):
        code = f"open({str(self.harm)!r}, 'w')"
        (self.folder / "modeling_evil.py").write_text(code, encoding="utf-8")
        config = json.loads((LLAMA / "config.json").read_text(encoding="utf-8"))
        names = {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilModel"}
        config |= {"model_type": model_type, "auto_map": names}
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if model_type == "llama":
            AutoModelForCausalLM.from_pretrained(self.folder)
        else:
            with self.assertRaisesRegex(ValueError, "trust_remote_code=True"):
                AutoModelForCausalLM.from_pretrained(self.folder, trust_remote_code=False)
        self.assertFalse(self.harm.exists())

    def test_no_network_and_no_pickle(self):
        command = [sys.executable, "-c", WATCHED, str(self.folder), str(self.folder / "saved")]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
    unittest.main()
