"""The command line: `bomkern train`, `diagnose` and `info`. Exits with 2 for bad arguments and 1 for a failure."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NoReturn

from .train.config import IMAGE_SIZES, LEAST_BATCH, PRECISIONS, REDUCTIONS, SCALES, STRATEGIES, Config, TrainError

READER_GONE = 128 + 13  # SIGPIPE: what a shell reports for other tools
EXTRA = ("lightning_fabric", "matplotlib", "PIL", "skimage", "sklearn", "tensorboard", "torchmetrics", "tqdm")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _at_least(kind: Callable[[str], float], low: float, exclusive: bool = False) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not math.isfinite(value) or value < low or (exclusive and value == low):
            raise argparse.ArgumentTypeError(f"must be {'greater than' if exclusive else 'at least'} {low}, got {text}")
        return value

    return parse


def _ratio(text: str) -> float:
    value = _at_least(float, 0)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be less than 1, got {text}")
    return value


def _spill(text: str) -> float | str:
    return text if text == "auto" else _ratio(text)


def _probe_steps(text: str) -> int | str:
    return text if text == "auto" else int(_at_least(int, 0)(text))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="bomkern", description="Multi-goal training by the bottleneck rule.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("info", help="what was built, and what serves each op here")
    look = commands.add_parser("diagnose", help="say which goals keep a run from getting better, and write report.html")
    look.add_argument("run", metavar="RUN", help="run folder, with a history.pt")
    look.add_argument("--json", action="store_true", help="print the findings as JSON")
    look.add_argument("--no-report", action="store_true", help="write no report.html")
    # Without defaults, so that a resumed run knows which settings were asked for.
    train = commands.add_parser(
        "train", help="train a VAE with nine goals on photographs", argument_default=argparse.SUPPRESS
    )
    add, default, one = train.add_argument, Config(), _at_least(int, 1)
    add("--out", metavar="FOLDER", help=f"run folder ({default.out})")
    add("--data", metavar="FOLDER", help="your own images (the photographs inside scikit-image and scikit-learn)")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=one, help="how long to train (1000)")
    length.add_argument(
        "--epochs", type=_at_least(float, 0, True), help="how long, in passes over the training regions"
    )
    of_each = f"samples a step, of each process when a run begins ({default.batch_size})"
    add("--batch-size", type=_at_least(int, LEAST_BATCH), help=of_each)
    add("--image-size", type=int, choices=IMAGE_SIZES, help=f"side of a crop in pixels ({default.image_size})")
    add("--seed", type=_at_least(int, 0), help=f"of weights, data order and noise ({default.seed})")
    add("--scales", choices=SCALES, help=f"where each goal's scale comes from ({default.scales})")
    add("--calibration-steps", type=one, help=f"of the auto scales ({default.calibration_steps})")
    add("--reduction", choices=REDUCTIONS, help=f"of the per-sample losses ({default.reduction})")
    add("--temperature", type=_at_least(float, 0), help=f"of the minimum over goals ({default.temperature:g}: hard)")
    by_order = "weight of each goal over the next worse one's, or auto; 0: the minimum alone (0.5, or 0)"
    add("--spill", type=_spill, metavar="RATIO", help=by_order)
    rows = f"goal rows of a step with spill, in batches; 0: every goal takes all rows ({default.budget:g})"
    add("--budget", type=_at_least(float, 0), help=rows)
    alone = "steps of a run for each goal alone before the first step, or auto: until it has settled (0)"
    add("--probe", type=_probe_steps, metavar="STEPS", help=alone)
    add("--lr", type=_at_least(float, 0, True), help=f"learning rate ({default.lr:g})")
    add("--discriminator-lr", type=_at_least(float, 0, True), help=f"({default.discriminator_lr:g})")
    add("--structure", type=_at_least(int, 2), help=f"latents of the structure ({default.structure})")
    add("--appearance", type=_at_least(int, 2), help=f"latents of the appearance ({default.appearance})")
    add("--device", help="auto, cpu, cuda or cuda:N (auto)")
    add("--devices", type=one, help="how many processes, each with a device (1, or as many as torchrun starts)")
    add("--strategy", choices=STRATEGIES, help="how several processes share the work; auto is ddp (auto)")
    add("--precision", choices=PRECISIONS, help=f"({default.precision})")
    add(
        "--impl",
        choices=("reference", "cpu", "cuda", "triton"),
        help="implementation of the kernels (the best there is)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the step by torch.compile: the first one takes a minute or more, the others less time (no)",
    )
    add("--log-every", type=one, help=f"steps between lines of metrics.jsonl ({default.log_every})")
    add("--eval-every", type=one, help=f"steps between held-out evaluations ({default.eval_every})")
    add("--checkpoint-every", type=one, help=f"steps between checkpoints ({default.checkpoint_every})")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return parser


def _info() -> int:
    import bomkern

    print(bomkern.info())
    return 0


def _diagnose(folder: str, as_json: bool, report: bool) -> int:
    from .report import diagnose_folder

    trouble: Exception | None = None
    try:
        try:
            diagnosis, written = diagnose_folder(folder, report)
        except OSError as why:  # the folder may be readable but not writable
            trouble = why
            diagnosis, written = diagnose_folder(folder, False)
    except (OSError, ValueError, TypeError) as why:
        print(f"bomkern diagnose: error: {why}", file=sys.stderr)
        return 1
    print(json.dumps(diagnosis.to_dict(), indent=2) if as_json else diagnosis)
    if written and not as_json:
        print(f"\nreport: {written}")
    if trouble:
        print(f"bomkern diagnose: error: no report: {trouble}", file=sys.stderr)
    return 1 if trouble else 0


def _train(given: dict[str, object]) -> int:
    for name in EXTRA:
        try:
            __import__(name)
        except ImportError as why:
            print(f"bomkern train needs {why.name or name}: pip install 'bomkern[train]'", file=sys.stderr)
            return 1
    from .train import loop, processes, terminal

    config = Config(**given)  # type: ignore[arg-type]
    try:
        summary = loop.train(config, set(given))
    except (TrainError, OSError) as why:
        processes.say(f"bomkern train: error: {why}", why)
        return 1
    except KeyboardInterrupt:
        processes.say("stopped before the first step")
        return 130
    except loop.Interrupted as why:
        processes.say(f"{why}; go on with: bomkern train --out {config.out} --resume")
        return 128 + why.number
    if summary:
        print(terminal.report(summary, config.out))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; bad arguments exit with 2."""
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # `bomkern info | head` has read enough
        # Python flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE


def _run(argv: Sequence[str] | None) -> int:
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    if command == "info":
        return _info()
    if command == "diagnose":
        if not os.path.isdir(arguments["run"]):
            _parser().error(f"argument RUN: no such folder: {arguments['run']}")
        return _diagnose(arguments["run"], arguments["json"], not arguments["no_report"])
    known = {field.name for field in fields(Config)}
    given = {name: value for name, value in arguments.items() if name in known}
    if given.get("resume") and given.get("overwrite"):
        _parser().error("--resume and --overwrite exclude each other")
    device = str(given.get("device", "auto"))
    if device not in ("auto", "cpu", "cuda") and not (device.startswith("cuda:") and device[5:].isdigit()):
        _parser().error(f"argument --device: must be auto, cpu, cuda or cuda:N, got {device!r}")
    return _train(given)
