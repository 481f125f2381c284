"""Quality of conversions without training: perplexity of a base and of several conversions on the same tokens.

    python -m benchmarks.conversion MODEL.gguf --data heldout.jsonl --calibration train.jsonl

Writes `benchmarks/results/conversion.json`, with the device named.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from hyconvert.comparison import compare
from hyconvert.conversion import Calibration, convert
from hyconvert.evaluate import device_name, pick_device

FULL_LAYERS = (0, 1, 2, 7, 16, 18, 20)


def main() -> None:
    """Convert, measure, print a row per conversion and save them all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="base: Hub id, folder or .gguf")
    parser.add_argument("--data", nargs="+", default=["stdlib-docstrings"], help="texts to measure on")
    parser.add_argument(
        "--calibration", nargs="*", default=[], help="texts to align on, beside the built-in one"
    )
    parser.add_argument(
        "--fit-tokens", type=int, nargs="+", default=[16_384, 65_536], help="tokens to align on"
    )
    parser.add_argument("--length", type=int, nargs="+", default=[2048], help="tokens per sequence")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens to measure on")
    parser.add_argument("--out", default="benchmarks/results/conversion.json")
    options = parser.parse_args()
    device = pick_device("auto")
    card = device_name(device)
    rows = []
    for length in options.length:
        settings = [("none", None)]
        settings += [
            (source or "pydoc", n) for source in [None, *options.calibration] for n in (16_384, 65_536)
        ]
        for source, tokens in settings:
            with tempfile.TemporaryDirectory() as folder:
                out, began = Path(folder, "out"), time.monotonic()
                text = None if source == "pydoc" else source
                convert(
                    options.model,
                    out,
                    full_layers=FULL_LAYERS,
                    topk=8,
                    align_layers=tokens is not None,
                    calibration=Calibration(text, tokens or 0, length, retrieval=0.0),
                )
                seconds = time.monotonic() - began
                for data in options.data:
                    result = compare(str(out), data=data, tokens=options.tokens, sequence_length=length)
                    name = Path(source).name
                    row = {
                        "calibration": name,
                        "calibration_tokens": tokens,
                        "seconds": round(seconds, 1),
                        "device": card,
                    }
                    rows.append(row | result.to_dict() | {"data": Path(data).name})
                    Path(options.out).write_text(
                        json.dumps(rows, indent=1) + "\n"
                    )  # so far, should it be stopped
                    print(
                        f"{length} {name:28} {tokens or 0:>7,} {Path(data).name:24} base {result.base_perplexity:7.2f} "
                        f"converted {result.converted_perplexity:9.2f} x{result.ratio:.3f} ({seconds:.0f} s)",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
