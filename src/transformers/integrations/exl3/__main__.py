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
"""The command that converts a model to EXL3: `python -m transformers.integrations.exl3 --help`."""

import argparse
import sys
import traceback
from pathlib import Path

from safetensors import SafetensorError

from ...utils import logging
from ...utils.quantization_config import Exl3Config
from .convert import convert


DESCRIPTION = """
Convert a float model to an EXL3 checkpoint, which Transformers and exllamav3 load. Memory holds a few layers at a time, and not
the model; finished layers are kept, and --resume goes on with them. The disk has to hold the result, and meanwhile its quantized
layers once more.
"""


def number(text: str) -> int | float:
    """A number of bits: whole numbers as such, so that they are written as such."""
    value = float(text)
    return int(value) if value.is_integer() else value


def rate(text: str) -> tuple[str, int | float]:
    pattern, equals, bits = text.rpartition("=")
    if not pattern or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not like '*.down_proj=4'")
    return pattern, number(bits)


def text_of(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m transformers.integrations.exl3", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "-i",
        "--input",
        required=True,
        metavar="IN",
        help="a folder, a repo of the Hub, or a .gguf file, which is unpacked first",
    )
    add("-o", "--output", required=True, metavar="OUT", help="the folder for the result: new, empty, or unfinished")
    add("-b", "--bits", type=number, default=4, help="average bits per weight, 1 to 8, fractions too (default: 4)")
    add("-hb", "--head-bits", type=number, help="bits of the output embeddings (default: not quantized)")
    add("-eb", "--embedding-bits", type=number, help="bits of the input embeddings (default: not quantized)")
    add(
        "--override",
        type=rate,
        action="append",
        metavar="PATTERN=BITS",
        help="a rate for some layers, 16 for none; repeatable",
    )
    add("--skip", action="append", metavar="NAME", help="modules to leave as they are; repeatable")
    add("--codebook", default="mul1", help="mul1, mcg or 3inst (default: mul1)")
    add("--effort", default="default", help="default, or fast, in about half the time with more error")
    data = parser.add_mutually_exclusive_group()
    data.add_argument(
        "--self",
        action="store_true",
        help="quantize with text that the model writes itself; like --data, this needs memory for the whole float model",
    )
    data.add_argument("--data", action="append", metavar="FILE", help="quantize with the text in a file; repeatable")
    add("--calibration-rows", type=int, default=16, help="windows of text to read (default: 16)")
    add("--calibration-length", type=int, default=512, help="tokens of a window (default: 512)")
    add("--calibration-seed", type=int, default=0, help="of the text that the model writes (default: 0)")
    add("-r", "--resume", action="store_true", help="go on with an unfinished conversion, if OUT has one")
    add("--device", help="where to quantize, such as cuda (default: the CPU)")
    add("--shard-size", default="50GB", help="the largest size of a file of weights (default: 50GB)")
    add("--revision", help="a branch, a tag or a commit of a repo")
    add(
        "--base-model",
        metavar="REPO",
        help="the repo that the model card names as the source (default: IN, if that is a repo)",
    )
    add("-v", "--verbose", action="store_true", help="log more, and say where an error comes from")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """
    Args:
        arguments (`list[str]`, *optional*): By default those of the command line.

    Returns:
        `int`: What the process is to exit with.
    """
    command = parser()
    args = command.parse_args(arguments)
    try:
        texts = [text_of(file) for file in args.data or ()]
        config = Exl3Config(
            bits=args.bits,
            head_bits=args.head_bits,
            embedding_bits=args.embedding_bits,
            codebook=args.codebook,
            modules_to_not_convert=args.skip,
            overrides=dict(args.override) if args.override else None,
            dataset="self" if args.self else texts or None,
            calibration_rows=args.calibration_rows,
            calibration_length=args.calibration_length,
            calibration_seed=args.calibration_seed,
            effort=args.effort,
        )
    except (OSError, TypeError, ValueError) as error:
        command.error(str(error))
    if args.verbose:
        logging.set_verbosity_info()
    options = {"device": args.device, "max_shard_size": args.shard_size, "revision": args.revision}
    try:
        print(convert(args.input, args.output, config, args.resume, base_model=args.base_model, **options))
    except KeyboardInterrupt:
        print("\nstopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:  # the last for a full disk
        if args.verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
