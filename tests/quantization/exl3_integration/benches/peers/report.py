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
"""What `compare.py` measured, as Markdown tables and as plots."""

import json
from pathlib import Path


FAMILIES = {
    "EXL3": "o",
    "bitsandbytes": "s",
    "HQQ": "^",
    "quanto": "v",
    "torchao": "D",
    "GGUF": "P",
    "GPTQ": "X",
    "AWQ": "*",
}
TABLES = {
    "bible": ("bits", "error", "perplexity", "divergence", "agreement", "quantize_s", "disk_mb"),
    "gemma": ("bits", "error", "perplexity", "divergence", "agreement", "quantize_s", "peak_mib", "disk_mb", "load_s"),
    "minilm": ("bits", "error", "similarity", "least_similarity", "quantize_s", "disk_mb"),
    "llama": ("tokens_s", "tokens_s_over_bf16", "tokens_s_8_over_bf16", "prefill_s_over_bf16")
    + ("quantize_s", "load_s", "peak_mib", "disk_mb"),
}
MODELS = {"bible": "Llama of 12 M", "gemma": "Gemma 3 270M", "minilm": "all-MiniLM-L6-v2", "llama": "Llama of 1.1 B"}
PLOTS = {
    "perplexity": ("perplexity", ("bible", "gemma")),
    "divergence": ("KL divergence, nats a token", ("bible", "gemma")),
    "error": ("relative error of the weights", ("bible", "gemma", "minilm")),
}
SHOWN = 1000  # how many times the least value of a plot its greatest is, at most: what is beyond is noise


def _text(value):
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def tables(results: dict) -> str:
    lines = []
    for model, columns in TABLES.items():
        if model in results:
            machine = results[model]["machine"]
            versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            lines += [
                f"{machine['cpu']} ({machine['family']}, {machine['isa']}), {machine['threads']} threads; {versions}",
                "",
            ]
            lines += [f"| {model} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
            lines += [_row(row, columns) for row in results[model]["rows"]] + [""]
    return "\n".join(lines)


def _row(row, columns):
    if "failed" in row:
        return f"| {row['method']} | failed: {row['failed']} |"
    return f"| {row['method']} | {' | '.join(_text(row.get(column)) for column in columns)} |"


def plots(results: dict, folder: Path):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "exl3",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    rows = {name: some["rows"] for name, some in results.items()}
    for measure, (label, models) in PLOTS.items():
        panels = {name: rows[name] for name in models if name in rows}
        if panels:
            _plot(panels, measure, label, folder / f"{measure}.svg")
    if "llama" in rows:
        bits = {row["method"]: row.get("bits") for name in ("gemma", "bible") for row in rows.get(name, [])}
        some = [row | {"bits": bits.get(row["method"])} for row in rows["llama"]]
        _plot({"llama": some}, "tokens_s_over_bf16", "tokens a second over bf16", folder / "speed.svg")


def _plot(panels, measure, label, file):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.2 + 3.8 * len(panels), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], panels.items()):
        quantized = [row for row in rows if row.get(measure) and 0 < (row.get("bits") or 0) < 10]
        for family, marker in FAMILIES.items():
            some = sorted(
                (row for row in quantized if row["method"].split()[0] == family), key=lambda row: row["bits"]
            )
            points = [[row[key] for row in some] for key in ("bits", measure)]
            style = {"linewidth": 1.5, "zorder": 3} if family == "EXL3" else {"linewidth": 0}
            label_of = f"{family}, with data" if family in ("GPTQ", "AWQ") else family
            axis.plot(*points, marker=marker, markersize=5, label=label_of, **style)
        values = [row[measure] for row in quantized] or [1.0]
        if max(values) > 5 * min(values):
            axis.set_yscale("log")
        if max(values) > SHOWN * min(values):
            axis.set_ylim(top=SHOWN * min(values))
        float_value = next((row.get(measure) for row in rows if row["method"] == "bf16"), None)
        if float_value and measure in ("perplexity", "tokens_s_over_bf16"):
            axis.axhline(float_value, color="black", linewidth=0.8, linestyle="--", label="bf16")
        axis.set(title=MODELS[name], xlabel="bits per quantized weight")
    axes[0][0].set_ylabel(label)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def write(folder: Path):
    """Print the tables of all `<model>.json` in `folder`, and write them and the plots there."""
    results = {name: folder / f"{name}.json" for name in TABLES}
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in results.items() if file.is_file()}
    text = tables(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(text)
    plots(results, folder)
