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
"""All architectures that exllamav3 1.6.5 and Transformers both have: rows, and why others are in none."""

import re

from . import texts, towers, variants


ROWS = texts.ROWS + towers.ROWS + variants.ROWS

# Architectures that both have and that are in no row, with the reason.
NOT_HELD = {
    "Gemma3ForCausalLM": "exllamav3 reads it only from files of the model for images",
    "Gemma4AssistantForCausalLM": "a draft model for speculative decoding, which exllamav3 does not convert",
    "GptOssForCausalLM": "exllamav3 converts it from MXFP4 alone; the tests have a checkpoint of it",
    "HCXVisionV2ForCausalLM": "no file is read by both: `mm_projector` of exllamav3 is `vision_projector` of Transformers",
    "MuseGlimmerAssistantModel": "a draft model for speculative decoding, which exllamav3 does not convert",
}

# Those that Transformers does not have, under whatever name.
NOT_HERE = {
    "DFlash2DraftModel",
    "DFlashDraftModel",
    "DFlashLagunaForCausalLM",
    "DeciLMForCausalLM",
    "MiMoForCausalLM",
    "MiMoV2ForCausalLM",
    "Spark2_5ForCausalLM",
    "Step3p5ForCausalLM",
}


def in_short() -> dict[str, list[str]]:
    """Names as the documentation has them: of what holds, is refused, is not read by exllamav3 when saved here, and is in no row."""
    found = {
        "holds": [row for row in ROWS if not row.refused],
        "refused": [row for row in ROWS if row.refused],
        "unreadable": [row for row in ROWS if row.unreadable],
    }
    names = {kind: {_stem(row.architecture) for row in rows} for kind, rows in found.items()}
    names["not held"] = {*NOT_HELD}
    return {kind: sorted(stems, key=str.lower) for kind, stems in names.items()}


def _stem(architecture: str) -> str:
    return re.sub(r"(_?ForCausalLM|ForConditionalGeneration|_Reasoning_V3)$", "", architecture)
