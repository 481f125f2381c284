"""Healing on two GPUs beside one: loss curves, speed, a process that dies, and a model of eight billion's layers.

    python -m benchmarks.several_gpus CONVERTED --data TEXT                    # all parts
    python -m benchmarks.several_gpus CONVERTED --data TEXT --only one kill    # some of them
    python -m benchmarks.several_gpus --tiny        # a rehearsal on a CPU, where Accelerate runs DDP for FSDP2

`one`, `ddp` and `fsdp` heal the same model by the same recipe on one GPU, by torchrun, and by `accelerate launch` under
FSDP2. `kill` kills one process under FSDP2 behind a saved state, and goes on from that state on two GPUs and on one.
`qwen` heals layers of Qwen3-8B's shape with random weights under FSDP2. Every run is the command that a user would
give, in processes of its own and with a time limit; a part's row is saved as soon as it is done, rows of other parts
are kept, and a part that fails leaves the others alone.

One GPU works on pieces of the size that each of two has. Of other pieces gradients are rounded otherwise, and a step
whose gradient is clipped may then go elsewhere. In bfloat16 losses are held to 1 %; in float32
`tests/heal/test_processes.py` holds them to 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.healing import steady

ROOT = Path(__file__).parent.parent
PARTS = ("one", "ddp", "fsdp", "kill", "qwen")
TOLERANCE = 0.01
PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
ACCELERATE = [
    *PYTHON, "accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2",
    "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "-m",
]  # fmt: skip
ALL_LAYERS = 20
"""Up to so many layers of Qwen3-8B are trained as a whole; of more, only attention and what conversion added."""


@dataclass
class Ended:
    """How a run ended."""

    code: int | None
    seconds: float
    peak_gib: list[float]
    log: Path

    def tail(self, count: int = 1500) -> str:
        """The end of what it printed before the launcher told of its end."""
        text = self.log.read_text(errors="replace")
        return (text.split("torch/distributed/elastic")[0].strip() or text)[-count:]


class Failed(Exception):
    """A part did not do what it should."""


class Memory:
    """Memory in use on every GPU, sampled from nvidia-smi; the largest while the block runs."""

    def __enter__(self) -> Memory:
        self.peak: list[float] = []
        self._process = None
        if shutil.which("nvidia-smi"):
            query = [
                "nvidia-smi",
                "--query-gpu=index,memory.used",
                "--format=csv,noheader,nounits",
                "-lms",
                "250",
            ]
            self._process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                index, used = (int(part) for part in line.split(","))
            except ValueError:
                continue
            self.peak += [0.0] * (index + 1 - len(self.peak))
            self.peak[index] = max(self.peak[index], round(used / 1024, 2))

    def __exit__(self, *_: Any) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Lab:
    """Where runs happen, and the rows of what they gave.

    Attributes:
        options: of the command line.
        folder: for models, states and logs.
        about: device and versions.
    """

    options: Any
    folder: Path
    about: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.options.out.is_file():
            old = json.loads(self.options.out.read_text())
            if old.get("device") == self.about["device"]:
                self.rows = old["rows"]

    def save(self, part: str, row: dict[str, Any]) -> None:
        """Keep a row, on disk at once, and print it without its curve."""
        self.rows[part] = row
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        aside = self.options.out.with_suffix(".partial")
        aside.write_text(json.dumps(self.about | {"rows": self.rows}, indent=1) + "\n")
        aside.replace(self.options.out)
        print(f"{part}: {json.dumps({k: v for k, v in row.items() if k != 'curve'})}", flush=True)

    def recipe(self, name: str, **heal: Any) -> Path:
        """A recipe file."""
        path = self.folder / f"{name}.json"  # JSON is YAML
        path.write_text(json.dumps({"heal": heal}, indent=1))
        return path

    def smollm2(self) -> Path:
        """The recipe of all parts but `qwen`."""
        o = self.options
        return self.recipe(
            "recipe",
            data={"source": str(o.data), "column": o.column},
            distill={
                "tokens": o.steps * o.batch,
                "sequence_length": o.length,
                "batch_tokens": o.batch,
                "lr": o.lr,
            },
            precision=o.precision,
            # One GPU adds up the gradients of the very pieces that two work on side by side.
            micro_tokens=max(o.length, min(32_768, o.batch // 2)),
            log_every=o.log_every,
            eval_every=o.steps,
            save_every=-(-2 * o.steps // 3),
            heldout_tokens=o.heldout,
            **({"teacher": o.teacher} if o.teacher else {}),
        )

    def command(self, launcher: list[str], converted: Path, out: Path, recipe: Path) -> list[str]:
        """`hyconvert heal`, started by a launcher."""
        device = ["--device", "cpu"] if self.options.device == "cpu" else []
        return [
            *launcher, "hyconvert", "heal", str(converted), "-o", str(out), "--recipe", str(recipe), *device, "--json",
        ]  # fmt: skip

    def environment(self, gpus: int) -> dict[str, str]:
        """What is set already, with this checkout's packages, and one GPU if one is wanted."""
        path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        # The same number of threads under every launcher.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        environment.setdefault("OMP_NUM_THREADS", "1" if self.options.device == "cpu" else "8")
        if gpus == 1 and self.options.device != "cpu":
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
        return environment

    def run(
        self, name: str, command: list[str], gpus: int, meanwhile: Callable[[Any], None] | None = None
    ) -> Ended:
        """Run a command to its end or its time limit; nothing of it is left afterwards.

        Args:
            name: of its log.
            command: to run.
            gpus: that it may see; 2 is all.
            meanwhile: called with the process.
        """
        log = self.folder / f"{name}.log"
        print(f"$ {shlex.join(command)}", flush=True)
        began = time.monotonic()
        with log.open("w") as file, Memory() as memory:
            process = subprocess.Popen(
                command, env=self.environment(gpus), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip
            try:
                if meanwhile is not None:
                    meanwhile(process)
                code = process.wait(max(1.0, self.options.limit - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                seconds = time.monotonic() - began
                end(process)
        return Ended(code, round(seconds, 1), memory.peak, log)

    def healed(
        self, name: str, launcher: list[str], gpus: int, converted: Path, recipe: Path
    ) -> dict[str, Any]:
        """Heal to the end; the row of it.

        Raises:
            Failed: it did not come to its end.
        """
        out = self.folder / name
        command = self.command(launcher, converted, out, recipe)
        ended = self.run(name, command, gpus)
        if ended.code != 0:
            what = "ran past its limit" if ended.code is None else f"exit code {ended.code}"
            raise Failed(f"{name}: {what}: {ended.tail()}")
        report = json.loads((out / "heal.json").read_text())
        shutil.rmtree(out)
        stage = report["recipe"]["distill"]
        return {
            "command": shlex.join(["python", *command[1:]]).replace(str(self.folder), "WORK"),
            "processes": report["processes"],
            "settings": {
                key: stage[key] for key in ("tokens", "sequence_length", "batch_tokens", "lr")
            } | {key: report["recipe"][key] for key in ("precision", "micro_tokens")},
            "steps": report["curve"][-1]["step"],
            "tokens_per_second": steady(report["curve"]),
            "wall_seconds": ended.seconds,
            "peak_gib": ended.peak_gib,
            "heldout": [{k: row[k] for k in ("step", "kl", "perplexity")} for row in report["heldout"]],
            "curve": report["curve"],
        }  # fmt: skip

    def beside(self, part: str, row: dict[str, Any]) -> dict[str, Any]:
        """How a row's curve differs from that of a part, and its speed per GPU against it."""
        other = self.rows.get(part, {})
        if "curve" not in other or other["settings"] != row["settings"]:
            return {}
        found: dict[str, Any] = difference(row["curve"], other["curve"])
        if row["processes"] > other["processes"]:
            rate = other["tokens_per_second"] * row["processes"] / other["processes"]
            found["scaling_efficiency"] = round(row["tokens_per_second"] / rate, 3)
        return {f"beside_{part}": found}


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a run: the launcher, and the workers, which have sessions of their own."""
    if process.poll() is not None:
        return
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes under one, nearest first."""
    found, new = [], [pid]
    while new:
        at = new.pop(0)
        try:
            text = "".join(path.read_text() for path in Path(f"/proc/{at}/task").glob("*/children"))
        except OSError:
            continue
        children = [int(word) for word in text.split()]
        found += children
        new += children
    return found


def worker(pid: int, rank: int) -> int | None:
    """The process of a rank under a launcher."""
    for child in descendants(pid):
        try:
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return child
        except OSError:
            continue
    return None


def difference(curve: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Largest relative difference of two loss curves over the steps that both logged, and where."""
    theirs = {row["step"]: row["loss"] for row in other}
    both = [row for row in curve if row["step"] in theirs]
    apart = [abs(row["loss"] - theirs[row["step"]]) / abs(theirs[row["step"]]) for row in both]
    worst = max(range(len(apart)), key=apart.__getitem__)
    return {
        "steps_compared": len(both),
        "largest_difference_of_loss": round(apart[worst], 7),
        "at_step": both[worst]["step"],
        "last_difference_of_loss": round(apart[-1], 7),
        "within_tolerance": len(both) == len(curve) == len(other) and apart[worst] <= TOLERANCE,
    }


def straight(lab: Lab, part: str) -> dict[str, Any]:
    """`one`, `ddp` and `fsdp`: a run from beginning to end."""
    launcher, gpus = {"one": (PYTHON, 1), "ddp": (TORCHRUN, 2), "fsdp": (ACCELERATE, 2)}[part]
    row = lab.healed(part, launcher, gpus, lab.options.converted, lab.smollm2())
    return row if part == "one" else row | lab.beside("one", row)


def kill(lab: Lab) -> dict[str, Any]:
    """One of two processes under FSDP2 dies behind a saved state; two and one go on from there."""
    out, work = lab.folder / "kill", lab.folder / ".kill.healing"
    states: list[str] = []
    workers: list[int] = []
    moment = 0.0

    def strike(process: subprocess.Popen[bytes]) -> None:
        nonlocal moment
        until = time.monotonic() + lab.options.limit
        while not list(work.glob("state-*")):
            if process.poll() is not None or time.monotonic() > until:
                raise Failed(
                    f"no state was saved: {(lab.folder / 'kill.log').read_text(errors='replace')[-1500:]}"
                )
            time.sleep(0.01)
        victim = worker(process.pid, 1)
        if victim is None:
            raise Failed("the process of rank 1 was not found")
        workers.extend(descendants(process.pid))
        moment = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        process.wait(lab.options.limit)
        moment = time.monotonic() - moment

    command = lab.command(ACCELERATE, lab.options.converted, out, lab.smollm2())
    ended = lab.run("kill", command, 2, strike)
    states = sorted(path.name for path in work.glob("state-*"))
    row: dict[str, Any] = {
        "killed": "rank 1 of 2, by SIGKILL",
        "exit_code": ended.code,
        "seconds_until_the_launcher_ended": round(moment, 1),
        "processes_left": sum(Path(f"/proc/{pid}").exists() for pid in workers),
        "out_exists": out.exists(),
        "states_kept": states,
    }
    row["ended_cleanly"] = (
        ended.code not in (0, None) and not row["processes_left"] and not out.exists() and len(states) == 1
    )
    lab.save("kill", row)
    if not row["ended_cleanly"]:
        raise Failed(f"the run did not end as it should: {ended.tail()}")
    kept = json.loads((work / states[0] / "record.json").read_text())["curve"]
    shutil.copytree(work, lab.folder / ".kill-one.healing")
    for name, launcher, gpus in (("kill", ACCELERATE, 2), ("kill-one", PYTHON, 1)):
        healed = lab.healed(name, launcher, gpus, lab.options.converted, lab.smollm2())
        row[f"gone_on_with_{gpus}"] = {
            **{key: healed[key] for key in ("processes", "steps", "tokens_per_second", "wall_seconds", "peak_gib")},
            "from_step": kept[-1]["step"],
            "went_on": healed["curve"][: len(kept)] == kept and len(healed["curve"]) > len(kept),
            **lab.beside("one", healed),
            **lab.beside("fsdp", healed),
            "curve": [{key: line[key] for key in ("step", "loss", "kl")} for line in healed["curve"]],
        }  # fmt: skip
        lab.save("kill", row)
    return row


def qwen(lab: Lab, building: subprocess.Popen[bytes] | None) -> dict[str, Any]:
    """Layers of Qwen3-8B's shape with random weights, converted 1:3 without alignment, healed under FSDP2."""
    o = lab.options
    if building is None or building.wait(o.limit) != 0:
        raise Failed(
            f"it could not be built: {(lab.folder / 'build.log').read_text(errors='replace')[-1500:]}"
        )
    whole = o.layers <= ALL_LAYERS
    recipe = lab.recipe(
        "qwen",
        data={"source": str(o.data), "column": o.column},
        distill={
            "tokens": o.qwen_steps * o.qwen_batch,
            "sequence_length": o.qwen_length,
            "batch_tokens": o.qwen_batch,
            "lr": 1e-5,
        },
        lr_scale={} if whole else {"rest": 0},
        precision=o.precision,
        gradient_checkpointing=True,
        micro_tokens=max(o.qwen_length, o.qwen_batch // 2),
        log_every=max(1, o.qwen_steps // 10),
        eval_every=o.qwen_steps,
        save_every=0,
        heldout_tokens=o.qwen_length,
    )
    row = lab.healed("qwen-healed", ACCELERATE, 2, lab.folder / "qwen-converted", recipe)
    about = json.loads((lab.folder / "qwen-about.json").read_text())
    trained = "everything" if whole else "attention and what conversion added"
    return about | {"trained": trained, "weights": "random", "teacher": "whole on every GPU"} | row


def build(options: Any, folder: Path) -> None:
    """Make the model of part `qwen`; in a process of its own, while the first parts run."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from hyconvert.checkpoint import open_source
    from hyconvert.conversion import convert

    last = torch.cuda.device_count() - 1
    device = torch.device("cpu" if options.device == "cpu" else f"cuda:{last}")
    shape = {
        "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 12288, "vocab_size": 151_936,
    } if not options.tiny else {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 48, "vocab_size": 128,
    }  # fmt: skip
    config = Qwen3Config(
        **shape, num_hidden_layers=options.layers, max_position_embeddings=40_960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = folder / "qwen-base"
    model.save_pretrained(base)
    open_source(options.converted).load_tokenizer().save_pretrained(base)
    settings = {"block_size": 4, "topk": 2, "window": 8} if options.tiny else {}
    report = convert(
        base, folder / "qwen-converted", uniform=3, align_layers=False, device=str(device), **settings
    )
    about = {
        "model": f"{options.layers} of Qwen3-8B's 36 layers" if not options.tiny else "a tiny Qwen3",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "plan": report.plan.line,
    }
    (folder / "qwen-about.json").write_text(json.dumps(about))


def start_building(lab: Lab) -> subprocess.Popen[bytes]:
    """Build beside the part `one`, which leaves the last GPU alone."""
    o = lab.options
    command = [
        *PYTHON, "benchmarks.several_gpus", str(o.converted), "--build", str(lab.folder), "--layers", str(o.layers),
        "--device", o.device, *(["--tiny"] if o.tiny else []),
    ]  # fmt: skip
    with (lab.folder / "build.log").open("w") as file:
        return subprocess.Popen(
            command, env=lab.environment(2), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )


def tiny(options: Any, folder: Path) -> None:
    """A tiny converted model and a text, and settings to match."""
    from hyconvert.conversion import convert
    from tests.conftest import save_model

    base = save_model(folder / "base", "llama")
    options.converted, options.data = folder / "converted", folder / "text"
    convert(base, options.converted, plan="F S0 W F", align_layers=False, block_size=4, topk=2, window=8)
    options.data.mkdir()
    words = (ROOT / "README.md").read_text().encode("ascii", "replace").decode().split()
    for at in range(0, len(words) - 30, 30):
        (options.data / f"{at:05}.txt").write_text(" ".join(words[at : at + 30]))
    options.device, options.precision, options.lr = "cpu", "fp32", 3e-3
    options.length, options.batch, options.heldout, options.log_every = 32, 128, 256, 5
    options.layers, options.qwen_length, options.qwen_batch, options.qwen_steps = 4, 32, 64, 4


def about(device: str) -> dict[str, Any]:
    """The machine and the versions."""
    from importlib.metadata import version

    names = []
    if device != "cpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        names = [name.strip() for name in names if name.strip()]
        if len(names) < 2:
            raise SystemExit(f"two GPUs are needed, and there are {len(names)}; --tiny rehearses on a CPU")
    return {
        "device": f"{len(names)} x {names[0]}" if names else "CPU",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "tolerance": TOLERANCE,
    }


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("converted", type=Path, nargs="?", help="a converted model, such as SmolLM2-135M")
    parser.add_argument("--data", type=Path, help="text to train on")
    parser.add_argument("--column", default="text")
    parser.add_argument("--teacher", help="its base  [default: the one recorded at conversion]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--length", type=int, default=4096, help="T")
    parser.add_argument("--batch", type=int, default=65_536, help="tokens per step, over all GPUs")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--heldout", type=int, default=32_768, help="tokens to measure on")
    parser.add_argument("--log-every", type=int, default=10, help="steps")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--layers", type=int, default=8, help="of Qwen3-8B's 36")
    parser.add_argument("--qwen-steps", type=int, default=20)
    parser.add_argument("--qwen-length", type=int, default=4096)
    parser.add_argument("--qwen-batch", type=int, default=32_768)
    parser.add_argument("--limit", type=float, default=300, help="seconds that one run may take")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--work", type=Path, help="folder to work in, kept; none is a temporary one")
    parser.add_argument(
        "--out", type=Path, help="rows  [default: benchmarks/results/several_gpus.json; of --tiny in WORK]"
    )
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the chosen parts; 1 if one of them failed or a curve is out of tolerance."""
    options = arguments()
    if options.build is not None:
        build(options, options.build)
        return 0
    if not options.tiny and (options.converted is None or options.data is None):
        print("give a converted model and --data, or --tiny", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        place = folder if options.tiny else ROOT / "benchmarks/results"
        options.out = options.out or place / "several_gpus.json"
        if options.tiny:
            tiny(options, folder)
        options.converted, options.data = options.converted.resolve(), options.data.resolve()
        lab = Lab(options, folder, about(options.device))
        building = start_building(lab) if "qwen" in options.only else None
        bad = []
        try:
            for part in (part for part in PARTS if part in options.only):
                try:
                    row = (
                        kill(lab) if part == "kill" else qwen(lab, building) if part == "qwen" else straight(lab, part)
                    )  # fmt: skip
                    lab.save(part, row)
                    text = json.dumps(row)
                    if '"within_tolerance": false' in text or '"went_on": false' in text:
                        bad.append(part)
                except Exception as error:
                    before = lab.rows.get(part, {}) if part == "kill" else {}
                    lab.save(part, before | {"failed": f"{type(error).__name__}: {str(error)[-1800:]}"})
                    bad.append(part)
        finally:
            if building is not None:
                end(building)
    print(f"out of order: {', '.join(bad)}" if bad else "all in order", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
